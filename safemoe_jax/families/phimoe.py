"""Phi-3.5-MoE (`model_type: phimoe`; Abdin et al. 2024, arXiv 2404.14219): config.json and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safemoe_jax.families.common_config import read_decoder, read_experts, write_decoder
from safemoe_jax.families.common_rows import (
    BUFFERS,
    LAYER,
    TIED,
    attention_rows,
    decoder_rows,
    expert_rows,
)
from safemoe_jax.families.config_fields import read, require, size
from safemoe_jax.families.family import Family
from safemoe_jax.families.tensor_table import TensorTable, linear
from safemoe_jax.models.config import LayerConfig, ModelConfig, RoutingConfig

_MOE = f"{LAYER}.block_sparse_moe"

TABLE = TensorTable(
    rows=(
        *decoder_rows(),
        *attention_rows(),
        *linear("moe.router", f"{_MOE}.gate", f"{LAYER}.mlp.router"),
        *expert_rows(f"{_MOE}.experts", ("w1", "w3", "w2")),
    ),
    ignored=BUFFERS,
    tied=TIED,
)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The network that a config.json describes. The jitter of the experts' input is for training only.

    Raises:
        InputError: a field is missing, malformed, or asks for something that Phi-3.5-MoE does not have.
    """
    decoder = read_decoder(raw, theta=1000000.0, max_positions=131072)
    experts = read_experts({"num_experts_per_tok": 2, **raw}, width="intermediate_size")
    only = "2, the only number that its routing knows"
    require(experts["top_k"] == 2, "num_experts_per_tok", experts["top_k"], only)
    jitter, bias = read(raw, "router_jitter_noise", float, 0.01), read(raw, "attention_bias", bool, False)
    require(jitter >= 0, "router_jitter_noise", jitter, "at least 0")
    rope = decoder["rope"]
    require(rope.kind in ("default", "longrope"), "rope_type", rope.kind, "longrope, or no scaling")
    for field in ("short_mscale", "long_mscale") if rope.kind == "longrope" else ():
        require(getattr(rope, field) is not None, field, None, "a number, as longrope needs here")
    return ModelConfig(
        family="phimoe",
        **decoder,
        **experts,
        norm="layer",
        attention_bias=bias,
        output_bias=bias,
        routing=RoutingConfig(kind="sparsemixer", jitter=jitter),
        lm_head_bias=read(raw, "lm_head_bias", bool, False),
        layers=(LayerConfig(window=size(raw, "sliding_window", None) or 0),) * decoder["n_layers"],
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields of a network, in the layout of the published checkpoints."""
    return {
        **write_decoder(config),
        "architectures": ["PhimoeForCausalLM"],
        "model_type": "phimoe",
        "intermediate_size": config.expert_dim,
        "num_local_experts": config.n_experts,
        "num_experts_per_tok": config.top_k,
        "sliding_window": config.layers[0].window or None,
        "router_jitter_noise": config.routing.jitter,
        "attention_bias": config.attention_bias,
        "lm_head_bias": config.lm_head_bias,
        "router_aux_loss_coef": config.router_aux_coef,
    }


FAMILY = Family("phimoe", read_config, write_config, TABLE)
