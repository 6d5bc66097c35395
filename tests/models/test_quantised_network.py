"""Networks with quantised weights: the function of the rounded weights, gradients included, without their
float copies."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.models import (
    Compute,
    LoraConfig,
    MlaConfig,
    ModelConfig,
    Weights,
    declare,
    forward,
    initialise,
    split_trainable,
)
from safemoe_jax.models.lora import EXPERT_TARGETS, add_adapters, merge_adapters
from safemoe_jax.models.params import is_adapter
from safemoe_jax.models.quantisation import (
    dequantise_params,
    describe_base,
    quantise_params,
    quantised_weights,
)
from tests.models.quantisable import OLMOE, drawn

LATENT = replace(
    OLMOE,
    family="deepseek_v2",
    qk_norm="none",
    n_kv_heads=4,
    shared_dim=64,
    mla=MlaConfig(q_rank=64, kv_rank=64, nope_dim=16, rope_dim=16, v_dim=32, norm_eps=1e-3),
)
BIASED = replace(OLMOE, family="gpt_oss", activation="clamped", expert_bias=True, attention_bias=True)
NETWORKS = {"olmoe": OLMOE, "latent": LATENT, "biased": BIASED}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 20)), jnp.int32)
ATTENTION, EXPERTS = ("q_proj", "o_proj"), ("v_proj", "mlp.experts.gate_up_proj")

run = jax.jit(forward, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def logits_and_gradient(config: ModelConfig, kernel: str, weights: Weights) -> tuple[jax.Array, dict]:
    """Of the adapters. One program a network and kernel: the oracle's serves every way of rounding."""

    def loss(trainable: dict) -> tuple[jax.Array, jax.Array]:
        given, compute = Weights(weights.frozen, trainable), Compute(experts=kernel)
        logits = forward(config, given, TOKENS, compute=compute).logits
        return jnp.square(logits).mean(), logits

    gradient, logits = jax.grad(loss, has_aux=True)(weights.trainable)
    return logits, gradient


# All pairs of the three: a kernel meets both ways of rounding and both kinds of target, and these each other.
@pytest.mark.parametrize(
    ("method", "kernel", "targets"),
    [
        ("int8", "blocks", EXPERTS),
        ("int4", "blocks", ATTENTION),
        ("int8", "ragged", ATTENTION),
        ("int4", "ragged", EXPERTS),
        ("int8", "dense", EXPERTS),
        ("int4", "dense", ATTENTION),
        ("int8", "megablox", ATTENTION),
        ("int4", "megablox", EXPERTS),
    ],
)
def test_value_and_gradient_are_those_of_the_rounded_weights(method, kernel, targets):
    many = replace(OLMOE, n_experts=12)  # few rows each: "blocks" has one size of block to compile, not two
    config, params = quantise_params(many, drawn(many), method)
    adapted, params = add_adapters(config, params, LoraConfig(4, 8.0, targets), jax.random.key(1))
    rng = np.random.default_rng(2)
    factors = {
        name: value + 0.1 * rng.normal(size=value.shape).astype(np.float32)
        for name, value in split_trainable(adapted, params).trainable.items()
    }
    plain, floats = dequantise_params(adapted, params | factors)
    got = logits_and_gradient(adapted, kernel, split_trainable(adapted, params | factors))
    wanted = logits_and_gradient(plain, "dense", split_trainable(plain, floats))
    assert any(np.any(value != 0) for value in wanted[1].values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, wanted)


