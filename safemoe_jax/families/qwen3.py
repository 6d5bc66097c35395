"""Dense Qwen3 (`model_type: qwen3`; Yang et al. 2025, arXiv 2505.09388): config.json and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safemoe_jax.families.common_config import read_decoder, read_window, write_decoder, write_window
from safemoe_jax.families.common_rows import BUFFERS, LAYER, TIED, attention_rows, decoder_rows, swiglu_rows
from safemoe_jax.families.config_fields import (
    FULL,
    SLIDING,
    layer_types,
    make_layers,
    read,
    require,
    size,
    write_layer_types,
)
from safemoe_jax.families.family import Family
from safemoe_jax.families.tensor_table import TensorTable
from safemoe_jax.models.config import LayerConfig, ModelConfig

TABLE = TensorTable(
    rows=(*decoder_rows(), *attention_rows(), *swiglu_rows("mlp", f"{LAYER}.mlp")),
    ignored=BUFFERS,
    tied=TIED,
)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The network that a config.json describes: every layer dense, no router.

    Raises:
        InputError: a field is missing, malformed, or asks for something that Qwen3 does not have.
    """
    decoder, bias = read_decoder(raw, head_dim=128), read(raw, "attention_bias", bool, False)
    return ModelConfig(
        family="qwen3",
        **decoder,
        n_experts=0,
        top_k=0,
        expert_dim=0,
        attention_bias=bias,
        output_bias=bias,
        qk_norm="head",
        dense_dim=size(raw, "intermediate_size"),
        layers=_read_layers(raw, decoder["n_layers"]),
    )


def _read_layers(raw: Mapping[str, Any], n_layers: int) -> tuple[LayerConfig, ...]:
    """Layers from `max_window_layers` on slide, unless `layer_types` tells."""
    window, full = read_window(raw), read(raw, "max_window_layers", int, 28)
    default = [SLIDING if window and i >= full else FULL for i in range(n_layers)]
    types = layer_types(raw, n_layers, default)
    require(
        window > 0 or SLIDING not in types, "use_sliding_window", False, "true, as layer_types has windows"
    )
    return make_layers(("dense",) * n_layers, types, window=window)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields of a network, in the layout of the published checkpoints."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **write_decoder(config),
        "head_dim": config.head_dim,
        "intermediate_size": config.dense_dim,
        "attention_bias": config.attention_bias,
        **write_window(config),
        "layer_types": write_layer_types(config),
    }


FAMILY = Family("qwen3", read_config, write_config, TABLE)
