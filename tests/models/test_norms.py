"""Every kind of norm against NumPy in float64, and where it rounds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safemoe_jax.models import ModelConfig
from safemoe_jax.models.norms import model_norm
from safemoe_jax.models.params import bind, flat_state

WIDTH, EPS = 12, 0.3
KINDS = ("rms", "rms_float32", "layer")


def _norm(kind: str, arrays: dict[str, jax.Array]):
    sizes = {"n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 4, "n_experts": 2, "top_k": 1}
    config = ModelConfig(
        family="any", vocab_size=4, d_model=WIDTH, norm_eps=EPS, expert_dim=4, norm=kind, **sizes
    )
    return bind(model_norm(config), arrays)


def _arrays(kind: str, dtype: str) -> dict[str, jax.Array]:
    names = ("scale", "bias") if kind == "layer" else ("scale",)
    draw = np.random.default_rng(0).normal(size=(2, WIDTH))
    return {name: jnp.asarray(value, dtype) for name, value in zip(names, draw, strict=False)}


def _wanted(kind: str, arrays: dict[str, jax.Array], x: np.ndarray) -> np.ndarray:
    arrays = {name: np.asarray(value, np.float64) for name, value in arrays.items()}
    if kind == "layer":
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS)
        return x * arrays["scale"] + arrays["bias"]
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * arrays["scale"]


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind):
    arrays = _arrays(kind, "float32")
    x = np.random.default_rng(1).normal(2.0, 1.0, (3, 5, WIDTH))
    got = _norm(kind, arrays)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, _wanted(kind, arrays, x), rtol=1e-5, atol=1e-5)
    assert set(flat_state(_norm(kind, arrays))) == set(arrays)


@pytest.mark.parametrize("kind", ["rms_float32", "layer"])
def test_bfloat16_is_rounded_once(kind):
    """Scale and bias are applied in float32: the result is the exact value, rounded."""
    arrays = _arrays(kind, "bfloat16")
    x = jnp.asarray(np.random.default_rng(1).normal(size=(200, WIDTH)), jnp.bfloat16)
    got = _norm(kind, arrays)(x)
    wanted = _wanted(kind, arrays, np.asarray(x, np.float64))
    assert got.dtype == jnp.bfloat16
    agree = np.asarray(got) == np.asarray(jnp.asarray(wanted, jnp.float32).astype(jnp.bfloat16))
    assert agree.mean() > 0.999


def test_bfloat16_of_plain_rms_is_rounded_before_the_scale_too():
    arrays = _arrays("rms", "bfloat16")
    x = jnp.asarray(np.random.default_rng(1).normal(size=(200, WIDTH)), jnp.bfloat16)
    x64 = np.asarray(x, np.float64)
    unit = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + EPS)
    rounded = np.asarray(jnp.asarray(unit, jnp.float32).astype(jnp.bfloat16), np.float64)
    wanted = jnp.asarray(rounded * np.asarray(arrays["scale"], np.float64), jnp.float32).astype(jnp.bfloat16)
    agree = np.asarray(_norm("rms", arrays)(x)) == np.asarray(wanted)
    assert agree.mean() > 0.999
    once = np.asarray(_norm("rms_float32", arrays)(x)) == np.asarray(wanted)
    assert once.mean() < 0.95
