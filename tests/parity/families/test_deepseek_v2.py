"""DeepSeek-V2 against transformers."""

from __future__ import annotations

from transformers import DeepseekV2Config

from tests.parity.families.facts import *  # noqa: F403 - every fact is a test of this file
from tests.parity.families.facts import peft_round_trip
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
    kv_lora_rank=12,
    q_lora_rank=None,
    qk_nope_head_dim=10,
    qk_rope_head_dim=8,
    v_head_dim=6,
    rms_norm_eps=0.02,
    initializer_range=0.25,
    max_position_embeddings=128,
    pad_token_id=0,
    eos_token_id=None,
    rope_parameters={
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
)
LATENT = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
LOW_RANK = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


def published() -> DeepseekV2Config:
    """DeepSeek-V2-Lite: a full query projection, greedy choice, YaRN, one dense layer, two shared experts."""
    return DeepseekV2Config(**BASE)


def everything() -> DeepseekV2Config:
    """Every other switch: DeepSeek-V2's low-rank queries and groups, biases, scale, unequal mscales, tied."""
    return DeepseekV2Config(
        **BASE
        | dict(
            q_lora_rank=14,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.7,
            attention_bias=True,
            mlp_bias=True,
            n_shared_experts=1,
            num_hidden_layers=4,
            first_k_dense_replace=2,
            tie_word_embeddings=True,
            norm_topk_prob=True,
            rope_parameters=BASE["rope_parameters"] | {"mscale": 1.3, "mscale_all_dim": 0.6},
        )
    )


def plain() -> DeepseekV2Config:
    """No dense layer, no rotary scaling."""
    return DeepseekV2Config(**BASE | dict(first_k_dense_replace=0, num_hidden_layers=2, rope_parameters=None))


def test_peft_loads_adapters_on_the_default_targets(pair, tmp_path):
    """A run that names no target adapts what makes queries, keys and values, and PEFT loads the result."""
    queries = LOW_RANK[:2] if pair.theirs.config.q_lora_rank else LATENT[:1]
    adapted = peft_round_trip(pair, None, tmp_path / "adapter")
    assert set(adapted.peft_config["default"].target_modules) == {*queries, "kv_a_proj_with_mqa", "kv_b_proj"}


VARIANTS = (
    Variant("published", published, LATENT),
    Variant("everything", everything, LOW_RANK),
    Variant("plain", plain, LATENT),
)
