"""OLMoE (`model_type: olmoe`; Muennighoff et al. 2024, arXiv 2409.02060): config.json and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safemoe_jax.families.common_rows import BUFFERS, LAYER, TIED, attention_rows, decoder_rows, expert_rows
from safemoe_jax.families.config_fields import read, read_rope, require, size, write_rope
from safemoe_jax.families.family import Family
from safemoe_jax.families.tensor_table import TensorTable, linear
from safemoe_jax.models.config import ModelConfig

TABLE = TensorTable(
    rows=(
        *decoder_rows(),
        *attention_rows(),
        *linear("moe.router", f"{LAYER}.mlp.gate"),
        *expert_rows(),
    ),
    ignored=BUFFERS,
    tied=TIED,
)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The network that a config.json describes.

    Raises:
        InputError: a field is missing, malformed, or asks for something that OLMoE does not have.
    """
    d_model, n_heads = size(raw, "hidden_size"), size(raw, "num_attention_heads")
    n_experts, top_k = size(raw, ("num_experts", "num_local_experts")), size(raw, "num_experts_per_tok")
    n_kv_heads = size(raw, "num_key_value_heads", n_heads)
    require(d_model % n_heads == 0, "hidden_size", d_model, f"a multiple of num_attention_heads ({n_heads})")
    require(n_heads % n_kv_heads == 0, "num_key_value_heads", n_kv_heads, f"a divisor of {n_heads}")
    require(top_k <= n_experts, "num_experts_per_tok", top_k, f"at most num_experts ({n_experts})")
    activation = read(raw, "hidden_act", str, "silu")
    require(activation == "silu", "hidden_act", activation, "silu")
    return ModelConfig(
        family="olmoe",
        vocab_size=size(raw, "vocab_size"),
        d_model=d_model,
        n_layers=size(raw, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=d_model // n_heads,
        norm_eps=read(raw, "rms_norm_eps", float),
        n_experts=n_experts,
        top_k=top_k,
        expert_dim=size(raw, "intermediate_size"),
        rope=read_rope(raw),
        clip_qkv=read(raw, "clip_qkv", float, None),
        attention_bias=read(raw, "attention_bias", bool, False),
        output_bias=read(raw, "attention_bias", bool, False),
        qk_norm="full",
        norm_topk_prob=read(raw, "norm_topk_prob", bool, False),
        tie_embeddings=read(raw, "tie_word_embeddings", bool, False),
        initializer_range=read(raw, "initializer_range", float, 0.02),
        router_aux_coef=read(raw, "router_aux_loss_coef", float, 0.01),
        max_positions=size(raw, "max_position_embeddings", 4096),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields of a network, in the layout of the published checkpoints."""
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "intermediate_size": config.expert_dim,
        "num_experts": config.n_experts,
        "num_experts_per_tok": config.top_k,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        **write_rope(config.rope),
        "clip_qkv": config.clip_qkv,
        "attention_bias": config.attention_bias,
        "norm_topk_prob": config.norm_topk_prob,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "router_aux_loss_coef": config.router_aux_coef,
        "max_position_embeddings": config.max_positions,
    }


FAMILY = Family("olmoe", read_config, write_config, TABLE)
