"""DeepSeek-V3 against transformers."""

from __future__ import annotations

from transformers import DeepseekV3Config

from tests.parity.families.facts import *  # noqa: F403 - every fact is a test of this file
from tests.parity.families.harness import Variant
from tests.parity.families.test_deepseek_v2 import BASE, LATENT, LOW_RANK

_YARN = BASE["rope_parameters"] | {"mscale": 1.0, "mscale_all_dim": 1.0}
BASE_V3 = BASE | dict(
    q_lora_rank=14,
    n_shared_experts=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    rope_parameters=_YARN,
)


def published() -> DeepseekV3Config:
    """DeepSeek-V3: low-rank queries, groups scored by their best two, renormalised and scaled, YaRN."""
    return DeepseekV3Config(**BASE_V3, norm_topk_prob=True)


def everything() -> DeepseekV3Config:
    """Every other switch: full queries, biases, no renormalisation, halves rotated, one group, tied."""
    return DeepseekV3Config(
        **BASE_V3
        | dict(
            q_lora_rank=None,
            attention_bias=True,
            norm_topk_prob=False,
            rope_interleave=False,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.3,
            n_shared_experts=2,
            num_hidden_layers=4,
            first_k_dense_replace=2,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
        )
    )


VARIANTS = (Variant("published", published, LOW_RANK), Variant("everything", everything, LATENT))
