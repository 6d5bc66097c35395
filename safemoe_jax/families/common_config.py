"""Fields of a `config.json` that most families share, read and written the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safemoe_jax.families.config_fields import read, read_rope, require, size, write_rope
from safemoe_jax.models.config import ModelConfig


def read_decoder(
    raw: Mapping[str, Any],
    *,
    theta: float = 10000.0,
    head_dim: int | None = None,
    max_positions: int = 32768,
) -> dict[str, Any]:
    """Sizes, norm, rotary embedding and the other fields that every decoder has, as `ModelConfig` names them.

    Args:
        raw: the parsed config.json.
        theta, head_dim, max_positions: what the family takes where the config names none; without a head_dim
            it is the model's width divided by the number of heads.

    Raises:
        InputError: a field is missing, malformed or out of range.
    """
    d_model, n_heads = size(raw, "hidden_size"), size(raw, "num_attention_heads")
    n_kv_heads = size(raw, "num_key_value_heads", n_heads)
    require(n_heads % n_kv_heads == 0, "num_key_value_heads", n_kv_heads, f"a divisor of {n_heads}")
    head_dim = size(raw, "head_dim", head_dim)
    if head_dim is None:
        require(
            d_model % n_heads == 0, "hidden_size", d_model, f"a multiple of num_attention_heads ({n_heads})"
        )
        head_dim = d_model // n_heads
    require(head_dim % 2 == 0, "head_dim", head_dim, "an even number, as its halves are rotated")
    activation = read(raw, "hidden_act", str, "silu")
    require(activation == "silu", "hidden_act", activation, "silu")
    return {
        "vocab_size": size(raw, "vocab_size"),
        "d_model": d_model,
        "n_layers": size(raw, "num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": head_dim,
        "norm_eps": read(raw, "rms_norm_eps", float),
        "rope": read_rope(raw, theta),
        "tie_embeddings": read(raw, "tie_word_embeddings", bool, False),
        "initializer_range": read(raw, "initializer_range", float, 0.02),
        "max_positions": size(raw, "max_position_embeddings", max_positions),
    }


def write_decoder(config: ModelConfig) -> dict[str, Any]:
    """What `read_decoder` reads; head_dim only where it does not follow from the other sizes."""
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        **write_rope(config.rope),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "max_position_embeddings": config.max_positions,
    }
    follows = config.n_heads * config.head_dim == config.d_model
    return fields if follows else {**fields, "head_dim": config.head_dim}


def read_experts(raw: Mapping[str, Any], *, width: str, aux: float = 0.001) -> dict[str, Any]:
    """How many experts, how many a token gets, their width, and the auxiliary loss that the config asks for.

    Args:
        raw: the parsed config.json.
        width: the field that holds the inner width of an expert.
        aux: the coefficient where the config names none.

    Raises:
        InputError: a field is missing, malformed or out of range.
    """
    n_experts = size(raw, ("num_experts", "num_local_experts"))
    top_k = size(raw, "num_experts_per_tok")
    require(top_k <= n_experts, "num_experts_per_tok", top_k, f"at most the number of experts ({n_experts})")
    return {
        "n_experts": n_experts,
        "top_k": top_k,
        "expert_dim": size(raw, width),
        "router_aux_coef": read(raw, "router_aux_loss_coef", float, aux),
    }


def read_window(raw: Mapping[str, Any]) -> int:
    """Keys that a sliding layer's query sees: `sliding_window` where `use_sliding_window` says so, else 0.

    Raises:
        InputError: a field is malformed, or the window is switched on and not there.
    """
    return size(raw, "sliding_window") if read(raw, "use_sliding_window", bool, False) else 0


def write_window(config: ModelConfig) -> dict[str, Any]:
    """`use_sliding_window` and `sliding_window` (null where no layer slides)."""
    window = max(layer.window for layer in config.layers)
    return {"use_sliding_window": window > 0, "sliding_window": window or None}
