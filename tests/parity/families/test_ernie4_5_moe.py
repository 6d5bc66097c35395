"""ERNIE 4.5 against transformers."""

from __future__ import annotations

from transformers import Ernie4_5_MoeConfig

from tests.parity.families.facts import *  # noqa: F403 - every fact is a test of this file
from tests.parity.families.harness import Variant

BASE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    moe_num_experts=8,
    moe_k=3,
    moe_num_shared_experts=2,
    moe_layer_start_index=1,
    rms_norm_eps=0.02,
    initializer_range=0.25,
    max_position_embeddings=128,
    pad_token_id=0,
    eos_token_id=None,
    rope_theta=300.0,
)


def published() -> Ernie4_5_MoeConfig:
    """ERNIE-4.5-21B-A3B: a dense first layer, two shared experts, no biases, tied."""
    return Ernie4_5_MoeConfig(**BASE)


def everything() -> Ernie4_5_MoeConfig:
    """Every other switch: biases everywhere, every second layer up to an end, no shared expert, a least sum
    that some tokens fall below, untied."""
    return Ernie4_5_MoeConfig(
        **BASE
        | dict(
            num_hidden_layers=5,
            moe_layer_interval=2,
            moe_layer_end_index=3,
            moe_num_shared_experts=0,
            moe_norm_min=0.6,
            use_bias=True,
            tie_word_embeddings=False,
            head_dim=12,
            rope_parameters={"rope_type": "linear", "rope_theta": 300.0, "factor": 2.0},
        )
    )


def tied_biases() -> Ernie4_5_MoeConfig:
    """Biases of the shared expert, and one of the output projection where the embedding is shared."""
    return Ernie4_5_MoeConfig(**BASE | dict(use_bias=True, moe_num_shared_experts=1, num_hidden_layers=2))


VARIANTS = (
    Variant("published", published),
    Variant("everything", everything),
    Variant("tied_biases", tied_biases),
)
