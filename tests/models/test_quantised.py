"""Quantised weights: bounds that hold for each weight, exact cases, bytes, and one expert at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.models import quantised
from safemoe_jax.models.quantised import take

# Compiled, as networks are rounded: one program a shape in place of one an operation.
quantise_int8 = jax.jit(quantised.quantise_int8)
quantise_int4 = jax.jit(quantised.quantise_int4, static_argnames="block")
dequantise = jax.jit(quantised.dequantise, static_argnames="dtype")

RNG = np.random.default_rng(0)
# Experts and channels of very different sizes: a scale shared between them would show.
SIZES = 10.0 ** RNG.uniform(-3, 1, (3, 1, 16))
WEIGHTS = (RNG.normal(size=(3, 128, 16)) * SIZES).astype(np.float32)


def relative_error(weights, back) -> float:
    """Root mean square of the error over that of the weights, of the worst channel."""
    rms = lambda x: np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=-2))  # noqa: E731
    return float(np.max(rms(np.asarray(back) - weights) / rms(weights)))


def test_int8_moves_no_weight_by_more_than_half_a_step():
    found = quantise_int8(WEIGHTS)
    step = np.abs(WEIGHTS).max(axis=-2, keepdims=True) / 127
    np.testing.assert_allclose(found.scales, step, rtol=1e-6)
    assert np.all(np.abs(dequantise(found) - WEIGHTS) <= step * 0.5001)
    assert 0.002 < relative_error(WEIGHTS, dequantise(found)) < 0.01


@pytest.mark.parametrize(("block", "least", "most"), [(32, 0.06, 0.14), (64, 0.07, 0.16)])
def test_int4_moves_no_weight_by_more_than_half_a_step(block, least, most):
    found = quantise_int4(WEIGHTS, block)
    blocks = WEIGHTS.reshape(3, 128 // block, block, 16)
    step = np.abs(blocks).max(axis=-2, keepdims=True) / 7
    moved = np.abs(np.asarray(dequantise(found)).reshape(blocks.shape) - blocks)
    assert np.all(moved <= step * 0.505)  # the scale itself has 8 bits
    assert least < relative_error(WEIGHTS, dequantise(found)) < most


def test_smaller_blocks_follow_the_weights_more_closely():
    errors = [relative_error(WEIGHTS, dequantise(quantise_int4(WEIGHTS, block))) for block in (32, 64)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    ("quantise", "limit"), [(quantise_int8, 127), (quantise_int4, 7)], ids=["int8", "int4"]
)
def test_weights_on_the_grid_come_back_exactly(quantise, limit):
    whole = RNG.integers(-limit, limit + 1, (2, 64, 5)).astype(np.float32)
    whole[:, ::32] = limit  # each channel and block reaches the end of the grid
    np.testing.assert_array_equal(dequantise(quantise(whole * 0.25)), whole * 0.25)


def test_nothing_stays_nothing():
    zero = np.zeros((2, 32, 4), np.float32)
    for found in (quantise_int8(zero), quantise_int4(zero)):
        np.testing.assert_array_equal(dequantise(found), zero)


def test_an_outlier_harms_its_own_block_only():
    weights = np.full((64, 2), 0.5, np.float32)
    weights[3, 0] = 1000.0
    back = np.asarray(dequantise(quantise_int4(weights, 32)))
    np.testing.assert_allclose(back[32:], 0.5, rtol=2e-2)
    np.testing.assert_allclose(back[:, 1], 0.5, rtol=2e-2)
    assert back[0, 0] == 0.0


def test_where_the_bits_lie():
    weights = np.zeros((32, 1), np.float32)
    weights[:4, 0] = [7, -7, 1, -2]
    packed = np.asarray(quantise_int4(weights).packed)[:, 0]
    assert packed[0] == 15 | (1 << 4) and packed[1] == 9 | (6 << 4)
    assert np.all(packed[2:] == 8 | (8 << 4))


@pytest.mark.parametrize("quantise", [quantise_int8, quantise_int4], ids=["int8", "int4"])
def test_one_expert_is_the_stack_s(quantise):
    found = quantise(WEIGHTS)
    one = jax.jit(lambda stack, index: dequantise(take(stack, index)))(found, 2)
    np.testing.assert_array_equal(one, dequantise(found)[2])
    np.testing.assert_array_equal(one, dequantise(quantise(WEIGHTS[2])))


def test_bytes_of_a_weight():
    def taken(found) -> int:
        return sum(part.nbytes for part in found)

    assert taken(quantise_int8(WEIGHTS)) == WEIGHTS.size + 4 * 3 * 16
    assert taken(quantise_int4(WEIGHTS, 32)) == WEIGHTS.size // 2 + 2 * WEIGHTS.size // 32
    assert taken(quantise_int4(WEIGHTS, 64)) == WEIGHTS.size // 2 + 2 * WEIGHTS.size // 64


def test_bfloat16_is_rounded_once():
    found = quantise_int8(jnp.asarray(WEIGHTS, jnp.bfloat16))
    expected = np.asarray(dequantise(found)).astype(jnp.bfloat16)
    # Operation by operation: a compiler may leave out the roundings between that must not be there.
    back = quantised.dequantise(found, "bfloat16")
    assert back.dtype == jnp.bfloat16
    np.testing.assert_array_equal(back, expected)


@pytest.mark.parametrize(("inputs", "block"), [(48, 32), (64, 16), (96, 64)])
def test_a_block_that_does_not_fit_is_refused(inputs, block):
    with pytest.raises(InputError, match=f"block of {block}"):
        quantise_int4(np.zeros((inputs, 2), np.float32), block)
