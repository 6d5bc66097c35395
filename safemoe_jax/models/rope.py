"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its context extensions.

Frequencies and the multiplier of cosine and sine are numbers of the config, computed once in numpy.
Legend: B rows, T positions, N heads, H head width, P = (rotated width) / 2 pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from safemoe_jax.errors import InputError
from safemoe_jax.models.config import RopeConfig

Tables = tuple[jax.Array, jax.Array]


def rotary_tables(
    config: RopeConfig, head_dim: int, positions_BT: jax.Array, length: jax.Array | None = None
) -> Tables:
    """Cosines and sines for every position, times the config's multiplier.

    Args:
        config: frequencies and scaling.
        head_dim: H; all of it is rotated unless config.dim says otherwise.
        positions_BT: int32 positions.
        length: int32 scalar, the longest sequence of the batch, padding not counted; by default the largest
            position plus one. Longrope with unequal multipliers takes the long one for all rows once the
            longest is past the original context, as transformers does: there a row's values depend on the
            rows beside it.

    Returns:
        cos and sin, float32 [B, T, P].

    Raises:
        InputError: the config's kind is unknown or lacks a field that the kind needs.
    """
    angles = positions_BT[..., None].astype(jnp.float32) * inverse_frequencies(config, head_dim)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    short, long = multipliers(config)
    if short == long:
        return (cos, sin) if short == 1.0 else (cos * short, sin * short)
    length = jnp.max(positions_BT) + 1 if length is None else length
    multiplier = jnp.where(length > _original_max_positions(config), long, short)
    return cos * multiplier, sin * multiplier


def rotate(x_BTNH: jax.Array, tables: Tables, *, interleaved: bool = False) -> jax.Array:
    """Rotates the leading 2P numbers of every head by its position's angles, in float32.

    Args:
        x_BTNH: queries or keys; numbers from 2P on pass unchanged.
        tables: as `rotary_tables` gives them.
        interleaved: pairs are (2i, 2i + 1), not (i, i + P).
    """
    cos, sin = (table[:, :, None, :] for table in tables)
    width = 2 * cos.shape[-1]
    x32_BTNH = x_BTNH[..., :width].astype(jnp.float32)
    if interleaved:
        first, second = x32_BTNH[..., 0::2], x32_BTNH[..., 1::2]
    else:
        first, second = jnp.split(x32_BTNH, 2, axis=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        rotated = jnp.stack(pair, axis=-1).reshape(x32_BTNH.shape)
    else:
        rotated = jnp.concatenate(pair, axis=-1)
    rotated = rotated.astype(x_BTNH.dtype)
    if width == x_BTNH.shape[-1]:
        return rotated
    return jnp.concatenate([rotated, x_BTNH[..., width:]], axis=-1)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians a position of every pair, float32 [P].

    Raises:
        InputError: the config's kind is unknown or lacks a field that the kind needs.
    """
    kinds: dict[str, Callable[[RopeConfig, int], np.ndarray]] = {
        "default": _default,
        "linear": lambda config, dim: _default(config, dim) / np.float32(config.factor),
        "yarn": _yarn,
        "llama3": _llama3,
        "longrope": _longrope,
    }
    if config.kind not in kinds:
        raise InputError(
            f"rotary embedding of kind {config.kind!r}", where="rope", expected="one of " + ", ".join(kinds)
        )
    return kinds[config.kind](config, config.dim or head_dim).astype(np.float32)


def multipliers(config: RopeConfig) -> tuple[float, float]:
    """Factors of cosine and sine up to the original context length, and past it."""
    if config.kind == "yarn":
        factor = config.attention_factor
        factor = _yarn_attention_factor(config) if factor is None else factor
        return factor, factor
    if config.kind == "longrope":
        by_length = _longrope_attention_factor(config)
        short = by_length if config.short_mscale is None else config.short_mscale
        return short, by_length if config.long_mscale is None else config.long_mscale
    return 1.0, 1.0


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature for an extension by `factor` (Peng et al. 2023, arXiv 2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _default(config: RopeConfig, dim: int) -> np.ndarray:
    return config.theta ** -(np.arange(0, dim, 2, dtype=np.float32) / dim)


def _yarn(config: RopeConfig, dim: int) -> np.ndarray:
    """Fast pairs keep their frequency, slow ones are divided by the factor, a ramp joins the two."""
    original = _original_max_positions(config)

    def pair_of(rotations: float) -> float:
        """The (fractional) pair that turns this often within the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_of(config.beta_fast), pair_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    slow = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / width, 0, 1)
    fast_frequency = _default(config, dim)
    return fast_frequency / config.factor * slow + fast_frequency * (1 - slow)


def _yarn_attention_factor(config: RopeConfig) -> float:
    if config.mscale and config.mscale_all_dim:
        return yarn_mscale(config.factor, config.mscale) / yarn_mscale(config.factor, config.mscale_all_dim)
    return yarn_mscale(config.factor)


def _llama3(config: RopeConfig, dim: int) -> np.ndarray:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended."""
    original = _original_max_positions(config)
    frequency = _default(config, dim)
    turns = original * frequency / (2 * math.pi)
    stretched = frequency / config.factor
    span = config.high_freq_factor - config.low_freq_factor
    # Equal bounds (published for Llama 4 Scout) leave nothing between them to blend.
    blend = (turns - config.low_freq_factor) / (span if span else 1.0)
    blended = (1 - blend) * stretched + blend * frequency
    kept_or_blended = np.where(turns > config.high_freq_factor, frequency, blended)
    return np.where(turns < config.low_freq_factor, stretched, kept_or_blended)


def _longrope(config: RopeConfig, dim: int) -> np.ndarray:
    """Frequencies divided by one factor a pair: the short ones at every length, as transformers computes
    phimoe; past the original context only the multiplier changes."""
    factors = np.asarray(config.short_factor, np.float32)
    if factors.shape != (dim // 2,):
        raise InputError(
            f"longrope has {factors.size} short factors", where="rope", expected=f"{dim // 2}, one a pair"
        )
    return _default(config, dim) / factors


def _longrope_attention_factor(config: RopeConfig) -> float:
    if config.attention_factor is not None:
        return config.attention_factor
    if config.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(config.factor) / math.log(_original_max_positions(config)))


def _original_max_positions(config: RopeConfig) -> int:
    if config.original_max_positions is None:
        raise InputError(
            f"rotary embedding of kind {config.kind!r} without original_max_positions",
            where="rope",
            expected="the context length before the extension",
        )
    return config.original_max_positions
