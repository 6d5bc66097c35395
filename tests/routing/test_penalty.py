"""The penalty against closed forms and a float64 numpy computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.routing import alignment_penalty, layer_divergence, layer_selection


def router_logits(seed, shape=(3, 5, 8), scale=2.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def numpy_kl(first, second, temperature):
    """KL(softmax(first/t) || softmax(second/t)) over the last axis, float64, by its definition."""
    p, q = (np.exp(np.float64(x) / temperature) for x in (first, second))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return (p * np.log(p / q)).sum(-1)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 1.3])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("reduction", ["sum_layers", "mean_layers"])
def test_value_is_the_definition(temperature, direction, reduction):
    student, reference = router_logits(0), router_logits(1)
    pair = (reference, student) if direction == "forward" else (student, reference)
    kl_LB = numpy_kl(*pair, temperature)
    want = kl_LB.mean(1).sum() if reduction == "sum_layers" else kl_LB.mean()
    penalty = jax.jit(alignment_penalty, static_argnames=("temperature", "direction", "reduction"))
    got = penalty(student, reference, temperature=temperature, direction=direction, reduction=reduction)
    np.testing.assert_allclose(got, want, rtol=2e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradient_is_the_closed_form(direction):
    # d/ds KL(p||q_s) = (q - p)/(tau B); d/ds KL(q_s||p) = q (log q/p - KL(q||p))/(tau B).
    student, reference, tau = router_logits(0), router_logits(1), 0.7
    p, q = (np.exp(np.float64(x) / tau) for x in (reference, student))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    ratio = np.log(q / p)
    want = q - p if direction == "forward" else q * (ratio - (q * ratio).sum(-1, keepdims=True))
    got = jax.grad(alignment_penalty)(student, reference, temperature=tau, direction=direction)
    np.testing.assert_allclose(got, want / (tau * student.shape[1]), rtol=1e-4, atol=1e-7)


def test_reference_is_data():
    reference_gradient = jax.grad(alignment_penalty, argnums=1)(
        router_logits(0), router_logits(1), temperature=0.5
    )
    assert not np.any(reference_gradient)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_zero_at_equality_and_blind_to_a_shift(direction):
    logits = router_logits(2)
    moved = logits + np.float32(3)
    value, gradient = jax.value_and_grad(alignment_penalty)(
        logits, moved, temperature=0.1, direction=direction
    )
    assert abs(value) < 1e-5
    assert np.max(np.abs(gradient)) < 1e-4


def test_high_temperature_limit():
    # For tau -> infinity, KL -> Var_uniform(reference - student) / (2 tau^2).
    student, reference, tau = router_logits(0), router_logits(1), 300.0
    want = (reference - student).var(axis=-1).mean(axis=1).sum() / (2 * tau**2)
    # The value itself is near float32's resolution of 1, so the tolerance is its rounding.
    np.testing.assert_allclose(alignment_penalty(student, reference, temperature=tau), want, rtol=0.05)


def test_low_temperature_limit():
    # For tau -> 0 the reference is one-hot: tau * KL -> max(student) - student[argmax(reference)].
    student, reference = router_logits(0), router_logits(1)
    best = reference.argmax(-1)[..., None]
    gap = student.max(-1) - np.take_along_axis(student, best, -1)[..., 0]
    got = 1e-3 * alignment_penalty(student, reference, temperature=1e-3)
    np.testing.assert_allclose(got, gap.mean(1).sum(), rtol=1e-3)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_logits_stay_finite(direction, scale):
    student, reference = router_logits(0) * np.float32(scale), router_logits(1) * np.float32(scale)
    value, gradient = jax.value_and_grad(alignment_penalty)(
        student, reference, temperature=0.1, direction=direction
    )
    assert np.isfinite(value) and value > 0
    assert np.all(np.isfinite(gradient))


def test_bfloat16_is_computed_in_float32():
    student, reference = (jnp.asarray(router_logits(seed), jnp.bfloat16) for seed in (0, 1))
    want = numpy_kl(np.asarray(reference, np.float32), np.asarray(student, np.float32), 0.1).mean(1).sum()
    got = alignment_penalty(student, reference, temperature=0.1)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_masked_tokens_count_for_nothing_even_when_they_are_nan():
    student, reference = router_logits(0, (2, 3, 4, 8)), router_logits(1, (2, 3, 4, 8))
    mask = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)
    want = numpy_kl(reference, student, 0.3)[:, mask].mean(1).sum()
    student, reference = (np.where(mask[None, ..., None], x, np.nan) for x in (student, reference))
    value, gradient = jax.value_and_grad(alignment_penalty)(
        student, reference, temperature=0.3, token_mask=mask
    )
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert np.all(np.isfinite(gradient))
    assert not np.any(np.asarray(gradient)[:, ~mask])


def test_weighted_mask_and_empty_mask():
    student, reference = router_logits(0), router_logits(1)
    weights = np.array([2.0, 0.5, 0.0, 1.0, 1.5], np.float32)
    want = (numpy_kl(reference, student, 1.0) * weights).sum(1) / weights.sum()
    np.testing.assert_allclose(
        layer_divergence(student, reference, token_mask=weights), want, rtol=2e-5, atol=1e-7
    )
    assert alignment_penalty(student, reference, temperature=1.0, token_mask=np.zeros(5)) == 0


def test_layer_weights_and_subsets():
    student, reference = router_logits(0), router_logits(1)
    kl_L = numpy_kl(reference, student, 0.5).mean(1)
    weights = layer_selection((1, 2, 3), (1, 3))
    np.testing.assert_array_equal(weights, [1, 0, 1])
    np.testing.assert_array_equal(layer_selection((1, 2, 3), (-1,)), [0, 0, 1])
    np.testing.assert_array_equal(layer_selection((1, 2, 3), None), [1, 1, 1])
    for reduction, want in (("sum_layers", kl_L[0] + kl_L[2]), ("mean_layers", (kl_L[0] + kl_L[2]) / 2)):
        got = alignment_penalty(
            student, reference, temperature=0.5, layer_weights=weights, reduction=reduction
        )
        np.testing.assert_allclose(got, want, rtol=2e-5)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"direction": "sideways"}, "direction"),
        ({"reduction": "batchmean"}, "reduction"),
        ({"layer_weights": [1.0]}, "layer_weights"),
        ({"token_mask": np.ones(4)}, "token_mask"),
        ({"reference_logits": router_logits(1, (3, 5, 7))}, "reference_logits"),
        ({"student_logits": router_logits(1, (3, 5))}, "student_logits"),
    ],
)
def test_bad_arguments_are_named(change, where):
    arguments = {"student_logits": router_logits(0), "reference_logits": router_logits(1), "temperature": 1.0}
    with pytest.raises(InputError) as error:
        alignment_penalty(**(arguments | change))
    assert error.value.where == where


@pytest.mark.parametrize("layers", [(), (0,), (-4,), (7, 1)])
def test_layers_without_router_are_refused(layers):
    with pytest.raises(InputError, match="layer"):
        layer_selection((1, 2, 3), layers)
