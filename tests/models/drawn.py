"""Parameters drawn with NumPy: drawing each shape with JAX would compile a program for it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from safemoe_jax.models import ModelConfig, declare


def draw_params(
    config: ModelConfig, seed: int = 0, *, stddev: float = 0.4, vectors: float = 0.0, updates: float = 0.0
) -> dict[str, jax.Array]:
    """Every parameter in float32: random kernels, zeros and ones where the declaration says so.

    Args:
        config: the network, with its adapters.
        seed: of the generator.
        stddev: of kernels and of the first factors of adapters.
        vectors: of what is added to everything below two axes a layer (norms, biases, sinks).
        updates: of the second factors of adapters.
    """
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, spec in sorted(declare(config).items()):
        start, spread = {"zeros": (0.0, 0.0), "ones": (1.0, 0.0)}.get(spec.init, (0.0, stddev))
        spread = updates if name.endswith("lora_b") else spread
        spread = np.hypot(spread, vectors) if len(spec.shape) < 3 else spread
        drawn[name] = jnp.asarray(start + spread * rng.normal(size=spec.shape), jnp.float32)
    return drawn
