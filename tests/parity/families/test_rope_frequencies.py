"""Rotary frequencies and multipliers against transformers' set-up functions, at published values too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, PhimoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

from safemoe_jax.models import RopeConfig
from safemoe_jax.models.rope import inverse_frequencies, multipliers, rotary_tables

PUBLISHED = {
    "gpt-oss-20b": (
        64,
        150000.0,
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
    "DeepSeek-V2-Lite": (
        64,
        10000.0,
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    ),
    "Qwen3 with yarn": (
        128,
        1e6,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "unequal mscales": (
        32,
        1000.0,
        {
            "rope_type": "yarn",
            "factor": 7.0,
            "mscale": 0.9,
            "mscale_all_dim": 0.2,
            "original_max_position_embeddings": 100,
        },
    ),
    "Llama-3.1-8B": (
        128,
        5e5,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "Llama-4-Scout": (
        128,
        5e5,
        {
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "linear": (32, 1e4, {"rope_type": "linear", "factor": 3.0}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_and_multiplier(name):
    dim, theta, fields = PUBLISHED[name]
    theirs = LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        head_dim=dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": theta, **fields},
    )
    frequencies, multiplier = ROPE_INIT_FUNCTIONS[fields["rope_type"]](theirs)
    renamed = {"rope_type": "kind", "original_max_position_embeddings": "original_max_positions"}
    ours = RopeConfig(theta=theta, **{renamed.get(k, k): v for k, v in fields.items()})
    np.testing.assert_allclose(inverse_frequencies(ours, dim), frequencies.numpy(), rtol=2e-6)
    assert multipliers(ours) == pytest.approx((multiplier, multiplier), rel=1e-6)


@pytest.mark.parametrize("length", [8, 9])
def test_phimoe_tables_up_to_and_past_the_original_context(length):
    dim = 8
    short, long = [1.0, 1.5, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]
    theirs = PhimoeConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": short,
            "long_factor": long,
            "short_mscale": 1.243163,
            "long_mscale": 1.5,
            "original_max_position_embeddings": 8,
        },
    )
    positions = np.arange(length)[None]
    cos, sin = PhimoeRotaryEmbedding(theirs)(torch.zeros(1), torch.as_tensor(positions))
    ours = RopeConfig(
        kind="longrope",
        short_factor=tuple(short),
        long_factor=tuple(long),
        short_mscale=1.243163,
        long_mscale=1.5,
        original_max_positions=8,
    )
    got = rotary_tables(ours, dim, positions)
    np.testing.assert_allclose(got[0], cos[..., : dim // 2], atol=1e-6)
    np.testing.assert_allclose(got[1], sin[..., : dim // 2], atol=1e-6)
