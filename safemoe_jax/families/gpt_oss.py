"""gpt-oss (`model_type: gpt_oss`; OpenAI 2025, arXiv 2508.10925): config.json and tensor names.

Published in MXFP4, read from there or from the bfloat16 layout, written in the latter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    read_rope,
    require,
    size,
    write_layer_types,
    write_rope,
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
    n_heads, n_experts = size(raw, "num_attention_heads"), size(raw, ("num_local_experts", "num_experts"))
    n_kv_heads, top_k = size(raw, "num_key_value_heads", n_heads), size(raw, "num_experts_per_tok")
    require(n_heads % n_kv_heads == 0, "num_key_value_heads", n_kv_heads, f"a divisor of {n_heads}")
    require(top_k <= n_experts, "num_experts_per_tok", top_k, f"at most num_local_experts ({n_experts})")
    activation, limit = read(raw, "hidden_act", str, "silu"), read(raw, "swiglu_limit", float, 7.0)
    require(activation == "silu", "hidden_act", activation, "silu")
    require(limit > 0, "swiglu_limit", limit, "above 0")
    quantized = (raw.get("quantization_config") or {}).get("quant_method", "mxfp4")
    require(quantized == "mxfp4", "quantization_config", quantized, "mxfp4, or no quantisation")
    bias = read(raw, "attention_bias", bool, True)
    return ModelConfig(
        family="gpt_oss",
        vocab_size=size(raw, "vocab_size"),
        d_model=size(raw, "hidden_size"),
        n_layers=size(raw, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=size(raw, "head_dim", 64),
        norm_eps=read(raw, "rms_norm_eps", float),
        norm="rms_float32",
        n_experts=n_experts,
        top_k=top_k,
        expert_dim=size(raw, "intermediate_size"),
        rope=read_rope(raw, 150000.0),
        attention_bias=bias,
        output_bias=bias,
        sinks=True,
        routing=RoutingConfig(kind="softmax_chosen", bias=True),
        activation="clamped",
        activation_limit=limit,
        activation_alpha=read(raw, "swiglu_alpha", float, 1.702),
        expert_bias=True,
        tie_embeddings=read(raw, "tie_word_embeddings", bool, False),
        initializer_range=read(raw, "initializer_range", float, 0.02),
        router_aux_coef=read(raw, "router_aux_loss_coef", float, 0.001),
        max_positions=size(raw, "max_position_embeddings", 131072),
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
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.expert_dim,
        "num_local_experts": config.n_experts,
        "num_experts_per_tok": config.top_k,
        "hidden_act": "silu",
        "swiglu_alpha": config.activation_alpha,
        "swiglu_limit": config.activation_limit,
        "rms_norm_eps": config.norm_eps,
        **write_rope(config.rope),
        "sliding_window": max(layer.window for layer in config.layers) or 128,
        "layer_types": write_layer_types(config),
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "router_aux_loss_coef": config.router_aux_coef,
        "max_position_embeddings": config.max_positions,
    }


FAMILY = Family("gpt_oss", read_config, write_config, TABLE)
