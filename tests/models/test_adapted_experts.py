"""Experts with adapters: the function and gradients of base + update, without keeping the sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safemoe_jax.models import Compute, LoraConfig, ModelConfig, Weights, declare, forward, split_trainable
from safemoe_jax.models.adapted import Adapted, AnyWeight
from safemoe_jax.models.expert_stack import Stack
from safemoe_jax.models.grouped_matmul import expert_ffn
from safemoe_jax.models.lora import EXPERT_TARGETS, add_adapters
from safemoe_jax.models.quantisation import quantise_params
from safemoe_jax.models.quantised import Quantised, dense, quantise

N, K, E, D, F, R = 12, 2, 4, 32, 64, 3  # tokens, chosen experts, experts, widths, rank
WIDE = ModelConfig(
    family="olmoe", vocab_size=64, d_model=256, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=64,
    norm_eps=1e-3, n_experts=32, top_k=2, expert_dim=256, qk_norm="full",
)  # fmt: skip
ONE_LAYER = 3 * 32 * 256 * 256 * 4
"""Bytes of the experts of one layer of it in float32."""


rounded = jax.jit(quantise, static_argnums=1)


@cache
def draw_layer(
    adapted: tuple[str, ...], method: str | None, biased: bool, n_tokens: int = N
) -> tuple[jax.Array, Stack]:
    """Tokens [N, D], and experts of which those named have an update."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32)  # noqa: E731

    def weight(name: str, inputs: int, outputs: int) -> AnyWeight:
        base, a, b = draw(E, inputs, outputs), draw(E, inputs, R), draw(E, R, outputs)
        base = base if method is None else rounded(base, method)
        return Adapted(base, a, b) if name in adapted else base

    weights = weight("gate", D, F), weight("up", D, F), weight("down", F, D)
    biases = (draw(E, F), draw(E, F), draw(E, D)) if biased else ()
    return draw(n_tokens, D), Stack(*weights, *biases)


def added(weight: AnyWeight | None) -> jax.Array | None:
    """The sum, taken where JAX differentiates it."""
    if isinstance(weight, Adapted):
        return added(weight.base) + weight.a_XIr @ weight.b_XrO
    return dense(weight, jnp.float32) if isinstance(weight, Quantised) else weight


def close(got: object, wanted: object) -> None:
    """Every array to 1e-4 of the largest number wanted in it."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()), got, wanted
    )


def value_and_gradients(kernel: str, x_ND: jax.Array, stack: Stack, keep_sum: bool) -> tuple:
    """The output, and gradients of the tokens, the combine weights and every float part of the stack."""
    rng = np.random.default_rng(1)
    weights_NK = rng.uniform(size=(len(x_ND), K)).astype(np.float32)
    experts_NK = rng.integers(0, E - 1, weights_NK.shape, np.int32)  # the last expert gets no token
    parts, structure = jax.tree.flatten(stack, is_leaf=lambda part: isinstance(part, Quantised))
    trains = [not isinstance(part, Quantised) for part in parts]

    def loss(trained: list, x_ND: jax.Array, weights_NK: jax.Array) -> tuple[jax.Array, jax.Array]:
        rest = iter(trained)
        joined = [next(rest) if t else part for t, part in zip(trains, parts, strict=True)]
        stack = Stack(*jax.tree.unflatten(structure, joined))
        gate, up, down, *biases = map(added, stack) if keep_sum else stack
        y_ND = expert_ffn(
            x_ND, weights_NK, experts_NK, gate, up, down, first_group=0, n_experts=E, kernel=kernel,
            biases=None if biases[0] is None else tuple(biases),
        )  # fmt: skip
        return jnp.square(y_ND).sum(), y_ND

    trained = [part for t, part in zip(trains, parts, strict=True) if t]
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(trained, x_ND, weights_NK)


@cache
def of_the_sum(*layer: object) -> tuple:
    """What every kernel is held to: the dense one on sums that JAX differentiates."""
    return value_and_gradients("dense", *draw_layer(*layer), keep_sum=True)


ALL = ("gate", "up", "down")


# Blocks have rules of their own for every case; the other kernels multiply each weight by itself, by one rule
# for all of them, so that they share the cases. Only in the last does an expert have blocks of two sizes.
@pytest.mark.parametrize(
    ("kernel", "adapted", "method", "biased", "n_tokens"),
    [
        *((kernel, ALL, None, True, N) for kernel in ("blocks", "ragged", "megablox")),
        *((kernel, ("gate", "up"), None, False, N) for kernel in ("blocks", "megablox")),
        *((kernel, ("down",), None, False, N) for kernel in ("blocks", "ragged")),
        *((kernel, ALL, "int8", False, 2 * N) for kernel in ("blocks", "dense")),
    ],
)
def test_value_and_gradients_are_those_of_the_sum(kernel, adapted, method, biased, n_tokens):
    layer = adapted, method, biased, n_tokens
    wanted = of_the_sum(*layer)
    assert all(np.any(value != 0) for value in jax.tree.leaves(wanted))
    close(value_and_gradients(kernel, *draw_layer(*layer), keep_sum=False), wanted)


@partial(jax.jit, static_argnames=("kernel", "first_group", "keep_sum"))
def factors_value_and_gradients(
    factors: list, bases: list, biases: tuple, x_ND: jax.Array, kernel: str, first_group: int, keep_sum: bool
) -> tuple:
    """The loss and the gradients of the factors, all else frozen."""

    def loss(factors: list) -> jax.Array:
        weights = [Adapted(base, *parts) for base, parts in zip(bases, factors, strict=True)]
        weights = map(added, weights) if keep_sum else weights
        experts_NK = jnp.arange(N * K).reshape(N, K) % E
        y_ND = expert_ffn(
            x_ND, jnp.full((N, K), 0.5), experts_NK, *weights, n_experts=E, first_group=first_group,
            kernel=kernel, biases=biases,
        )  # fmt: skip
        return jnp.square(y_ND).sum()

    return jax.value_and_grad(loss)(factors)


@cache
def factors_of_the_sum(method: str | None) -> tuple:
    """The dense kernel on the sums of the layer alone."""
    x_ND, stack = draw_layer(ALL, method, biased=True)
    bases, factors = zip(*((weight.base, weight[1:]) for weight in stack[:3]), strict=True)
    return factors_value_and_gradients(factors, bases, stack[3:], x_ND, "dense", 0, keep_sum=True)


# The other kernels slice the layer out by one rule before they differ: each method once is enough for them.
@pytest.mark.parametrize(
    ("kernel", "method"),
    [
        *(("blocks", method) for method in (None, "int8", "int4")),
        ("megablox", None), ("dense", "int8"), ("ragged", "int4"),
    ],
)  # fmt: skip
def test_factors_of_one_layer_on_the_frozen_stack_of_all(kernel, method):
    """The layer's part of the stack counts, whatever else the stack holds."""
    x_ND, stack = draw_layer(ALL, method, biased=True)

    def of_all(own: jax.Array) -> jax.Array:
        other = np.roll(own, 1, axis=0)
        return jnp.asarray(np.concatenate([other, own, other]))

    bases, factors = zip(*((weight.base, weight[1:]) for weight in stack[:3]), strict=True)
    bases, biases = jax.tree.map(of_all, (bases, stack[3:]))
    got = factors_value_and_gradients(factors, bases, biases, x_ND, kernel, E, keep_sum=False)
    close(got, factors_of_the_sum(method))


