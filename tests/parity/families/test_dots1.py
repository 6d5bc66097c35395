"""dots.llm1 against transformers."""

from __future__ import annotations

from transformers import Dots1Config

from tests.parity.families.facts import *  # noqa: F403 - every fact is a test of this file
from tests.parity.families.harness import Variant

BASE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_shared_experts=2,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    rms_norm_eps=0.02,
    initializer_range=0.25,
    max_position_embeddings=128,
    pad_token_id=0,
    eos_token_id=None,
    sliding_window=None,
    rope_parameters={"rope_type": "default", "rope_theta": 300.0},
)


def published() -> Dots1Config:
    """dots.llm1: norms of q and k, a dense first layer, two shared experts, no window."""
    return Dots1Config(**BASE)


def everything() -> Dots1Config:
    """Every other switch: fewer key heads of their own width, windows, groups, biases, YaRN, tied."""
    return Dots1Config(
        **BASE
        | dict(
            num_hidden_layers=4,
            num_key_value_heads=2,
            head_dim=12,
            first_k_dense_replace=0,
            sliding_window=7,
            max_window_layers=2,
            n_group=4,
            topk_group=2,
            norm_topk_prob=False,
            routed_scaling_factor=1.3,
            n_shared_experts=1,
            attention_bias=True,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 300.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4.0,
            },
        )
    )


def mixed() -> Dots1Config:
    """Windows on layers that the config lists one by one."""
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    return Dots1Config(**BASE | dict(sliding_window=5, layer_types=types))


VARIANTS = (Variant("published", published), Variant("everything", everything), Variant("mixed", mixed))
