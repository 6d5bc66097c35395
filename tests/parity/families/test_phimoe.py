"""Phi-3.5-MoE against transformers, in evaluation mode: in training it draws experts at random."""

from __future__ import annotations

from transformers import PhimoeConfig

from tests.parity.families.facts import *  # noqa: F403 - every fact is a test of this file
from tests.parity.families.harness import Variant

BASE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=8,
    num_experts_per_tok=2,
    rms_norm_eps=0.02,
    max_position_embeddings=128,
    pad_token_id=0,
    eos_token_id=None,
)


def longrope(short: float, long: float, original: int) -> dict:
    return {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "short_factor": [1.0, 1.2, 1.5, 2.0],
        "long_factor": [1.0, 3.0, 9.0, 20.0],
        "short_mscale": short,
        "long_mscale": long,
        "original_max_position_embeddings": original,
        "attention_factor": 9.0,  # phimoe takes the multipliers above in its place
    }


def published() -> PhimoeConfig:
    """Phi-3.5-MoE: biases on the projections and on the output; never past the original context."""
    return PhimoeConfig(
        **BASE,
        initializer_range=0.25,
        rope_parameters=longrope(1.243163, 2.0, 96),
        sliding_window=128,
        attention_bias=True,
        lm_head_bias=True,
        router_jitter_noise=0.01,
    )


def everything() -> PhimoeConfig:
    """Every other switch: no biases, tied, a window, a wide threshold, always past the context."""
    return PhimoeConfig(
        **BASE | dict(num_key_value_heads=4),
        initializer_range=0.25,
        rope_parameters=longrope(2.0, 1.4, 1),
        sliding_window=5,
        tie_word_embeddings=True,
        router_jitter_noise=0.3,
    )


def plain() -> PhimoeConfig:
    """No scaling of the rotary embedding, no window."""
    return PhimoeConfig(
        **BASE,
        initializer_range=0.25,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        router_jitter_noise=0.1,
    )


VARIANTS = (Variant("published", published), Variant("everything", everything), Variant("plain", plain))
