"""gpt-oss against transformers, in its bfloat16 layout; MXFP4 is in test_published_layouts_parity."""

from __future__ import annotations

from transformers import GptOssConfig

from tests.parity.families.facts import *  # noqa: F403 - every fact is a test of this file
from tests.parity.families.harness import Variant

BASE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=8,
    num_experts_per_tok=4,
    sliding_window=5,
    rms_norm_eps=0.02,
    max_position_embeddings=128,
    pad_token_id=0,
    eos_token_id=None,
)


def published() -> GptOssConfig:
    """gpt-oss-20b: biases and sinks, windows on every other layer, yarn whose range is not rounded."""
    yarn = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}
    yarn |= {"truncate": False, "original_max_position_embeddings": 16}
    return GptOssConfig(**BASE, initializer_range=0.25, rope_parameters=yarn)


def everything() -> GptOssConfig:
    """Every other switch: other windows, no biases, tied, a clamp and a slope of its own, a rounded range."""
    yarn = {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.5}
    yarn |= {"truncate": True, "original_max_position_embeddings": 24, "attention_factor": 1.3}
    return GptOssConfig(
        **BASE | dict(num_key_value_heads=4, num_experts_per_tok=2, sliding_window=7, head_dim=8),
        initializer_range=0.3,
        rope_parameters=yarn,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        attention_bias=False,
        tie_word_embeddings=True,
        swiglu_limit=0.9,
        swiglu_alpha=1.1,
    )


VARIANTS = (Variant("published", published), Variant("everything", everything))
