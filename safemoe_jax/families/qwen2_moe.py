"""Qwen1.5-MoE and Qwen2-MoE (`model_type: qwen2_moe`; Yang et al. 2024, arXiv 2407.10671)."""

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
    layer_types,
    make_layers,
    read,
    require,
    size,
    sparse_step_kinds,
    write_layer_types,
    write_sparse_step,
)
from safemoe_jax.families.family import Family
from safemoe_jax.families.tensor_table import TensorTable, linear
from safemoe_jax.models.config import LayerConfig, ModelConfig

TABLE = TensorTable(
    rows=(
        *decoder_rows(),
        *attention_rows(),
        *linear("moe.router", f"{LAYER}.mlp.gate"),
        *expert_rows(),
        *swiglu_rows("moe.shared", f"{LAYER}.mlp.shared_expert"),
        *linear("moe.shared_gate", f"{LAYER}.mlp.shared_expert_gate"),
        *swiglu_rows("mlp", f"{LAYER}.mlp"),
    ),
    ignored=BUFFERS,
    tied=TIED,
)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The network that a config.json describes.

    Raises:
        InputError: a field is missing, malformed, or asks for something that Qwen2-MoE does not have.
    """
    decoder = read_decoder(raw)
    return ModelConfig(
        family="qwen2_moe",
        **decoder,
        **read_experts(raw, width="moe_intermediate_size"),
        attention_bias=read(raw, "qkv_bias", bool, True),
        norm_topk_prob=read(raw, "norm_topk_prob", bool, False),
        shared_dim=size(raw, "shared_expert_intermediate_size"),
        shared_gate=True,
        dense_dim=size(raw, "intermediate_size"),
        layers=_read_layers(raw, decoder["n_layers"]),
    )


def _read_layers(raw: Mapping[str, Any], n_layers: int) -> tuple[LayerConfig, ...]:
    """Every other layer below `max_window_layers` slides, the first one too, unless `layer_types` tells."""
    window, below = read_window(raw), read(raw, "max_window_layers", int, 28)
    default = [SLIDING if window and i % 2 == 0 and i < below else FULL for i in range(n_layers)]
    types = layer_types(raw, n_layers, default)
    require(
        window > 0 or SLIDING not in types, "use_sliding_window", False, "true, as layer_types has windows"
    )
    return make_layers(sparse_step_kinds(raw, n_layers), types, window=window)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields of a network, in the layout of the published checkpoints."""
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **write_decoder(config),
        "num_experts": config.n_experts,
        "num_experts_per_tok": config.top_k,
        "moe_intermediate_size": config.expert_dim,
        "router_aux_loss_coef": config.router_aux_coef,
        "qkv_bias": config.attention_bias,
        "norm_topk_prob": config.norm_topk_prob,
        "shared_expert_intermediate_size": config.shared_dim,
        "intermediate_size": config.dense_dim,
        **write_sparse_step(config),
        **write_window(config),
        "layer_types": write_layer_types(config),
    }


FAMILY = Family("qwen2_moe", read_config, write_config, TABLE)
