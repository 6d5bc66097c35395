"""Rotary frequencies against their formulas, pair by pair; rotation against complex numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.models import RopeConfig
from safemoe_jax.models.rope import inverse_frequencies, multipliers, rotary_tables, rotate

DIM = 16
YARN = RopeConfig(
    theta=5000.0, kind="yarn", factor=8.0, original_max_positions=64, beta_fast=12.0, beta_slow=1.5
)
LLAMA3 = RopeConfig(
    theta=5e5,
    kind="llama3",
    factor=8.0,
    original_max_positions=512,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)
LONGROPE = RopeConfig(
    theta=1e4,
    kind="longrope",
    original_max_positions=10,
    short_factor=tuple(1.0 + 0.25 * i for i in range(DIM // 2)),
    long_factor=(9.0,) * (DIM // 2),
    short_mscale=1.25,
    long_mscale=1.5,
)


def _plain(theta: float, i: int, dim: int = DIM) -> float:
    return theta ** (-2 * i / dim)


def test_default_and_linear_frequencies():
    got = inverse_frequencies(RopeConfig(theta=300.0), DIM)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [_plain(300.0, i) for i in range(DIM // 2)], rtol=1e-6)
    linear = inverse_frequencies(RopeConfig(theta=300.0, kind="linear", factor=4.0), DIM)
    np.testing.assert_allclose(linear, got / 4, rtol=1e-6)
    part = inverse_frequencies(RopeConfig(theta=300.0, dim=6), DIM)
    np.testing.assert_allclose(part, [_plain(300.0, i, 6) for i in range(3)], rtol=1e-6)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_keeps_fast_pairs_and_stretches_slow_ones(truncate):
    config = replace(YARN, truncate=truncate)

    def bound(turns: float) -> float:
        # Pair i turns original * theta^(-2i / dim) / (2 pi) times; solved for i.
        return DIM / 2 * math.log(64 / (2 * math.pi * turns)) / math.log(5000.0)

    low, high = bound(12.0), bound(1.5)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low = max(low, 0)
    wanted = []
    for i in range(DIM // 2):
        stretch = min(max((i - low) / (high - low), 0), 1)
        wanted.append(_plain(5000.0, i) * (1 - stretch) + _plain(5000.0, i) / 8 * stretch)
    np.testing.assert_allclose(inverse_frequencies(config, DIM), wanted, rtol=1e-5)


def test_truncation_shows():
    differ = inverse_frequencies(YARN, DIM) / inverse_frequencies(replace(YARN, truncate=False), DIM)
    assert np.abs(differ - 1).max() > 0.01


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, 0.1 * math.log(8) + 1),
        ({"factor": 0.5}, 1.0),
        ({"attention_factor": 1.7}, 1.7),
        ({"mscale": 0.7, "mscale_all_dim": 0.3}, (0.07 * math.log(8) + 1) / (0.03 * math.log(8) + 1)),
        ({"mscale": 0.7, "mscale_all_dim": 0.7}, 1.0),
        ({"mscale": 0.7}, 0.1 * math.log(8) + 1),
    ],
)
def test_yarn_multiplies_cosine_and_sine(fields, wanted):
    config = replace(YARN, **fields)
    assert multipliers(config) == pytest.approx((wanted, wanted))
    cos, sin = rotary_tables(config, DIM, jnp.arange(5)[None])
    np.testing.assert_allclose(np.square(cos) + np.square(sin), wanted**2, rtol=1e-5)


def test_the_published_multiplier_of_gpt_oss():
    config = RopeConfig(theta=150000.0, kind="yarn", factor=32.0, original_max_positions=4096, truncate=False)
    assert multipliers(config)[0] == pytest.approx(1.34657, abs=1e-5)


def test_llama3_by_wavelength():
    wanted = []
    for i in range(DIM // 2):
        wavelength = 2 * math.pi / _plain(5e5, i)
        if wavelength < 512 / 4:
            wanted.append(_plain(5e5, i))
        elif wavelength > 512:
            wanted.append(_plain(5e5, i) / 8)
        else:
            share = (512 / wavelength - 1) / (4 - 1)
            wanted.append((1 - share) * _plain(5e5, i) / 8 + share * _plain(5e5, i))
    assert any(w not in (_plain(5e5, i), _plain(5e5, i) / 8) for i, w in enumerate(wanted))
    np.testing.assert_allclose(inverse_frequencies(LLAMA3, DIM), wanted, rtol=1e-5)


def test_llama3_with_equal_bounds_has_no_blend():
    """Published for Llama 4 Scout: low = high = 1."""
    got = inverse_frequencies(replace(LLAMA3, high_freq_factor=1.0), DIM)
    plain = np.array([_plain(5e5, i) for i in range(DIM // 2)])
    np.testing.assert_allclose(got, np.where(2 * math.pi / plain > 512, plain / 8, plain), rtol=1e-5)


def test_longrope_switches_its_multiplier_with_the_longest_sequence_and_keeps_its_frequencies():
    wanted = [_plain(1e4, i) / (1 + 0.25 * i) for i in range(DIM // 2)]
    np.testing.assert_allclose(inverse_frequencies(LONGROPE, DIM), wanted, rtol=1e-6)
    angles = np.arange(4)[:, None] * np.asarray(wanted)
    for longest, multiplier in ((10, 1.25), (11, 1.5)):
        cos, sin = rotary_tables(LONGROPE, DIM, jnp.arange(4)[None], jnp.int32(longest))
        np.testing.assert_allclose(cos[0], np.cos(angles) * multiplier, atol=1e-5)
        np.testing.assert_allclose(sin[0], np.sin(angles) * multiplier, atol=1e-5)
    by_positions = rotary_tables(LONGROPE, DIM, jnp.arange(11)[None])[0]
    np.testing.assert_allclose(by_positions[0, 0], 1.5, rtol=1e-6)


def test_longrope_without_its_own_multipliers():
    config = replace(LONGROPE, short_mscale=None, long_mscale=None, factor=16.0)
    assert multipliers(config) == pytest.approx((math.sqrt(1 + math.log(16) / math.log(10)),) * 2)
    assert multipliers(replace(config, attention_factor=1.1)) == (1.1, 1.1)
    assert multipliers(replace(config, factor=1.0)) == (1.0, 1.0)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [None, 6])
def test_rotation_is_multiplication_by_a_complex_number(interleaved, dim):
    config = RopeConfig(theta=50.0, dim=dim, interleaved=interleaved)
    width = dim or DIM
    x = np.random.default_rng(0).normal(size=(2, 5, 3, DIM)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 1, 900, 3]])
    got = rotate(jnp.asarray(x), rotary_tables(config, DIM, jnp.asarray(positions)), interleaved=interleaved)
    for i in range(width // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + width // 2)
        turn = np.exp(1j * positions * _plain(50.0, i, width))[..., None]
        wanted = (x[..., a] + 1j * x[..., b]) * turn
        np.testing.assert_allclose(got[..., a], wanted.real, atol=2e-4)
        np.testing.assert_allclose(got[..., b], wanted.imag, atol=2e-4)
    np.testing.assert_array_equal(got[..., width:], x[..., width:])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RopeConfig(kind="dynamic"), "rotary embedding of kind 'dynamic'"),
        (replace(YARN, original_max_positions=None), "without original_max_positions"),
        (replace(LLAMA3, original_max_positions=None), "without original_max_positions"),
        (replace(LONGROPE, short_factor=(1.0,)), "1 short factors"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(config, message):
    with pytest.raises(InputError, match=message):
        inverse_frequencies(config, DIM)
