"""dots.llm1 (`model_type: dots1`; arXiv 2506.05767): config.json and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safemoe_jax.families import common_rows as rows
from safemoe_jax.families import deepseek
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
from safemoe_jax.families.tensor_table import TensorTable, linear
from safemoe_jax.models.config import LayerConfig, ModelConfig

_MLP = f"{rows.LAYER}.mlp"

TABLE = TensorTable(
    rows=(
        *rows.decoder_rows(),
        *rows.attention_rows(),
        *linear("moe.router", f"{_MLP}.gate"),
        rows.correction_bias_row(f"{_MLP}.gate.e_score_correction_bias"),
        *rows.expert_rows(),
        *rows.swiglu_rows("moe.shared", f"{_MLP}.shared_experts"),
        *rows.swiglu_rows("mlp", _MLP),
    ),
    ignored=rows.BUFFERS,
    tied=rows.TIED,
)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The network that a config.json describes.

    Raises:
        InputError: a field is missing, malformed, or asks for something that dots.llm1 does not have.
    """
    sizes = deepseek.read_sizes(raw, max_positions=2048)
    bias = read(raw, "attention_bias", bool, False)
    return ModelConfig(
        family="dots1",
        **sizes,
        attention_bias=bias,
        output_bias=bias,
        qk_norm="head",
        norm_topk_prob=read(raw, "norm_topk_prob", bool, False),
        routing=deepseek.sigmoid_routing(raw, sizes, 1, 1, scale=1.0),
        layers=_read_layers(raw, sizes["n_layers"]),
    )


def _read_layers(raw: Mapping[str, Any], n: int) -> tuple[LayerConfig, ...]:
    """Which layers have experts, and which see a window: those that `layer_types` names, or the last ones."""
    # A null means no window; only where the field is absent does transformers' own default count.
    window = size(raw, "sliding_window", None) if "sliding_window" in raw else 4096
    first = read(raw, "max_window_layers", int, 62)
    types = layer_types(raw, n, [SLIDING if window and i >= first else FULL for i in range(n)])
    require(set(types) <= {SLIDING, FULL}, "layer_types", types, f"{SLIDING} or {FULL}")
    expected = "a window, as layer_types has sliding layers"
    require(window is not None or SLIDING not in types, "sliding_window", window, expected)
    return make_layers(deepseek.layer_kinds(raw, n, 0), types, window=window or 0)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields of a network, in the layout of the published checkpoints."""
    return {
        "architectures": ["Dots1ForCausalLM"],
        **deepseek.write_sizes(config),
        "sliding_window": max(layer.window for layer in config.layers) or None,
        "layer_types": write_layer_types(config),
        "topk_method": "noaux_tc",
        "scoring_func": "noaux_tc",
    }


FAMILY = Family("dots1", read_config, write_config, TABLE)
