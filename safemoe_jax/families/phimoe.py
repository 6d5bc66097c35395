"""Phi-3.5-MoE (`model_type: phimoe`; Abdin et al. 2024, arXiv 2404.14219): config.json and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safemoe_jax.families.common_rows import (
    BUFFERS,
    LAYER,
    TIED,
    attention_rows,
    decoder_rows,
    expert_rows,
)
from safemoe_jax.families.config_fields import read, read_rope, require, size, write_rope
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
    d_model, n_heads = size(raw, "hidden_size"), size(raw, "num_attention_heads")
    n_kv_heads, n_experts = size(raw, "num_key_value_heads", n_heads), size(raw, "num_local_experts")
    require(d_model % n_heads == 0, "hidden_size", d_model, f"a multiple of num_attention_heads ({n_heads})")
    require(n_heads % n_kv_heads == 0, "num_key_value_heads", n_kv_heads, f"a divisor of {n_heads}")
    require(n_experts >= 2, "num_local_experts", n_experts, "at least 2")
    top_k = size(raw, "num_experts_per_tok", 2)
    require(top_k == 2, "num_experts_per_tok", top_k, "2, the only number that its routing knows")
    activation = read(raw, "hidden_act", str, "silu")
    require(activation == "silu", "hidden_act", activation, "silu")
    jitter = read(raw, "router_jitter_noise", float, 0.01)
    require(jitter >= 0, "router_jitter_noise", jitter, "at least 0")
    n_layers, bias = size(raw, "num_hidden_layers"), read(raw, "attention_bias", bool, False)
    rope = read_rope(raw, 1000000.0)
    require(rope.kind in ("default", "longrope"), "rope_type", rope.kind, "longrope, or no scaling")
    for field in ("short_mscale", "long_mscale") if rope.kind == "longrope" else ():
        require(getattr(rope, field) is not None, field, None, "a number, as longrope needs here")
    layer = LayerConfig(window=size(raw, "sliding_window", None) or 0)
    return ModelConfig(
        family="phimoe",
        vocab_size=size(raw, "vocab_size"),
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=size(raw, "head_dim", d_model // n_heads),
        norm_eps=read(raw, "rms_norm_eps", float),
        norm="layer",
        n_experts=n_experts,
        top_k=top_k,
        expert_dim=size(raw, "intermediate_size"),
        rope=rope,
        attention_bias=bias,
        output_bias=bias,
        routing=RoutingConfig(kind="sparsemixer", jitter=jitter),
        tie_embeddings=read(raw, "tie_word_embeddings", bool, False),
        lm_head_bias=read(raw, "lm_head_bias", bool, False),
        initializer_range=read(raw, "initializer_range", float, 0.02),
        router_aux_coef=read(raw, "router_aux_loss_coef", float, 0.001),
        max_positions=size(raw, "max_position_embeddings", 131072),
        layers=(layer,) * n_layers,
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields of a network, in the layout of the published checkpoints."""
    return {
        "architectures": ["PhimoeForCausalLM"],
        "model_type": "phimoe",
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
        "rms_norm_eps": config.norm_eps,
        **write_rope(config.rope),
        "sliding_window": config.layers[0].window or None,
        "router_jitter_noise": config.routing.jitter,
        "attention_bias": config.attention_bias,
        "lm_head_bias": config.lm_head_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "router_aux_loss_coef": config.router_aux_coef,
        "max_position_embeddings": config.max_positions,
    }


FAMILY = Family("phimoe", read_config, write_config, TABLE)
