"""Clamped activation, expert biases, input-weighted experts: every kernel against a loop in NumPy, float64.

Values and directional derivatives are NumPy's; single gradient entries are the dense kernel's, which the
derivatives hold to account.

Legend: T tokens, K experts a token, D model width, F expert width, E experts, L layers stacked.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.models.activation import Activation
from safemoe_jax.models.expert_blocks import choose_block_rows
from safemoe_jax.models.grouped_matmul import KERNELS, expert_ffn

D, F, E, K, L, T = 16, 8, 4, 2, 3, 37
LAYER = 1
LIMIT, ALPHA = 0.8, 1.3  # so low that many values are clamped
VARIANTS = {
    "clamped": {"kind": "clamped", "bias": False, "scale_input": False},
    "bias": {"kind": "silu", "bias": True, "scale_input": False},
    "scaled": {"kind": "silu", "bias": False, "scale_input": True},
    "all": {"kind": "clamped", "bias": True, "scale_input": True},
    "gpt_oss": {"kind": "clamped", "bias": True, "scale_input": False},
}


def problem(seed: int, bias: bool, tokens: int = T) -> tuple[np.ndarray, list[np.ndarray]]:
    """Indices, and the differentiable arrays: x, weights, gate, up, down and perhaps their biases."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    experts_TK = np.stack([rng.permutation(E)[:K] for _ in range(tokens)]).astype(np.int32)
    floats = [normal(tokens, D), rng.uniform(0.2, 1, size=(tokens, K)).astype(np.float32)]
    floats += [normal(L * E, D, F) / 4, normal(L * E, D, F) / 4, normal(L * E, F, D) / 3]
    if bias:
        floats += [normal(L * E, F), normal(L * E, F), normal(L * E, D)]
    return experts_TK, floats


def by_hand(experts_TK, floats, kind: str, scale_input: bool) -> np.ndarray:
    """y, token by token, float64."""
    x, weights, gate, up, down, *biases = (a.astype(np.float64) for a in floats)
    gate_b, up_b, down_b = biases or (np.zeros((L * E, 1)),) * 3
    y = np.zeros_like(x)
    for t, k in np.ndindex(*weights.shape):
        g, w = LAYER * E + experts_TK[t, k], weights[t, k]
        row = x[t] * w if scale_input else x[t]
        a, b = row @ gate[g] + gate_b[g], row @ up[g] + up_b[g]
        if kind == "clamped":
            a, b = np.minimum(a, LIMIT), np.maximum(np.minimum(b, LIMIT), -LIMIT)
            h = (b + 1) * a / (1 + np.exp(-ALPHA * a))
        else:
            h = b * a / (1 + np.exp(-a))
        y[t] += (h @ down[g] + down_b[g]) * (1 if scale_input else w)
    return y


@partial(jax.jit, static_argnames=("kernel", "kind", "scale_input", "mesh"))
def run(kernel, experts_TK, floats, d_y, kind, scale_input, mesh=None):
    """y and the gradients of sum(y * d_y) with respect to every float array."""

    def ffn(x, weights, gate, up, down, *biases):
        return expert_ffn(
            x,
            weights,
            experts_TK,
            gate,
            up,
            down,
            first_group=LAYER * E,
            n_experts=E,
            kernel=kernel,
            mesh=mesh,
            biases=biases or None,
            activation=Activation(kind, LIMIT, ALPHA),
            scale_input=scale_input,
        )

    y, pullback = jax.vjp(ffn, *floats)
    return y, pullback(jnp.asarray(d_y, y.dtype))


def directional(experts_TK, floats, d_y, direction, **variant) -> float:
    """d/dh sum(y * d_y) along one direction, by a central difference in float64."""
    step = 1e-6

    def value(sign):
        moved = [a.astype(np.float64) + sign * step * v for a, v in zip(floats, direction, strict=True)]
        return (by_hand(experts_TK, moved, **variant) * d_y).sum()

    return (value(1) - value(-1)) / (2 * step)


