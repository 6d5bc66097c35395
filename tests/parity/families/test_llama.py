"""Dense Llama against transformers."""

from __future__ import annotations

from transformers import LlamaConfig

from tests.parity.families.facts import *  # noqa: F403 - every fact is a test of this file
from tests.parity.families.harness import TINY, Variant

BASE = TINY | dict(
    intermediate_size=40,
    num_key_value_heads=2,
    rope_parameters=dict(
        rope_type="llama3",
        rope_theta=500.0,  # so that a pair of these narrow heads lies between the bounds
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
)


def published() -> LlamaConfig:
    """Llama-Guard-3-8B: grouped heads, llama3 scaling, untied."""
    return LlamaConfig(**BASE)


def everything() -> LlamaConfig:
    """Biases everywhere, wider heads, tied, yarn."""
    scaling = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16)
    return LlamaConfig(
        **BASE
        | dict(
            attention_bias=True, mlp_bias=True, head_dim=12, tie_word_embeddings=True, rope_parameters=scaling
        )
    )


VARIANTS = (Variant("published", published), Variant("everything", everything))
