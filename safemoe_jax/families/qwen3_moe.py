"""Qwen3-MoE (`model_type: qwen3_moe`; Yang et al. 2025, arXiv 2505.09388): config.json and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safemoe_jax.families.common_config import (
    read_decoder,
    read_experts,
    read_window,
    write_decoder,
    write_window,
)
from safemoe_jax.families.common_rows import (
    BUFFERS,
    LAYER,
    TIED,
    attention_rows,
    decoder_rows,
    expert_rows,
    swiglu_rows,
)
from safemoe_jax.families.config_fields import (
    FULL,
    SLIDING,
    make_layers,
    read,
    size,
    sparse_step_kinds,
    write_sparse_step,
)
from safemoe_jax.families.family import Family
from safemoe_jax.families.tensor_table import TensorTable, linear
from safemoe_jax.models.config import ModelConfig

TABLE = TensorTable(
    rows=(
        *decoder_rows(),
        *attention_rows(),
        *linear("moe.router", f"{LAYER}.mlp.gate"),
        *expert_rows(),
        *swiglu_rows("mlp", f"{LAYER}.mlp"),
    ),
    ignored=BUFFERS,
    tied=TIED,
)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The network that a config.json describes. A window, where there is one, is every layer's.

    Raises:
        InputError: a field is missing, malformed, or asks for something that Qwen3-MoE does not have.
    """
    decoder, window = read_decoder(raw), read_window(raw)
    n_layers, bias = decoder["n_layers"], read(raw, "attention_bias", bool, False)
    types = (SLIDING if window else FULL,) * n_layers
    return ModelConfig(
        family="qwen3_moe",
        **decoder,
        **read_experts(raw, width="moe_intermediate_size"),
        attention_bias=bias,
        output_bias=bias,
        qk_norm="head",
        norm_topk_prob=read(raw, "norm_topk_prob", bool, False),
        dense_dim=size(raw, "intermediate_size"),
        layers=make_layers(sparse_step_kinds(raw, n_layers), types, window=window),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields of a network, in the layout of the published checkpoints."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **write_decoder(config),
        "head_dim": config.head_dim,
        "num_experts": config.n_experts,
        "num_experts_per_tok": config.top_k,
        "moe_intermediate_size": config.expert_dim,
        "router_aux_loss_coef": config.router_aux_coef,
        "attention_bias": config.attention_bias,
        "norm_topk_prob": config.norm_topk_prob,
        "intermediate_size": config.dense_dim,
        **write_sparse_step(config),
        **write_window(config),
    }


FAMILY = Family("qwen3_moe", read_config, write_config, TABLE)
