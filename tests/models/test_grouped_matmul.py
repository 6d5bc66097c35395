"""The expert kernels against a loop over tokens and experts in NumPy, float64, value and gradients.

Legend: T tokens, K experts a token, D model width, F expert width, E experts, L layers stacked.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.models.expert_blocks import choose_block_rows
from safemoe_jax.models.expert_layout import align, sort_pairs
from safemoe_jax.models.grouped_matmul import KERNELS, choose_kernel, expert_ffn

D, F, E, K, L = 16, 8, 4, 2, 3
LAYER = 1
T = 150  # an expert of all rows is more than a tile of megablox, and blocks of several sizes


def problem(seed: int, tokens: int, dtype: str = "float32") -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    x_TD, weights_TK = normal(tokens, D), rng.uniform(size=(tokens, K)).astype(np.float32)
    experts_TK = np.stack([rng.permutation(E)[:K] for _ in range(tokens)]).astype(np.int32)
    stack = normal(L * E, D, F) / 4, normal(L * E, D, F) / 4, normal(L * E, F, D) / 3
    return (x_TD, weights_TK, experts_TK, *stack)


def by_hand(x, weights, experts, gate, up, down, d_y):
    """The sum over chosen experts, token by token, and its derivatives by the chain rule; float64."""
    x, weights, gate, up, down, d_y = (a.astype(np.float64) for a in (x, weights, gate, up, down, d_y))
    y, d_x, d_weights = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weights)
    d_gate, d_up, d_down = np.zeros_like(gate), np.zeros_like(up), np.zeros_like(down)
    for t, k in np.ndindex(*weights.shape):
        g = LAYER * E + experts[t, k]
        a, b = x[t] @ gate[g], x[t] @ up[g]
        s = 1 / (1 + np.exp(-a))
        h = a * s * b
        y[t] += weights[t, k] * (h @ down[g])
        d_weights[t, k] = d_y[t] @ (h @ down[g])
        d_h = weights[t, k] * (down[g] @ d_y[t])
        d_a, d_b = d_h * b * (s + a * s * (1 - s)), d_h * a * s
        d_x[t] += gate[g] @ d_a + up[g] @ d_b
        d_gate[g] += np.outer(x[t], d_a)
        d_up[g] += np.outer(x[t], d_b)
        d_down[g] += np.outer(h, weights[t, k] * d_y[t])
    return y, (d_x, d_weights, d_gate, d_up, d_down)


@partial(jax.jit, static_argnames=("kernel", "mesh"))
def run(kernel, arrays, d_y, mesh=None):
    """y and the gradients of sum(y * d_y) with respect to everything differentiable."""
    x, weights, experts, *stack = arrays

    def ffn(x, weights, *stack):
        return expert_ffn(
            x, weights, experts, *stack, first_group=LAYER * E, n_experts=E, kernel=kernel, mesh=mesh
        )

    y, pullback = jax.vjp(ffn, x, weights, *stack)
    return y, pullback(jnp.asarray(d_y, y.dtype))


def assert_close(found, expected, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=tolerance * np.abs(b).max(), rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_value_and_every_gradient_match_the_loop_by_hand(kernel):
    arrays = problem(0, tokens=T)
    d_y = np.random.default_rng(1).normal(size=(T, D)).astype(np.float32)
    assert_close(run(kernel, arrays, d_y), by_hand(*arrays, d_y), 2e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_expert_may_get_every_token_and_others_none(kernel):
    arrays = list(problem(2, tokens=T))
    arrays[2] = np.tile(np.array([[3, 1]], np.int32), (T, 1))
    d_y = np.random.default_rng(3).normal(size=(T, D)).astype(np.float32)
    assert_close(run(kernel, arrays, d_y), by_hand(*arrays, d_y), 2e-6)


def test_blocks_are_exact_for_a_single_token_and_for_repeated_experts():
    arrays = list(problem(4, tokens=1))
    arrays[2] = np.array([[2, 2]], np.int32)
    d_y = np.ones((1, D), np.float32)
    # The weight's gradient is one sum that cancels to a tenth of its terms: their rounding counts tenfold.
    assert_close(run("blocks", arrays, d_y), by_hand(*arrays, d_y), 1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_is_as_close_as_its_mantissa_allows(kernel):
    arrays = problem(5, tokens=64)
    rounded = [a if a.dtype == np.int32 else a.astype(jnp.bfloat16) for a in arrays]
    d_y = np.random.default_rng(6).normal(size=(64, D)).astype(np.float32)
    exact = [a if a.dtype == np.int32 else a.astype(np.float32) for a in rounded]
    found = run(kernel, rounded, d_y)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(found))
    assert_close(found, by_hand(*exact, d_y.astype(jnp.bfloat16).astype(np.float32)), 2e-2)


def test_a_group_that_overflows_spoils_only_its_own_tokens():
    arrays = list(problem(7, tokens=T))
    arrays[5] = arrays[5].copy()
    arrays[5][LAYER * E + 2] = np.inf
    y, _ = run("blocks", arrays, np.ones((T, D), np.float32))
    uses_it = (arrays[2] == 2).any(1)
    np.testing.assert_array_equal(np.isfinite(np.asarray(y)).all(1), ~uses_it)


def products(trainable: bool, policy, differentiate: bool = True) -> int:
    """Matrix products of a block in the lowered program of a loss over a rematerialised scan of layers."""
    x, weights, experts, *stack = (jnp.asarray(a) for a in problem(8, tokens=24))

    def loss(x, scale_LD, stack):
        def body(h, layer):
            index, scale = layer
            y = expert_ffn(
                h * scale, weights, experts, *stack, first_group=index * E, n_experts=E, kernel="blocks"
            )
            return h + y, None

        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        return jnp.sum(jax.lax.scan(body, x, (jnp.arange(L), scale_LD))[0] ** 2)

    function = loss
    if differentiate:
        function = jax.grad(loss, argnums=(1, 2) if trainable else 1)
    text = jax.jit(function).lower(x, jnp.ones((L, D)), stack).as_text()
    each, rest = divmod(text.count("stablehlo.dot_general"), len(choose_block_rows(experts.size, E)))
    assert rest == 0
    return each


def test_frozen_weights_get_no_gradient_and_saved_activations_are_not_recomputed():
    saved = jax.checkpoint_policies.save_anything_except_these_names("something_else")
    assert products(trainable=False, policy=saved, differentiate=False) == 3
    assert products(trainable=False, policy=saved) == 3 + 3
    assert products(trainable=True, policy=saved) == 3 + 3 + 3


def test_forward_alone_keeps_no_activations():
    arrays = problem(9, tokens=T)

    def forward(*arrays):
        return expert_ffn(*arrays, first_group=0, n_experts=E, kernel="blocks")

    places = T * K + E * 64  # a row a pair, and each expert's padding
    output, kept = places * D * 4, 2 * places * F * 4
    temporary = jax.jit(forward).lower(*arrays).compile().memory_analysis().temp_size_in_bytes
    assert temporary < output + kept / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stack_of_layers_is_neither_copied_nor_converted(dtype):
    arrays = problem(10, tokens=16)
    wide = [np.tile(a, (1, 8, 8)).astype(jnp.dtype(dtype)) for a in arrays[3:]]
    x = np.tile(arrays[0], (1, 8)).astype(jnp.dtype(dtype))

    def forward(x, weights, experts, *stack):
        return expert_ffn(x, weights, experts, *stack, first_group=4, n_experts=E, kernel="blocks")

    compiled = jax.jit(forward).lower(x, *arrays[1:3], *wide).compile()
    smallest_copy = wide[0].size * 2  # one of the three weight stacks in bfloat16
    assert compiled.memory_analysis().temp_size_in_bytes < smallest_copy


@pytest.mark.parametrize("sizes", [(1,), (8,), (16, 4), (8, 4, 2)])
def test_blocks_cover_every_row_once(sizes):
    experts_TK = np.random.default_rng(11).integers(0, 8, size=(50, 3)).astype(np.int32)
    experts_TK[experts_TK == 5] = 6  # expert 5 gets nothing, and 7 is none of the seven
    layout = jax.jit(lambda experts_TK: align(sort_pairs(experts_TK, 7), sizes))(experts_TK)
    layout = jax.tree.map(np.asarray, layout)
    flat, covered, taken = experts_TK.reshape(-1), [], []
    for rows, blocks in zip(sizes, layout.blocks, strict=True):
        for block in range(int(blocks.in_use)):
            start = int(blocks.start_C[block])
            own = [p for p in range(start, start + rows) if layout.filled_P[p]]
            assert own and {int(flat[layout.pair_P[p]]) for p in own} == {int(blocks.expert_C[block])}
            covered += own
            taken += range(start, start + rows)
    assert len(set(taken)) == len(taken) and layout.pair_P.size - 1 not in taken
    pairs, places = layout.pair_P[covered], layout.place_TK.reshape(-1)
    np.testing.assert_array_equal(np.sort(pairs), np.flatnonzero(flat < 7))
    np.testing.assert_array_equal(places[pairs], covered)
    assert (places[flat == 7] == layout.pair_P.size - 1).all()


def test_block_rows_follow_the_share_of_an_expert():
    assert choose_block_rows(32 * 8, 64) == (8,)  # decoding
    assert choose_block_rows(64 * 8, 64) == (16, 8)
    assert choose_block_rows(256 * 8, 64) == (48, 32, 16)
    assert choose_block_rows(512 * 8, 64) == (96, 64, 32)
    assert choose_block_rows(2048 * 8, 64) == tuple(range(384, 0, -32))  # training
    assert choose_block_rows(9999 * 8, 64) == choose_block_rows(2048 * 8, 64)


@pytest.mark.parametrize("tokens", [1, 7, 33, 64, 100, 256, 512, 777, 1024, 4096])
def test_every_block_size_is_a_multiple_of_the_smallest(tokens):
    sizes = choose_block_rows(tokens * 8, 64)
    assert list(sizes) == sorted(set(sizes), reverse=True)
    assert all(rows % sizes[-1] == 0 for rows in sizes)


def test_kernel_follows_platform_and_size():
    large = {"tokens": 2048, "top_k": 8, "n_experts": 64, "d": 512, "f": 256}
    assert [choose_kernel(platform, **large) for platform in ("cpu", "gpu", "tpu")] == [
        "blocks",
        "ragged",
        "megablox",
    ]
    tiny = {"top_k": 4, "n_experts": 32, "d": 64, "f": 8}
    assert [choose_kernel("cpu", tokens=tokens, **tiny) for tokens in (16, 4096)] == ["dense", "blocks"]
    assert choose_kernel("cpu", tokens=2048, top_k=4, n_experts=4, d=512, f=256) == "dense"
    assert choose_kernel("tpu", tokens=512, top_k=4, n_experts=32, d=64, f=8) == "ragged"


def test_unknown_kernel_is_refused():
    arrays = [jnp.asarray(a) for a in problem(12, tokens=4)]
    with pytest.raises(InputError, match="fastest"):
        expert_ffn(*arrays, first_group=0, n_experts=E, kernel="fastest")
