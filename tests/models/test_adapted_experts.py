"""Experts with adapters: the function and gradients of base + update, without keeping the sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safemoe_jax.models import Compute, LoraConfig, ModelConfig, Weights, declare, forward, split_trainable
from safemoe_jax.models.adapted import Adapted, AnyWeight
from safemoe_jax.models.expert_stack import Stack
from safemoe_jax.models.grouped_matmul import KERNELS, expert_ffn
from safemoe_jax.models.lora import EXPERT_TARGETS, add_adapters
from safemoe_jax.models.quantisation import quantise_params
from safemoe_jax.models.quantised import Quantised, dense, quantise

N, K, E, D, F, R = 24, 2, 4, 32, 64, 3  # tokens, chosen experts, experts, widths, rank
WIDE = ModelConfig(
    family="olmoe", vocab_size=64, d_model=256, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=64,
    norm_eps=1e-3, n_experts=32, top_k=2, expert_dim=256, qk_norm="full",
)  # fmt: skip
ONE_LAYER = 3 * 32 * 256 * 256 * 4
"""Bytes of the experts of one layer of it in float32."""


def draw_layer(adapted: tuple[str, ...], method: str | None, biased: bool) -> tuple[jax.Array, Stack]:
    """Tokens [N, D], and experts of which those named have an update."""
    keys = iter(jax.random.split(jax.random.key(0), 13))
    draw = lambda *shape: 0.3 * jax.random.normal(next(keys), shape)  # noqa: E731

    def weight(name: str, inputs: int, outputs: int) -> AnyWeight:
        base, a, b = draw(E, inputs, outputs), draw(E, inputs, R), draw(E, R, outputs)
        base = base if method is None else quantise(base, method)
        return Adapted(base, a, b) if name in adapted else base

    weights = weight("gate", D, F), weight("up", D, F), weight("down", F, D)
    biases = (draw(E, F), draw(E, F), draw(E, D)) if biased else ()
    return draw(N, D), Stack(*weights, *biases)


def added(weight: AnyWeight | None) -> jax.Array | None:
    """The sum, taken where JAX differentiates it."""
    if isinstance(weight, Adapted):
        return added(weight.base) + weight.a_XIr @ weight.b_XrO
    return dense(weight, jnp.float32) if isinstance(weight, Quantised) else weight


def value_and_gradients(kernel: str, x_ND: jax.Array, stack: Stack, keep_sum: bool) -> tuple:
    """The output, and gradients of the tokens, the combine weights and every float part of the stack."""
    weights_NK = jax.random.uniform(jax.random.key(1), (N, K))
    experts_NK = jax.random.randint(jax.random.key(2), (N, K), 0, E - 1)  # the last expert gets no token
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


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("adapted", "method", "biased"),
    [
        (("gate", "up", "down"), None, True),
        (("gate", "up"), None, False),
        (("down",), None, False),
        (("gate", "up", "down"), "int8", False),
    ],
)
def test_value_and_gradients_are_those_of_the_sum(kernel, adapted, method, biased):
    x_ND, stack = draw_layer(adapted, method, biased)
    got = value_and_gradients(kernel, x_ND, stack, keep_sum=False)
    wanted = value_and_gradients("dense", x_ND, stack, keep_sum=True)
    assert all(jnp.any(value != 0) for value in jax.tree.leaves(wanted))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * jnp.abs(b).max())  # noqa: E731
    jax.tree.map(close, got, wanted)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("method", [None, "int8", "int4"])
def test_factors_of_one_layer_on_the_frozen_stack_of_all(kernel, method):
    """The layer's part of the stack counts, whatever else the stack holds."""
    x_ND, stack = draw_layer(("gate", "up", "down"), method, biased=True)
    other = lambda array: jnp.roll(array, 1, axis=0)  # noqa: E731
    of_all = lambda w: jax.tree.map(lambda array: jnp.concatenate([other(array), array, other(array)]), w)  # noqa: E731
    bases = [of_all(weight.base) for weight in stack[:3]]
    biases = tuple(map(of_all, stack[3:]))

    factors = [weight[1:] for weight in stack[:3]]

    def loss(factors: list, bases: list, to_weight: Callable, **options) -> jax.Array:
        weights = [to_weight(Adapted(base, *parts)) for base, parts in zip(bases, factors, strict=True)]
        experts_NK = jnp.arange(N * K).reshape(N, K) % E
        y_ND = expert_ffn(x_ND, jnp.full((N, K), 0.5), experts_NK, *weights, n_experts=E, **options)
        return jnp.square(y_ND).sum()

    run = jax.value_and_grad(loss)
    got = run(factors, bases, lambda weight: weight, first_group=E, kernel=kernel, biases=biases)
    own = [weight.base for weight in stack[:3]]
    wanted = run(factors, own, added, first_group=0, kernel="dense", biases=stack[3:])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * jnp.abs(b).max())  # noqa: E731
    jax.tree.map(close, got, wanted)


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


@pytest.mark.parametrize(
    ("kernel", "targets", "method"),
    [
        *((kernel, tuple(EXPERT_TARGETS), None) for kernel in ("blocks", "ragged", "megablox")),
        ("blocks", ("mlp.experts.gate_up_proj",), None),
        ("ragged", ("mlp.experts.down_proj",), None),
        ("blocks", tuple(EXPERT_TARGETS), "int4"),
        ("ragged", ("mlp.experts.gate_up_proj",), "int8"),
    ],
)
def test_a_layer_more_keeps_no_sum_for_the_backward_pass(kernel, targets, method):
    """It keeps activations and gradients of factors: here less than an eighth of the layer's experts."""
    few, many = (temporaries(n, kernel, targets, method) for n in (4, 8))
    assert (many - few) / 4 < ONE_LAYER / 8


@pytest.mark.parametrize("method", [None, "int8", "int4"])
@pytest.mark.parametrize(
    ("n_tokens", "transform"), [(16, jax.grad), (64, lambda loss: loss)], ids=["step", "decoding"]
)
def test_blocks_never_hold_the_sum_of_a_layer_nor_its_gradient(n_tokens, transform, method):
    """64 tokens that nothing is differentiated for are computed in the form for few rows an expert."""
    taken = temporaries(4, "blocks", tuple(EXPERT_TARGETS), method, n_tokens, transform)
    assert taken < ONE_LAYER / 3  # one of its three projections
