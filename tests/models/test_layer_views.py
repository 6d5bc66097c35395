"""Views of the expert stacks: the same memory, only where they are of use, and what decoding reads."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from safemoe_jax.models import Compute, LayerConfig, Weights, decode_step, prefill
from safemoe_jax.models.layer_views import with_layer_views
from safemoe_jax.models.params import cast
from safemoe_jax.parallel.mesh import MeshConfig, make_mesh
from tests.models.drawn import draw_params
from tests.models.test_decoder import PLAIN

# Two segments: two repeats of the first three layers, then one of a dense layer.
KINDS = ("moe", "dense", "moe", "moe", "dense", "moe", "dense")
CONFIG = replace(PLAIN, n_layers=7, layers=tuple(map(LayerConfig, KINDS)), n_experts=4, expert_bias=True)
COMPUTE = Compute(experts="blocks")
STACKS = ("gate", "up", "down")
ROWS, PROMPT = 8, 5
"""Four rows an expert and at most eight, which is what its slots hold."""


def views(weights: Weights, compute: Compute = COMPUTE) -> Weights:
    return with_layer_views(CONFIG, weights, compute)


def test_views_lie_in_the_stacks():
    """Every layer's matrices, at their place in memory: the weights are never held twice."""
    weights = Weights.of(draw_params(CONFIG))
    viewed = views(weights)
    wanted = {name for name in weights.frozen if name.endswith(tuple(f"moe.experts.{m}" for m in STACKS))}
    assert set(viewed.layers) == wanted
    assert viewed.frozen is weights.frozen
    for name, layers in viewed.layers.items():
        stack = weights.frozen[name]
        start, size = stack.unsafe_buffer_pointer(), stack.nbytes // len(stack)
        assert [layer.unsafe_buffer_pointer() for layer in layers] == [
            start + r * size for r in range(len(stack))
        ]
        np.testing.assert_array_equal(np.stack(layers), stack)


def test_weights_placed_on_a_mesh_of_one_device_are_viewed_too():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = {
        name: jax.device_put(value, NamedSharding(mesh, P())) for name, value in draw_params(CONFIG).items()
    }
    name, layers = next(iter(views(Weights.of(params), replace(COMPUTE, mesh=mesh)).layers.items()))
    assert layers[0].unsafe_buffer_pointer() == params[name].unsafe_buffer_pointer()


@pytest.mark.parametrize(
    ("dtype", "compute"),
    [("bfloat16", COMPUTE), ("float32", replace(COMPUTE, dtype="bfloat16"))],
    ids=["weights", "activations"],
)
def test_weights_that_each_product_converts_have_no_views(dtype, compute):
    assert views(Weights.of(cast(draw_params(CONFIG), dtype)), compute).layers == {}


def test_a_stack_whose_layers_begin_anywhere_has_no_views():
    """XLA would copy them: matrices of 4 x 5 numbers are no multiple of 64 bytes."""
    config = replace(CONFIG, d_model=5, n_experts=1, top_k=1, expert_dim=5, head_dim=2)
    assert with_layer_views(config, Weights.of(draw_params(config)), COMPUTE).layers == {}


def test_decoding_reads_the_views_and_gives_the_same():
    """In stacks of NaN nothing would be right; the prompts are run on the stacks alone."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (ROWS, PROMPT)).astype(np.int32)
    weights = Weights.of(draw_params(CONFIG, vectors=0.3))
    spoilt = {name: jnp.full_like(weights.frozen[name], jnp.nan) for name in views(weights).layers}
    viewed = views(weights)._replace(frozen=weights.frozen | spoilt)
    _, cache = jax.jit(
        lambda weights, tokens: prefill(
            CONFIG, weights, tokens, jnp.ones_like(tokens), cache_length=PROMPT + 1, compute=COMPUTE
        )
    )(weights, tokens)

    @jax.jit
    def step(weights: Weights) -> jax.Array:
        position, valid = jnp.full(ROWS, PROMPT, jnp.int32), jnp.ones((ROWS, PROMPT + 1), bool)
        return decode_step(
            CONFIG, weights, tokens[:, 0], position, jnp.int32(PROMPT), cache, valid_BS=valid, compute=COMPUTE
        )[0]

    np.testing.assert_allclose(step(viewed), step(weights), rtol=1e-5, atol=1e-5)
    assert np.isnan(step(viewed._replace(layers={}))).all()
