"""The network: one decoder for every family, with explicit router outputs."""

from safemoe_jax.models.config import (
    Compute,
    LayerConfig,
    LoraConfig,
    MlaConfig,
    ModelConfig,
    RopeConfig,
    RoutingConfig,
)
from safemoe_jax.models.params import Params, ParamSpec, Weights, initialise, split_trainable
from safemoe_jax.models.transformer import (
    Output,
    RoutingOverride,
    declare,
    decode_step,
    forward,
    hidden_states,
    prefill,
    routing_pass,
    unembed,
)

__all__ = [
    "Compute",
    "LayerConfig",
    "LoraConfig",
    "MlaConfig",
    "ModelConfig",
    "Output",
    "ParamSpec",
    "Params",
    "RopeConfig",
    "RoutingConfig",
    "RoutingOverride",
    "Weights",
    "decode_step",
    "declare",
    "forward",
    "hidden_states",
    "initialise",
    "prefill",
    "routing_pass",
    "split_trainable",
    "unembed",
]
