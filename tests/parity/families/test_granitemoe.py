"""Granite MoE against transformers."""

from __future__ import annotations

from transformers import GraniteMoeConfig

from tests.parity.families.facts import *  # noqa: F403 - every fact is a test of this file
from tests.parity.families.harness import TINY, Variant

BASE = TINY | dict(
    intermediate_size=16,
    num_key_value_heads=2,
    num_local_experts=8,
    num_experts_per_tok=3,
    tie_word_embeddings=True,
    embedding_multiplier=1.5,
    logits_scaling=0.6,
    residual_multiplier=0.7,
    attention_multiplier=0.25,
    rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
)


def published() -> GraniteMoeConfig:
    """Granite-3.0-1b-a400m: all four multipliers, tied."""
    return GraniteMoeConfig(**BASE)


def everything() -> GraniteMoeConfig:
    """Biases, untied, a stretched embedding, and no multiplier."""
    changed = dict(
        attention_bias=True,
        tie_word_embeddings=False,
        embedding_multiplier=1.0,
        logits_scaling=1.0,
        residual_multiplier=1.0,
        attention_multiplier=1.0,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=500.0,
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    )
    return GraniteMoeConfig(**BASE | changed)


VARIANTS = (Variant("published", published), Variant("everything", everything))