def temporaries(
    n_layers: int,
    kernel: str,
    targets: tuple[str, ...],
    method: str | None,
    n_tokens: int = 16,
    transform: Callable = jax.grad,
) -> int:
    """Bytes of the temporaries of the compiled loss, transformed: by default its gradient in the adapters."""
    plain = replace(WIDE, n_layers=n_layers, layers=())
    config = replace(plain, lora=LoraConfig(2, targets=targets), quantisation=method)
    abstract = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in declare(plain).items()}

    def make(params: dict) -> Weights:
        base, params = (plain, params) if method is None else quantise_params(plain, params, method)
        return split_trainable(*add_adapters(base, params, config.lora, jax.random.key(0)))

    def loss(trainable: dict, frozen: dict) -> jax.Array:
        tokens, compute = jnp.zeros((1, n_tokens), jnp.int32), Compute(experts=kernel)
        return jnp.square(forward(config, Weights(frozen, trainable), tokens, compute=compute).logits).mean()

    weights = jax.eval_shape(make, abstract)
    compiled = jax.jit(transform(loss)).lower(weights.trainable, weights.frozen).compile()
    return compiled.memory_analysis().temp_size_in_bytes


# 16 tokens of 2 experts each: what the pass of one layer takes is a small part of what 64 layers would keep.
@pytest.mark.parametrize(
    ("kernel", "targets", "method"),
    [
        *((kernel, tuple(EXPERT_TARGETS), None) for kernel in ("ragged", "megablox")),
        ("ragged", ("mlp.experts.down_proj",), None),
        ("ragged", ("mlp.experts.gate_up_proj",), "int8"),
    ],
)
def test_a_layer_more_keeps_no_sum_for_the_backward_pass(kernel, targets, method):
    """A layer costs activations and gradients of factors: here less than an eighth of its experts."""
    assert temporaries(64, kernel, targets, method) / 64 < ONE_LAYER / 8


@pytest.mark.parametrize(
    ("n_tokens", "transform", "targets", "method"),
    [
        *((16, jax.grad, tuple(EXPERT_TARGETS), method) for method in (None, "int4")),
        (16, jax.grad, ("mlp.experts.gate_up_proj",), "int8"),
        *((64, lambda loss: loss, tuple(EXPERT_TARGETS), method) for method in (None, "int8", "int4")),
    ],
    ids=lambda value: "decoding" if value == 64 else "step" if value == 16 else None,
)
def test_blocks_never_hold_the_sum_of_a_layer_nor_its_gradient(n_tokens, transform, targets, method):
    """64 tokens that nothing is differentiated for are computed in the form for few rows an expert.

    All four layers together take less than one projection of one: no layer keeps a sum either.
    """
    taken = temporaries(4, "blocks", targets, method, n_tokens, transform)
    assert taken < ONE_LAYER / 3  # one of its three projections
