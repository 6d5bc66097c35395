"""A random model of two layers, small enough that every test on it takes a moment."""

from types import SimpleNamespace

import jax
import numpy as np

from safemoe_jax.models import Compute, ModelConfig, declare, initialise

CONFIG = ModelConfig(
    family="olmoe",
    vocab_size=24,
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=4,
    norm_eps=1e-5,
    n_experts=4,
    top_k=2,
    expert_dim=8,
)


def small_model(seed=0, config=CONFIG):
    """What generation and read-out use of a model: config, params, compute and a name."""
    params = initialise(declare(config), jax.random.key(seed), stddev=0.5)
    return SimpleNamespace(
        config=config, params=params, compute=Compute(), name=f"random {seed}", path=None, hf_config={}
    )


def random_prompts(lengths, seed=0, vocab_size=CONFIG.vocab_size):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length).astype(np.int32) for length in lengths]
