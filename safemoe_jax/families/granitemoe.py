"""Granite 3 MoE (`model_type: granitemoe`; IBM 2024): config.json and tensor names."""

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
    fused_expert_rows,
)
from safemoe_jax.families.config_fields import read, require
from safemoe_jax.families.family import Family
from safemoe_jax.families.tensor_table import TensorTable, linear
from safemoe_jax.models.config import ModelConfig, RoutingConfig

_MOE = f"{LAYER}.block_sparse_moe"

TABLE = TensorTable(
    rows=(
        *decoder_rows(),
        *attention_rows(),
        *linear("moe.router", f"{_MOE}.router.layer", f"{_MOE}.router"),
        *fused_expert_rows(
            (f"{_MOE}.input_linear.weight", f"{_MOE}.experts.gate_up_proj"),
            (f"{_MOE}.output_linear.weight", f"{_MOE}.experts.down_proj"),
            transpose=True,
        ),
    ),
    ignored=BUFFERS,
    tied=TIED,
)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The network that a config.json describes; its four multipliers are 1 where it names none.

    Raises:
        InputError: a field is missing, malformed, or asks for something that Granite MoE does not have.
    """
    bias = read(raw, "attention_bias", bool, False)
    divisor = read(raw, "logits_scaling", float, 1.0)
    require(divisor != 0, "logits_scaling", divisor, "a number other than 0")
    return ModelConfig(
        family="granitemoe",
        **read_decoder(raw, max_positions=2048),
        **read_experts(raw, width="intermediate_size"),
        attention_bias=bias,
        output_bias=bias,
        attention_scale=read(raw, "attention_multiplier", float, 1.0),
        embedding_scale=read(raw, "embedding_multiplier", float, 1.0),
        residual_scale=read(raw, "residual_multiplier", float, 1.0),
        logits_divisor=divisor,
        routing=RoutingConfig(kind="softmax_chosen"),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields of a network, in the layout of the published checkpoints."""
    return {
        "architectures": ["GraniteMoeForCausalLM"],
        "model_type": "granitemoe",
        **write_decoder(config),
        "num_local_experts": config.n_experts,
        "num_experts_per_tok": config.top_k,
        "intermediate_size": config.expert_dim,
        "router_aux_loss_coef": config.router_aux_coef,
        "attention_bias": config.attention_bias,
        "attention_multiplier": config.attention_scale,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": config.logits_divisor,
    }


FAMILY = Family("granitemoe", read_config, write_config, TABLE)
