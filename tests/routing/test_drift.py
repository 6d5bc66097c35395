"""Drift, overlap and override against set arithmetic and numpy."""

import jax
import numpy as np
import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.routing import at_last_token, drift, last_token_mask, make_override, top_k_overlap


def router_logits(seed, shape):
    return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)


def test_drift_of_two_experts_is_the_binary_divergence():
    # With logits (log p, log (1-p)) the KL is p log p/q + (1-p) log (1-p)/(1-q).
    p, q = np.array([[0.9], [0.5]]), np.array([[0.2], [0.5]])
    as_logits = lambda x: np.log(np.stack([x, 1 - x], -1)).astype(np.float32)  # noqa: E731
    want = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))[:, 0]
    np.testing.assert_allclose(jax.jit(drift)(as_logits(q), as_logits(p)), want, rtol=1e-5, atol=1e-7)


def chosen(logits, top_k):
    return np.argsort(-logits, axis=-1)[..., :top_k]


def test_overlap_is_the_jaccard_index_of_the_chosen_sets():
    student, reference = (chosen(router_logits(seed, (3, 4, 5, 8)), 3) for seed in (0, 1))
    mask = np.random.default_rng(2).random((4, 5)) < 0.6
    want = np.zeros(3)
    for layer in range(3):
        scores = []
        for row, column in zip(*np.nonzero(mask), strict=True):
            here, there = set(student[layer, row, column]), set(reference[layer, row, column])
            scores.append(len(here & there) / len(here | there))
        want[layer] = np.mean(scores)
    np.testing.assert_allclose(top_k_overlap(student, reference, token_mask=mask), want, rtol=1e-6)
    np.testing.assert_array_equal(top_k_overlap(student, reference, token_mask=np.zeros((4, 5))), 0)


def test_overlap_extremes():
    logits = router_logits(0, (2, 3, 6))
    here = chosen(logits, 3)
    np.testing.assert_allclose(top_k_overlap(here, here[..., ::-1]), 1.0)
    np.testing.assert_allclose(top_k_overlap(here, chosen(-logits, 3)), 0.0)
    with pytest.raises(InputError, match="experts chosen"):
        top_k_overlap(here, here[..., :2])


def test_override_places():
    attention = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    last = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]], bool)
    np.testing.assert_array_equal(last_token_mask(attention), last)
    forced = router_logits(0, (2, 4, 4, 3))
    np.testing.assert_array_equal(make_override(forced, attention, "last_token").mask, last)
    np.testing.assert_array_equal(make_override(forced, attention, "prompt").mask, attention.astype(bool))
    with pytest.raises(InputError, match="everywhere"):
        make_override(forced, attention, "everywhere")


def test_value_at_last_token():
    values = router_logits(0, (2, 4, 3))
    attention = np.array([[1, 1, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(at_last_token(values, attention), values[[0, 1], [1, 3]])
