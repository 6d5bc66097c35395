"""The losses on the router against loops over tokens and closed forms, and their limits."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from safemoe_jax.routing.auxiliary import load_balancing_loss, z_loss


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


def test_even_load_gives_top_k():
    """Each token names its own experts, all equally often, with probabilities that average out."""
    logits = np.tile(np.eye(6, dtype=np.float32), (2, 1, 1, 1)) + np.tile(np.eye(6, k=1), (2, 1, 1, 1)) * 0.5
    logits[:, :, 5, 0] = 0.5
    assert float(load_balancing_loss(logits, np.ones((1, 6)), top_k=2)) == pytest.approx(2.0, rel=1e-6)


def test_a_network_without_routers_has_no_router_loss():
    logits = np.zeros((0, 2, 4, 8), np.float32)
    mask = np.ones((2, 4))
    assert float(load_balancing_loss(logits, mask, top_k=2)) == float(z_loss(logits, mask)) == 0.0


@pytest.mark.parametrize("level", [0.0, -3.0, 30.0])
def test_z_loss_of_equal_logits(level: float):
    logits = np.full((3, 2, 5, 8), level, np.float32)
    closed_form = (level + np.log(8)) ** 2
    assert float(z_loss(logits, np.ones((2, 5)))) == pytest.approx(closed_form, rel=1e-6)


def test_z_loss_is_the_mean_over_real_tokens_and_layers():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 2, 5, 6), scale=4).astype(np.float32)
    mask = np.array([[1, 1, 2, 0, 0], [1, 1, 1, 1, 0]])
    squares = np.log(np.exp(logits.astype(np.float64)).sum(-1)) ** 2
    expected = squares[:, mask != 0].mean()
    assert float(z_loss(logits, mask)) == pytest.approx(expected, rel=1e-6)
    changed = np.where(mask[None, ..., None] == 0, 100.0, logits).astype(np.float32)
    assert float(z_loss(changed, mask)) == pytest.approx(expected, rel=1e-6)


def test_gradient_of_z_loss():
    """d/dx_e = 2 logsumexp(x) softmax(x)_e / tokens."""
    logits = np.random.default_rng(1).normal(size=(2, 1, 3, 4)).astype(np.float32)
    x = np.exp(logits.astype(np.float64))
    total = x.sum(-1, keepdims=True)
    gradient = jax.grad(lambda x: z_loss(x, np.ones((1, 3))))(logits)
    np.testing.assert_allclose(gradient, 2 * np.log(total) * x / total / 6, rtol=1e-5)


def test_bfloat16_logits_are_summed_in_float32():
    logits = np.full((1, 1, 300, 4), 1.0, np.float32)
    rounded = jax.numpy.asarray(logits, jax.numpy.bfloat16)
    assert z_loss(rounded, np.ones((1, 300))).dtype == np.float32
    assert float(z_loss(rounded, np.ones((1, 300)))) == pytest.approx((1 + np.log(4)) ** 2, rel=1e-6)
