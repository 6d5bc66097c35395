"""The network: one decoder for every family, with explicit router outputs."""

from safemoe_jax.models.config import Compute, LoraConfig, ModelConfig, RopeConfig
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
    "LoraConfig",
    "ModelConfig",
    "Output",
    "ParamSpec",
    "Params",
    "RopeConfig",
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
