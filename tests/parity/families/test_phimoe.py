"""Phi-3.5-MoE against transformers, in evaluation mode: in training it draws experts at random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PhimoeConfig

from safemoe_jax.evaluation.generate import generate
from safemoe_jax.model import load_pretrained
from tests.parity.families.facts import *  # noqa: F403 - every fact is a test of this file
from tests.parity.families.harness import Variant, build

BASE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=8,
    num_experts_per_tok=2,
    rms_norm_eps=0.02,
    max_position_embeddings=128,
    pad_token_id=0,
    eos_token_id=None,
)


def longrope(short: float, long: float, original: int) -> dict:
    return {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "short_factor": [1.0, 1.2, 1.5, 2.0],
        "long_factor": [1.0, 3.0, 9.0, 20.0],
        "short_mscale": short,
        "long_mscale": long,
        "original_max_position_embeddings": original,
        "attention_factor": 9.0,  # phimoe takes the multipliers above in its place
    }


def published() -> PhimoeConfig:
    """Phi-3.5-MoE: biases on the projections and on the output; never past the original context."""
    return PhimoeConfig(
        **BASE,
        initializer_range=0.25,
        rope_parameters=longrope(1.243163, 2.0, 96),
        sliding_window=128,
        attention_bias=True,
        lm_head_bias=True,
        router_jitter_noise=0.01,
    )


def everything() -> PhimoeConfig:
    """Every other switch: no biases, tied, a window, a wide threshold, always past the context."""
    return PhimoeConfig(
        **BASE | dict(num_key_value_heads=4),
        initializer_range=0.25,
        rope_parameters=longrope(2.0, 1.4, 1),
        sliding_window=5,
        tie_word_embeddings=True,
        router_jitter_noise=0.3,
    )


def plain() -> PhimoeConfig:
    """No scaling of the rotary embedding, no window."""
    return PhimoeConfig(
        **BASE,
        initializer_range=0.25,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        router_jitter_noise=0.1,
    )


def switching() -> PhimoeConfig:
    """Unequal multipliers, which change at the original context of 20 tokens."""
    return PhimoeConfig(**BASE, initializer_range=0.25, rope_parameters=longrope(0.7, 2.0, 20))


@pytest.mark.parametrize("lengths", [(22, 18, 9), (18, 9, 12)], ids=["before", "while decoding"])
def test_the_longest_row_of_a_batch_decides_every_rows_multiplier(lengths, tmp_path):
    """As transformers on a left-padded batch; by itself a short row keeps the short multiplier for longer.

    Where a batch passes the original context while decoding, phimoe's `generate` computes its cache anew with
    the long multiplier. Here the cache stays: the answers are those of transformers told to keep its own.
    """
    theirs, prompts, kept = clear_answers(lengths)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    options = dict(max_new_tokens=8, stop_tokens=())
    np.testing.assert_array_equal(generate(ours, prompts, **options), kept)
    assert generate(ours, prompts[-1:], **options)[0] != kept[-1].tolist()
    theirs.config.original_max_position_embeddings = 20
    anew, _ = their_answers(theirs, prompts)
    same = 8 if max(lengths) > 20 else 20 - max(lengths) + 1
    np.testing.assert_array_equal(anew[:, :same], kept[:, :same])
    assert same == 8 or (anew[:, same:] != kept[:, same:]).any()


def clear_answers(lengths):
    """A model that keeps its cache, prompts, and its answers to them as one batch.

    The first seed whose answers have margins, and differ from that of the last row by itself.
    """
    for seed in range(40):
        theirs, rng = build(switching(), seed), np.random.default_rng(seed)
        del theirs.config.original_max_position_embeddings  # by this field it knows when to compute anew
        prompts = [rng.integers(1, BASE["vocab_size"], n).astype(np.int32) for n in lengths]
        (together, margin), (alone, _) = (their_answers(theirs, rows) for rows in (prompts, prompts[-1:]))
        if margin > 2e-3 and (together[-1] != alone[0]).any():
            return theirs, prompts, together
    raise AssertionError("no seed keeps the margins")


def their_answers(theirs, prompts):
    """Greedy answers [B, 8] to one left-padded batch, and the least margin of a token."""
    width = max(map(len, prompts))
    ids = torch.tensor(np.stack([np.pad(row, (width - len(row), 0)) for row in prompts]), dtype=torch.long)
    options = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_scores=True)
    out = theirs.generate(ids, attention_mask=(ids > 0).long(), **options)
    best = torch.stack(out.scores).topk(2, dim=-1).values
    return out.sequences[:, width:].numpy(), (best[..., 0] - best[..., 1]).min()


VARIANTS = (Variant("published", published), Variant("everything", everything), Variant("plain", plain))
