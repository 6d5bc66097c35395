"""The form for a few rows an expert, which decoding uses, against loops by hand and against the other form.

Nothing is differentiated here, so that `expert_ffn` takes this form where the number of rows calls for it.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safemoe_jax.models.activation import SILU, Activation
from safemoe_jax.models.adapted import Adapted
from safemoe_jax.models.expert_blocks import blocks_ffn
from safemoe_jax.models.expert_layout import Pairs, sort_pairs
from safemoe_jax.models.expert_slots import few_rows
from safemoe_jax.models.expert_stack import OwnArrays, Stack
from safemoe_jax.models.grouped_matmul import expert_ffn
from safemoe_jax.models.quantised import dense, quantise
from tests.models import test_expert_variants as variants
from tests.models import test_grouped_matmul as plain
from tests.models.test_grouped_matmul import LAYER, D, E, F, K, L, assert_close

IN_PLACE = pytest.mark.parametrize("in_place", [False, True], ids=["stack", "own arrays"])
TOKENS = 10
"""Five rows an expert on average, of its eight slots."""


@partial(jax.jit, static_argnames=("first", "n_experts", "activation", "scale_input", "in_place"))
def values(
    arrays, biases=None, *, first=LAYER * E, n_experts=E, activation=SILU, scale_input=False, in_place=False
):
    """y alone; `in_place`: with each layer's matrices as arrays of their own."""
    by_layer = [stack.reshape(-1, n_experts, *stack.shape[1:]) for stack in arrays[3:]]
    own = OwnArrays(tuple(zip(*by_layer, strict=True)), jnp.int32(first // n_experts)) if in_place else None
    return expert_ffn(
        *arrays, first_group=first, n_experts=n_experts, kernel="blocks", biases=biases,
        activation=activation, scale_input=scale_input, own=own,
    )  # fmt: skip


def test_form_follows_the_rows_of_an_expert():
    def pairs(tokens: int) -> Pairs:
        experts_TK = jax.ShapeDtypeStruct((tokens, K), jnp.int32)
        return jax.eval_shape(lambda experts_TK: sort_pairs(experts_TK, E), experts_TK)

    assert [few_rows(pairs(tokens)) for tokens in (5, 6, TOKENS, 11)] == [False, True, True, False]


@IN_PLACE
@pytest.mark.parametrize("n_experts", [4, 6, 7])
def test_value_matches_the_loop_by_hand(n_experts, in_place):
    """Four, two or one at a time; an expert beyond them counts for nothing."""
    rng = np.random.default_rng(0)
    tokens = 2 * n_experts
    experts_TK = np.stack([rng.permutation(n_experts + 1)[:2] for _ in range(tokens)]).astype(np.int32)
    x_TD, weights_TK = rng.normal(size=(tokens, D)), rng.uniform(size=(tokens, 2))
    gate, up, down = (rng.normal(size=(2 * n_experts, *shape)) / 4 for shape in ((D, F), (D, F), (F, D)))
    wanted_TD = np.zeros((tokens, D))
    for t, k in np.argwhere(experts_TK < n_experts):
        g = n_experts + experts_TK[t, k]
        a = x_TD[t] @ gate[g]
        wanted_TD[t] += weights_TK[t, k] * (a / (1 + np.exp(-a)) * (x_TD[t] @ up[g])) @ down[g]
    floats = [a.astype(np.float32) for a in (x_TD, weights_TK, gate, up, down)]
    found = values(
        [*floats[:2], experts_TK, *floats[2:]], first=n_experts, n_experts=n_experts, in_place=in_place
    )
    assert_close(found, wanted_TD, 2e-6)


@IN_PLACE
def test_an_expert_with_more_rows_than_slots_takes_another_turn(in_place):
    arrays = list(plain.problem(1, tokens=TOKENS))
    arrays[2] = np.tile(np.array([[3, 1]], np.int32), (TOKENS, 1))
    d_y = np.zeros((TOKENS, D), np.float32)
    assert_close(values(arrays, in_place=in_place), plain.by_hand(*arrays, d_y)[0], 2e-6)


@IN_PLACE
def test_an_expert_that_overflows_spoils_only_its_own_tokens(in_place):
    arrays = list(plain.problem(7, tokens=TOKENS))
    arrays[5] = arrays[5].copy()
    arrays[5][LAYER * E + 2] = np.inf
    uses_it = (arrays[2] == 2).any(1)
    assert 0 < uses_it.sum() < TOKENS
    np.testing.assert_array_equal(np.isfinite(values(arrays, in_place=in_place)).all(1), ~uses_it)


@IN_PLACE
@pytest.mark.parametrize("name", variants.VARIANTS)
def test_variants_match_the_loop_by_hand(name, in_place):
    variant = variants.VARIANTS[name]
    # Weighted inputs make each pair a token of its own, which leaves the number of rows as it is.
    experts_TK, floats = variants.problem(0, variant["bias"], TOKENS)
    arrays, biases = [*floats[:2], experts_TK, *floats[2:5]], tuple(floats[5:]) or None
    activation = Activation(variant["kind"], variants.LIMIT, variants.ALPHA)
    form = {"scale_input": variant["scale_input"], "in_place": in_place}
    found = values(arrays, biases, activation=activation, **form)
    wanted = variants.by_hand(experts_TK, floats, variant["kind"], variant["scale_input"])
    assert_close(found, wanted, 2e-6)


def test_bfloat16_is_as_close_as_its_mantissa_allows():
    arrays = plain.problem(5, tokens=TOKENS)
    rounded = [a if a.dtype == np.int32 else a.astype(jnp.bfloat16) for a in arrays]
    exact = [a if a.dtype == np.int32 else a.astype(np.float32) for a in rounded]
    found = values(rounded)
    assert found.dtype == jnp.bfloat16
    assert_close(found, plain.by_hand(*exact, np.zeros((TOKENS, D), np.float32))[0], 2e-2)


@pytest.mark.parametrize("quantisation", ["int8", "int4"])
def test_rounded_and_adapted_weights_count_as_their_sums(quantisation):
    """Gate rounded, up rounded with an update, down in floats with an update."""
    rng = np.random.default_rng(3)
    normal = lambda *shape: np.float32(rng.normal(size=shape) / 4)  # noqa: E731
    gate, up, down = normal(L * E, 32, 64), normal(L * E, 32, 64), normal(L * E, 64, 32)
    a_up, b_up, a_down, b_down = normal(E, 32, 2), normal(E, 2, 64), normal(E, 64, 2), normal(E, 2, 32)
    gate, up = (jax.jit(quantise, static_argnums=1)(weight, quantisation) for weight in (gate, up))
    _, weights_TK, experts_TK, *_ = map(jnp.asarray, plain.problem(4, tokens=TOKENS))
    stack = Stack(gate, Adapted(up, a_up, b_up), Adapted(down, a_down, b_down))
    layer = slice(LAYER * E, LAYER * E + E)  # factors are those of the layer, bases those of all layers
    gate_sum, up_sum = (np.array(jax.jit(dense, static_argnums=1)(w, "float32")) for w in (gate, up))
    up_sum[layer] += a_up @ b_up
    down_sum = down.copy()
    down_sum[layer] += a_down @ b_down
    x_TD, activation = jnp.asarray(normal(TOKENS, 32)), Activation()

    def run(stack: Stack) -> jax.Array:
        return blocks_ffn(x_TD, weights_TK, experts_TK, stack, LAYER * E, E, activation)

    # What is differentiated takes the loop over blocks.
    with_gradients = jax.jit(lambda sums: jax.vjp(run, sums)[0])(Stack(gate_sum, up_sum, down_sum))
    np.testing.assert_allclose(jax.jit(run)(stack), with_gradients, atol=1e-5)


def test_adapted_matrices_in_place_count_as_their_sums():
    x_TD, weights_TK, experts_TK, gate, up, down = map(jnp.asarray, plain.problem(6, tokens=TOKENS))
    rng, layer = np.random.default_rng(6), slice(LAYER * E, LAYER * E + E)
    normal = lambda *shape: np.float32(rng.normal(size=shape) / 4)  # noqa: E731
    factors = [
        (normal(E, D, 2), normal(E, 2, F)),
        (normal(E, D, 2), normal(E, 2, F)),
        (normal(E, F, 2), normal(E, 2, D)),
    ]
    bases = gate, up, down
    sums = [base.at[layer].add(a @ b) for base, (a, b) in zip(bases, factors, strict=True)]
    own = OwnArrays(tuple(zip(*(base.reshape(L, E, *base.shape[1:]) for base in bases), strict=True)), LAYER)
    adapted = Stack(*(Adapted(base, *ab) for base, ab in zip(bases, factors, strict=True)))

    @jax.jit
    def run(stack: Stack, own: OwnArrays | None) -> jax.Array:
        return blocks_ffn(x_TD, weights_TK, experts_TK, stack, LAYER * E, E, SILU, own)

    assert_close(run(adapted, own), run(Stack(*sums), None), 2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stack_of_layers_is_neither_copied_nor_converted(dtype):
    x_TD, weights_TK, experts_TK, *stack = plain.problem(10, tokens=TOKENS)
    wide = [np.tile(w, (16, 8, 8)).astype(jnp.dtype(dtype)) for w in stack]

    def forward(x, weights, experts, *stack):
        return expert_ffn(x, weights, experts, *stack, first_group=4, n_experts=E, kernel="blocks")

    x_TD = np.tile(x_TD, (1, 8)).astype(jnp.dtype(dtype))
    compiled = jax.jit(forward).lower(x_TD, weights_TK, experts_TK, *wide).compile()
    smallest_copy = wide[0].size * 2  # one of the three weight stacks in bfloat16
    assert compiled.memory_analysis().temp_size_in_bytes < smallest_copy