# Both containers in every network and every method; olmoe's in 8 and 4 bits are above, with gradients.
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("olmoe", "int4-64"),
        ("latent", "int8"),
        ("latent", "int4-64"),
        ("biased", "int8"),
        ("biased", "int4"),
    ],
)
def test_every_kind_of_network_computes_with_the_rounded_weights(name, method):
    config, params = quantise_params(NETWORKS[name], drawn(NETWORKS[name]), method)
    _, floats = dequantise_params(config, params)
    got = run(config, Weights.of(params), TOKENS).logits
    wanted, unrounded = (
        run(NETWORKS[name], Weights.of(p), TOKENS).logits for p in (floats, drawn(NETWORKS[name]))
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(np.subtract(wanted, unrounded)).max() > 0


def test_what_is_quantised_and_what_is_not():
    names = {name.split(".", 3)[-1] for name in quantised_weights(LATENT, "int8")}
    assert names == {
        *(f"attention.{p}_proj.kernel" for p in ("q_a", "q_b", "kv_a", "kv_b", "o")),
        *(f"moe.experts.{p}" for p in ("gate", "up", "down")),
        *(f"moe.shared.{p}_proj.kernel" for p in ("gate", "up", "down")),
    }


def test_merging_gives_the_rounded_weights_and_their_updates():
    config, params = quantise_params(OLMOE, drawn(OLMOE), "int8")
    adapted, params = add_adapters(config, params, LoraConfig(4, 8.0, ("q_proj",)), jax.random.key(1))
    params = {k: v + 0.1 if k.endswith("lora_b") else v for k, v in params.items()}
    merged_config, merged = merge_adapters(adapted, params)
    assert merged_config == OLMOE and set(merged) == set(declare(OLMOE))
    got = run(merged_config, Weights.of(merged), TOKENS).logits
    np.testing.assert_allclose(got, run(adapted, Weights.of(params), TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_refusals():
    narrow = replace(OLMOE, expert_dim=48)
    with pytest.raises(InputError, match="a block of 32 for 48 inputs"):
        quantise_params(narrow, drawn(narrow), "int4")
    config, params = quantise_params(OLMOE, drawn(OLMOE), "int8")
    with pytest.raises(InputError, match="full fine-tuning of int8 weights"):
        split_trainable(config, params)
    for again in ("int8", "int4"):
        with pytest.raises(InputError, match="held in int8 already"):
            quantise_params(config, params, again)
    with pytest.raises(InputError, match="cannot be drawn"):
        initialise(declare(config), jax.random.key(0))


WIDE = replace(
    OLMOE, vocab_size=128, d_model=256, head_dim=64, n_kv_heads=4, n_layers=4, n_experts=32, expert_dim=256
)


@functools.cache
def step_memory(config: ModelConfig, kernel: str) -> tuple[int, int, int]:
    """Bytes of the compiled gradient of adapters: frozen weights, all arguments, temporaries."""
    abstract = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in declare(WIDE).items()}

    def make(params: dict) -> Weights:
        base = replace(config, quantisation=None, lora=None)
        if config.quantisation is not None:
            base, params = quantise_params(base, params, config.quantisation)
        return split_trainable(*add_adapters(base, params, config.lora, jax.random.key(0)))

    weights = jax.eval_shape(make, abstract)
    tokens = jnp.zeros((2, 32), jnp.int32)

    def loss(trainable: dict, frozen: dict) -> jax.Array:
        compute = Compute(experts=kernel)
        return jnp.square(forward(config, Weights(frozen, trainable), tokens, compute=compute).logits).mean()

    compiled = jax.jit(jax.grad(loss)).lower(weights.trainable, weights.frozen).compile()
    memory = compiled.memory_analysis()
    held = sum(value.size * value.dtype.itemsize for value in jax.tree.leaves(weights))
    return held, memory.argument_size_in_bytes, memory.temp_size_in_bytes


# Both containers with both kinds of target; the blocks of 4 bits differ in their number of scales alone.
@pytest.mark.parametrize(
    ("method", "targets"),
    [
        ("int8", ("q_proj", "v_proj")),
        ("int8", tuple(EXPERT_TARGETS)),
        ("int4", tuple(EXPERT_TARGETS)),
        ("int4-64", ("q_proj", "v_proj")),
    ],
)
def test_a_step_takes_the_quantised_bytes_and_the_activations(method, targets):
    """Activations are what a step of adapters on attention takes beside float32 weights: its temporaries. The
    quantised step may take 15 % of its weights' bytes more, for the matrices that are brought back one at a
    time, and the bytes of its own adapters once, for their gradients. A sum of an expert layer's weights and
    updates, or a gradient of it, would be 25 MB."""
    attention = LoraConfig(4, targets=("q_proj", "v_proj"))
    _, _, activations = step_memory(replace(WIDE, lora=attention), "blocks")
    config = replace(WIDE, lora=replace(attention, targets=targets), quantisation=method)
    adapters = sum(4 * math.prod(spec.shape) for name, spec in declare(config).items() if is_adapter(name))
    held, arguments, temporary = step_memory(config, "blocks")
    assert held > 8e6 and adapters < held / 4
    assert arguments + temporary <= 1.15 * held + activations + adapters


@pytest.mark.parametrize("kernel", ["blocks", "ragged"])
def test_a_step_keeps_no_second_copy_of_the_frozen_weights(kernel):
    held, _, temporary = step_memory(replace(WIDE, lora=LoraConfig(4, targets=("q_proj", "v_proj"))), kernel)
    one_layer = 3 * 32 * 256 * 256 * 4
    assert temporary < (held / 8 if kernel == "blocks" else 2 * one_layer + held / 8)


def test_the_user_is_told_what_the_base_takes():
    config, params = quantise_params(OLMOE, drawn(OLMOE), "int8")
    assert describe_base(OLMOE, params) is None
    assert describe_base(config, params).startswith("base weights: int8, 0.")
