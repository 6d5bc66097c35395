"""The load-balancing loss against a loop over tokens, and its limits."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from safemoe_jax.routing.auxiliary import load_balancing_loss


def by_loop(logits: np.ndarray, mask: np.ndarray, top_k: int) -> float:
    """Counts and mean probabilities, token by token."""
    layers, rows, length, experts = logits.shape
    chosen, probability, tokens = np.zeros(experts), np.zeros(experts), 0
    for layer in range(layers):
        for row in range(rows):
            for column in range(length):
                if mask[row, column]:
                    x = np.exp(logits[layer, row, column].astype(np.float64))
                    probability += x / x.sum()
                    chosen[np.argsort(-x)[:top_k]] += 1
                    tokens += 1
    return float(experts * np.sum(chosen / tokens * probability / tokens))


def test_equals_a_loop_over_tokens_and_ignores_padding():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 2, 5, 6)).astype(np.float32)
    mask = np.array([[1, 1, 2, 0, 0], [1, 1, 1, 1, 0]])
    ours = float(load_balancing_loss(logits, mask, top_k=2))
    assert ours == pytest.approx(by_loop(logits, mask, 2), rel=1e-5)
    changed = np.where(mask[None, ..., None] == 0, 100.0, logits).astype(np.float32)
    assert float(load_balancing_loss(changed, mask, top_k=2)) == pytest.approx(ours, rel=1e-6)


def test_one_expert_for_all_tokens_is_the_worst_load():
    logits = np.zeros((1, 1, 4, 8), np.float32)
    logits[..., 3] = 50.0
    assert float(load_balancing_loss(logits, np.ones((1, 4)), top_k=1)) == pytest.approx(8.0, rel=1e-5)


def test_its_gradient_lowers_the_crowded_expert():
    logits = np.zeros((1, 1, 4, 8), np.float32)
    logits[..., 3] = 1.0
    gradient = jax.grad(lambda x: load_balancing_loss(x, np.ones((1, 4)), top_k=1))(logits)
    assert np.all(gradient[..., 3] > 0)
    assert np.all(np.delete(gradient, 3, axis=-1) < 0)
