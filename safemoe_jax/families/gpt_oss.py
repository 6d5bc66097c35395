"""gpt-oss (`model_type: gpt_oss`; OpenAI 2025, arXiv 2508.10925): config.json and tensor names.

Published in MXFP4, read from there or from the bfloat16 layout, written in the latter.
"""

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
    interleaved_expert_rows,
)
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
from safemoe_jax.models.config import LayerConfig, ModelConfig, RoutingConfig

TABLE = TensorTable(
    rows=(
        *decoder_rows(),
        *attention_rows(),
        *linear("moe.router", f"{LAYER}.mlp.router"),
        *interleaved_expert_rows(),
    ),
    ignored=BUFFERS,
    tied=TIED,
)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The network that a config.json describes.

    Raises:
        InputError: a field is missing, malformed, or asks for something that gpt-oss does not have.
    """
    limit, bias = read(raw, "swiglu_limit", float, 7.0), read(raw, "attention_bias", bool, True)
    require(limit > 0, "swiglu_limit", limit, "above 0")
    quantized = (raw.get("quantization_config") or {}).get("quant_method", "mxfp4")
    require(quantized == "mxfp4", "quantization_config", quantized, "mxfp4, or no quantisation")
    return ModelConfig(
        family="gpt_oss",
        **read_decoder(raw, theta=150000.0, head_dim=64, max_positions=131072),
        **read_experts(raw, width="intermediate_size"),
        norm="rms_float32",
        attention_bias=bias,
        output_bias=bias,
        sinks=True,
        routing=RoutingConfig(kind="softmax_chosen", bias=True),
        activation="clamped",
        activation_limit=limit,
        activation_alpha=read(raw, "swiglu_alpha", float, 1.702),
        expert_bias=True,
        layers=_read_layers(raw),
    )


def _read_layers(raw: Mapping[str, Any]) -> tuple[LayerConfig, ...]:
    """Every other layer slides, the first one too, unless `layer_types` says otherwise."""
    n = size(raw, "num_hidden_layers")
    types = layer_types(raw, n, [FULL if i % 2 else SLIDING for i in range(n)])
    require(set(types) <= {FULL, SLIDING}, "layer_types", list(types), f"{FULL} or {SLIDING}")
    return make_layers(("moe",) * n, types, window=size(raw, "sliding_window", 128))


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields of a network, in the layout of the published checkpoints."""
    return {
        **write_decoder(config),
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "head_dim": config.head_dim,
        "intermediate_size": config.expert_dim,
        "num_local_experts": config.n_experts,
        "num_experts_per_tok": config.top_k,
        "swiglu_alpha": config.activation_alpha,
        "swiglu_limit": config.activation_limit,
        "sliding_window": max(layer.window for layer in config.layers) or 128,
        "layer_types": write_layer_types(config),
        "attention_bias": config.attention_bias,
        "router_aux_loss_coef": config.router_aux_coef,
    }


FAMILY = Family("gpt_oss", read_config, write_config, TABLE)
