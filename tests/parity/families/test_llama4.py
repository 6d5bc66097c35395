"""Llama 4's text model against transformers: with experts, with every second layer dense, and all dense."""

from __future__ import annotations

from transformers import Llama4TextConfig

from tests.parity.families.facts import *  # noqa: F403 - every fact is a test of this file
from tests.parity.families.harness import Variant

BASE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=16,
    intermediate_size_mlp=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=8,
    num_experts_per_tok=1,
    attention_chunk_size=6,
    floor_scale=3,
    attn_scale=0.5,
    rms_norm_eps=0.02,
    initializer_range=0.25,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)


def llama3(low: float, high: float) -> dict:
    scaling = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 16.0, "low_freq_factor": low}
    return scaling | {"high_freq_factor": high, "original_max_position_embeddings": 16}


def published() -> Llama4TextConfig:
    """Scout: experts in every layer, every fourth layer without rotation and with tuned temperature."""
    return Llama4TextConfig(**BASE, rope_parameters=llama3(1.0, 1.0))


def everything() -> Llama4TextConfig:
    """Maverick's dense layers, and every other switch: biases, no norm of q and k, tied, two experts."""
    return Llama4TextConfig(
        **BASE | dict(num_experts_per_tok=2, num_key_value_heads=4),
        rope_parameters=llama3(0.5, 2.0),
        interleave_moe_layer_step=2,
        no_rope_layers=[1, 0, 0, 1],
        layer_types=["chunked_attention", "full_attention", "chunked_attention", "full_attention"],
        use_qk_norm=False,
        attention_bias=True,
        tie_word_embeddings=True,
    )


def dense() -> Llama4TextConfig:
    """Llama Guard 4: no experts; here without tuned temperature and without scaling of the rotation."""
    plain = {"rope_type": "default", "rope_theta": 100.0}
    return Llama4TextConfig(**BASE, rope_parameters=plain, moe_layers=[], attn_temperature_tuning=False)


VARIANTS = (
    Variant("published", published),
    Variant("everything", everything),
    Variant("dense", dense),
)