def assert_close(found, expected, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        b = np.asarray(b, np.float64)
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=tolerance * np.abs(b).max(), rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_dense_oracle_matches_the_loop_by_hand_and_its_derivatives(name):
    variant = dict(VARIANTS[name])
    experts, floats = problem(0, variant.pop("bias"))
    rng = np.random.default_rng(1)
    d_y = rng.normal(size=(T, D)).astype(np.float32)
    y, gradients = run("dense", experts, floats, d_y, **variant)
    assert_close(y, by_hand(experts, floats, **variant), 2e-6)
    for i, gradient in enumerate(gradients):
        direction = [np.zeros(a.shape) for a in floats]
        direction[i] = rng.normal(size=floats[i].shape)
        expected = directional(experts, floats, d_y, direction, **variant)
        terms = np.asarray(gradient, np.float64) * direction[i]
        assert np.abs(terms).sum() > 1
        np.testing.assert_allclose(terms.sum(), expected, atol=2e-6 * np.abs(terms).sum(), rtol=0)


# Blocks have a backward pass of their own; JAX differentiates the others, and "gpt_oss" and "all" are every
# part of them: the activation, the biases, weights behind the experts and before them.
@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        *((name, "blocks") for name in VARIANTS),
        *((name, kernel) for name in ("gpt_oss", "all") for kernel in ("ragged", "megablox")),
    ],
)
def test_value_and_every_gradient_match_the_dense_oracle(name, kernel):
    variant = dict(VARIANTS[name])
    experts, floats = problem(2, variant.pop("bias"))
    d_y = np.random.default_rng(3).normal(size=(T, D)).astype(np.float32)
    found, expected = (run(k, experts, floats, d_y, **variant) for k in (kernel, "dense"))
    assert all(np.abs(np.asarray(gradient)).max() > 1e-2 for gradient in expected[1])
    assert_close(found, expected, 3e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_expert_without_tokens_and_tokens_all_on_one(kernel):
    experts, floats = problem(4, bias=True)
    experts = np.tile(np.array([[3, 1]], np.int32), (T, 1))
    variant = {"kind": "clamped", "scale_input": False}
    y, gradients = run(kernel, experts, floats, np.ones((T, D), np.float32), **variant)
    assert_close(y, by_hand(experts, floats, **variant), 2e-6)
    for gradient in gradients[2:]:
        used = np.abs(np.asarray(gradient)).reshape(L * E, -1).max(1) > 0
        np.testing.assert_array_equal(np.flatnonzero(used), [LAYER * E + 1, LAYER * E + 3])


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_is_as_close_as_its_mantissa_allows(kernel):
    experts, floats = problem(5, bias=True)
    d_y = np.random.default_rng(6).normal(size=(T, D)).astype(np.float32)
    rounded = [a.astype(jnp.bfloat16) for a in floats]
    exact = [a.astype(np.float32) for a in rounded]
    variant = {"kind": "silu", "scale_input": False}
    found = run(kernel, experts, rounded, d_y, **variant)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(found))
    expected = run("dense", experts, exact, d_y.astype(jnp.bfloat16).astype(np.float32), **variant)
    assert_close(found, expected, 2e-2)


def test_frozen_biases_cost_one_product_in_the_backward_pass():
    """Three products forward and three back, as without biases, and the bias's part of the weights' own."""
    experts, floats = problem(7, bias=True)
    x, weights, *stack = map(jnp.asarray, floats)

    def products(biases) -> int:
        def loss(x, weights):
            options = {"first_group": 0, "n_experts": E, "kernel": "blocks", "biases": biases}
            return expert_ffn(x, weights, jnp.asarray(experts), *stack[:3], **options).sum()

        return (
            jax.jit(jax.value_and_grad(loss, (0, 1)))
            .lower(x, weights)
            .as_text()
            .count("stablehlo.dot_general")
        )

    sizes = len(choose_block_rows(experts.size, E))
    assert products(None) == 6 * sizes
    assert products(tuple(stack[3:])) == 7 * sizes


def test_unknown_activation_is_refused():
    with pytest.raises(InputError, match="gelu"):
        Activation("gelu")
