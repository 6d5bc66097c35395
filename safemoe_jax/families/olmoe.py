"""OLMoE (`model_type: olmoe`; Muennighoff et al. 2024, arXiv 2409.02060): config.json and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safemoe_jax.errors import InputError
from safemoe_jax.families.config_fields import read, rope_theta, size
from safemoe_jax.families.family import Family
from safemoe_jax.families.tensor_table import TensorTable, expert, linear, same
from safemoe_jax.models.config import ModelConfig, RopeConfig

_LAYER = "model.layers.{layer}"
_FUSED_GATE_UP = f"{_LAYER}.mlp.experts.gate_up_proj"
_FUSED_DOWN = f"{_LAYER}.mlp.experts.down_proj"

TABLE = TensorTable(
    rows=(
        same("embed.embedding", "model.embed_tokens.weight"),
        same("input_norm.scale", f"{_LAYER}.input_layernorm.weight"),
        *linear("attention.q_proj", f"{_LAYER}.self_attn.q_proj"),
        *linear("attention.k_proj", f"{_LAYER}.self_attn.k_proj"),
        *linear("attention.v_proj", f"{_LAYER}.self_attn.v_proj"),
        *linear("attention.o_proj", f"{_LAYER}.self_attn.o_proj"),
        same("attention.q_norm.scale", f"{_LAYER}.self_attn.q_norm.weight"),
        same("attention.k_norm.scale", f"{_LAYER}.self_attn.k_norm.weight"),
        same("post_attention_norm.scale", f"{_LAYER}.post_attention_layernorm.weight"),
        *linear("moe.router", f"{_LAYER}.mlp.gate"),
        expert(
            "moe.experts.gate",
            f"{_LAYER}.mlp.experts.{{expert}}.gate_proj.weight",
            _FUSED_GATE_UP,
            part=(0, 2),
        ),
        expert(
            "moe.experts.up", f"{_LAYER}.mlp.experts.{{expert}}.up_proj.weight", _FUSED_GATE_UP, part=(1, 2)
        ),
        expert("moe.experts.down", f"{_LAYER}.mlp.experts.{{expert}}.down_proj.weight", _FUSED_DOWN),
        same("final_norm.scale", "model.norm.weight"),
        *linear("lm_head", "lm_head"),
    ),
    ignored=(r".*\.rotary_emb\.inv_freq",),
    tied={"lm_head.weight": "model.embed_tokens.weight"},
)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The network that a config.json describes.

    Raises:
        InputError: a field is missing, malformed, or asks for something that OLMoE does not have.
    """
    d_model, n_heads = size(raw, "hidden_size"), size(raw, "num_attention_heads")
    n_experts, top_k = size(raw, ("num_experts", "num_local_experts")), size(raw, "num_experts_per_tok")
    n_kv_heads = size(raw, "num_key_value_heads", n_heads)
    _require(d_model % n_heads == 0, "hidden_size", d_model, f"a multiple of num_attention_heads ({n_heads})")
    _require(n_heads % n_kv_heads == 0, "num_key_value_heads", n_kv_heads, f"a divisor of {n_heads}")
    _require(top_k <= n_experts, "num_experts_per_tok", top_k, f"at most num_experts ({n_experts})")
    activation = read(raw, "hidden_act", str, "silu")
    _require(activation == "silu", "hidden_act", activation, "silu")
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
        rope=RopeConfig(theta=rope_theta(raw, 10000.0)),
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
        "rope_theta": config.rope.theta,
        "rope_scaling": None,
        "clip_qkv": config.clip_qkv,
        "attention_bias": config.attention_bias,
        "norm_topk_prob": config.norm_topk_prob,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "router_aux_loss_coef": config.router_aux_coef,
        "max_position_embeddings": config.max_positions,
    }


def _require(condition: bool, field: str, value: object, expected: str) -> None:
    if not condition:
        raise InputError(f"field '{field}' is {value!r}", where="config.json", expected=expected)


FAMILY = Family("olmoe", read_config, write_config, TABLE)
