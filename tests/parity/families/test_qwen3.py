"""Dense Qwen3 against transformers."""

from __future__ import annotations

from transformers import Qwen3Config

from tests.parity.families.facts import *  # noqa: F403 - every fact is a test of this file
from tests.parity.families.harness import TINY, Variant

BASE = TINY | dict(
    intermediate_size=40,
    num_key_value_heads=2,
    head_dim=12,
    rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
)


def published() -> Qwen3Config:
    """Qwen3-8B: norms on the heads, untied."""
    return Qwen3Config(**BASE)


def everything() -> Qwen3Config:
    """Windows in the later layers, biases, tied, yarn with a factor and bounds of its own."""
    scaling = dict(
        rope_type="yarn",
        rope_theta=100.0,
        factor=4.0,
        original_max_position_embeddings=64,
        attention_factor=1.3,
        beta_fast=2.0,
        beta_slow=0.5,
    )
    changed = dict(
        num_hidden_layers=4,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=2,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters=scaling,
    )
    return Qwen3Config(**BASE | changed)


VARIANTS = (Variant("published", published), Variant("everything", everything))
