"""Mixtral against transformers."""

from __future__ import annotations

from transformers import MixtralConfig

from tests.parity.families.facts import *  # noqa: F403 - every fact is a test of this file
from tests.parity.families.harness import TINY, Variant

BASE = TINY | dict(
    intermediate_size=16,
    num_key_value_heads=2,
    num_local_experts=8,
    num_experts_per_tok=2,
    rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
)


def published() -> MixtralConfig:
    """Mixtral-8x7B: no window."""
    return MixtralConfig(**BASE)


def everything() -> MixtralConfig:
    """A window in every layer, wider heads, three experts a token, tied, a linearly stretched embedding."""
    changed = dict(
        sliding_window=6,
        head_dim=12,
        num_experts_per_tok=3,
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": 500.0, "rope_type": "linear", "factor": 2.5},
    )
    return MixtralConfig(**BASE | changed)


VARIANTS = (Variant("published", published), Variant("everything", everything))
