"""What every field of the config says about a layer, against the decoder written out in NumPy."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.models import (
    Compute,
    LayerConfig,
    MlaConfig,
    ModelConfig,
    RopeConfig,
    RoutingOverride,
    Weights,
    declare,
    decode_step,
    forward,
    prefill,
    routing_pass,
)
from safemoe_jax.models.kv_cache import Apart, Stacked
from tests.models.drawn import draw_params
from tests.models.numpy_decoder import decoder

PLAIN = ModelConfig(
    family="any",
    vocab_size=30,
    d_model=16,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    head_dim=4,
    norm_eps=0.02,
    n_experts=5,
    top_k=2,
    expert_dim=8,
    dense_dim=12,
    rope=RopeConfig(100.0),
)


def _with(layers: list[LayerConfig], **fields) -> ModelConfig:
    return replace(PLAIN, n_layers=len(layers), layers=tuple(layers), **fields)


MOE, DENSE = LayerConfig("moe"), LayerConfig("dense")
VARIANTS = {
    "every other layer slides, sinks, biases": _with(
        [LayerConfig(window=3), MOE] * 2,
        sinks=True,
        attention_bias=True,
        output_bias=True,
        norm="rms_float32",
    ),
    "chunks, layers without positions, alternating kinds": _with(
        [
            LayerConfig("dense", chunk=4),
            LayerConfig("moe", chunk=4),
            LayerConfig("dense", rope=False, temperature=True),
            LayerConfig("moe", chunk=5),
        ],
        qk_norm="l2_after_rope",
        query_temperature=(0.5, 3.0),
        rope=RopeConfig(100.0, interleaved=True),
    ),
    "no layer rotates, all slide, all have temperature": _with(
        [LayerConfig("moe", window=4, rope=False, temperature=True)] * 2, query_temperature=(0.3, 2.0)
    ),
    "layer norm, biased vocabulary, partly rotated heads": _with(
        [MOE, DENSE, DENSE],
        norm="layer",
        lm_head_bias=True,
        attention_bias=True,
        rope=RopeConfig(100.0, dim=2),
        qk_norm="head",
    ),
    "multipliers, tied, clamped": _with(
        [LayerConfig("moe", window=5)] * 2,
        embedding_scale=3.0,
        residual_scale=0.3,
        logits_divisor=4.0,
        attention_scale=0.2,
        clip_qkv=0.8,
        tie_embeddings=True,
        qk_norm="full",
    ),
    "latent, low-rank queries, first layer dense": _with(
        [DENSE, MOE, MOE],
        mla=MlaConfig(q_rank=6, kv_rank=5, nope_dim=6, rope_dim=4, v_dim=3, norm_eps=0.01),
        rope=RopeConfig(100.0, interleaved=True),
        attention_scale=0.4,
        attention_bias=True,
        output_bias=True,
    ),
    "latent, full queries, windows": _with(
        [LayerConfig(window=3), MOE],
        mla=MlaConfig(q_rank=None, kv_rank=5, nope_dim=2, rope_dim=4, v_dim=5),
    ),
    "nothing but dense layers": _with([DENSE, LayerConfig("dense", window=2)], n_experts=0, top_k=0),
}
LENGTHS = (11, 7)

run = jax.jit(forward, static_argnums=0, static_argnames="compute")
run_routers = jax.jit(routing_pass, static_argnums=0)
run_prompts = jax.jit(prefill, static_argnums=0, static_argnames="cache_length")
run_step = jax.jit(decode_step, static_argnums=0)


@pytest.fixture(params=VARIANTS, ids=lambda name: name.replace(" ", "_"))
def config(request) -> ModelConfig:
    return VARIANTS[request.param]


@cache
def random_params(config: ModelConfig) -> dict[str, jax.Array]:
    """Random everywhere, norms and biases too, or a wrong one would not show."""
    return draw_params(config, vectors=0.3)


@cache
def rows(config: ModelConfig) -> tuple[np.ndarray, np.ndarray, tuple]:
    """Right-padded rows, their mask, and logits and router logits of each from NumPy."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (len(LENGTHS), max(LENGTHS)), np.int32)
    mask = np.arange(max(LENGTHS)) < np.asarray(LENGTHS)[:, None]
    params = random_params(config)
    alone = tuple(decoder(config, params, row[:n]) for row, n in zip(tokens, LENGTHS, strict=True))
    return tokens, mask.astype(np.int32), alone


def close(got, wanted) -> None:
    np.testing.assert_allclose(got, wanted, atol=3e-5, rtol=1e-4)


def test_packed_samples_and_right_padded_rows(config):
    """Windows, chunks and temperature count positions within the sample, not within the row.

    Both samples packed into the first row, and each in a padded row of its own: one program for all three.
    """
    tokens, _, alone = rows(config)
    n_packed = sum(LENGTHS) + 2
    samples, packed, positions = np.zeros((3, 3, n_packed), np.int32)
    places = [(0, 0), (0, LENGTHS[0]), (1, 0), (2, 0)]
    for number, (row, start) in enumerate(places):
        n = LENGTHS[number % 2]
        packed[row, start : start + n] = tokens[number % 2, :n]
        samples[row, start : start + n], positions[row, start : start + n] = 1 + start, np.arange(n)
    positions[1:] = np.arange(n_packed)
    weights = Weights.of(random_params(config))
    out = run(config, weights, packed, segment_ids=samples, positions=positions)
    assert out.router_logits.shape == (config.n_moe_layers, *packed.shape, config.n_experts)
    assert np.isfinite(out.logits).all()
    logits, routers = np.asarray(out.logits), np.asarray(out.router_logits)
    for number, (row, start) in enumerate(places):
        n, (logits_alone, routers_alone) = LENGTHS[number % 2], alone[number % 2]
        close(logits[row, start : start + n], logits_alone)
        close(routers[:, row, start : start + n], routers_alone)


def stacked(place: Apart) -> Stacked:
    """The form of the cache that other platforms than a CPU have."""
    return Stacked(*(np.concatenate(arrays) for arrays in zip(*place.layers, strict=True)))


# The other form holds the same arrays: places with several layers, and latent ones of two segments, tell it.
STACKED = ("every other layer slides, sinks, biases", "latent, low-rank queries, first layer dense")


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, Apart) for name in VARIANTS), *((name, Stacked) for name in STACKED)]
)
def test_prefill_and_decoding_steps(name, kind):
    """Rows of unequal prompt length; decoded tokens lie behind the padding, at their rows' own positions."""
    config = VARIANTS[name]
    tokens, _, alone = rows(config)
    prompts, prompt, steps = np.array([6, 3]), 6, 4
    slots = np.arange(prompt + steps)[None]
    weights = Weights.of(random_params(config))
    mask = np.asarray(np.arange(prompt) < prompts[:, None], np.int32)
    logits, state = run_prompts(config, weights, tokens[:, :prompt], mask, cache_length=slots.size)
    close(logits, np.stack([alone[row][0][n - 1] for row, n in enumerate(prompts)]))
    if kind is Stacked:
        state = state._replace(segments=tuple(tuple(map(stacked, places)) for places in state.segments))
    for j in range(steps):
        valid = (slots < prompts[:, None]) | ((slots >= prompt) & (slots <= prompt + j))
        token, position = tokens[np.arange(2), prompts + j], np.int32(prompts + j)
        slot = np.int32(prompt + j)
        logits, state = run_step(config, weights, token, position, slot, state, valid_BS=valid)
        close(logits, np.stack([alone[row][0][n + j] for row, n in enumerate(prompts)]))


def test_routing_pass(config):
    tokens, mask, alone = rows(config)
    weights = Weights.of(random_params(config))
    got = np.asarray(run_routers(config, weights, tokens, attention_mask=mask))
    assert got.shape == (config.n_moe_layers, *tokens.shape, config.n_experts)
    for row, (n, (_, routers)) in enumerate(zip(LENGTHS, alone, strict=True)):
        close(got[:, row, :n], routers)


PATTERNS = ("MDMDM", "DMMDMM", "MDDMDD", "DDMM", "MDD")


def _pattern(kinds: str) -> ModelConfig:
    return _with([MOE if kind == "M" else DENSE for kind in kinds])


@pytest.mark.parametrize("kinds", PATTERNS)
def test_routers_come_in_layer_order_whatever_the_pattern(kinds):
    """Forcing routers one by one moves exactly the layers behind the one that is forced."""
    config = _pattern(kinds)
    tokens, _, alone = rows(config)
    weights, row = Weights.of(random_params(config)), tokens[:1]

    def forced(router_logits: np.ndarray, tokens: bool) -> tuple[np.ndarray, np.ndarray]:
        override = RoutingOverride(router_logits.astype(np.float32), np.full(row.shape, tokens))
        out = run(config, weights, row, override=override)
        return np.asarray(out.logits), np.asarray(out.router_logits)

    wanted = alone[0][1][:, None]
    logits, router_logits = forced(-wanted, False)  # on no token: the network's own
    close(router_logits, wanted)
    close(run_routers(config, weights, row), wanted)
    for layer in range(config.n_moe_layers):
        others = router_logits.copy()
        others[layer] *= -1
        got, got_routers = forced(others, True)
        moved = np.abs(got_routers - router_logits).max((1, 2, 3)) > 1e-3
        assert moved.tolist() == [behind > layer for behind in range(config.n_moe_layers)]
        assert np.abs(got - logits).max() > 1e-3


def test_the_routing_pass_stops_at_the_last_router():
    """Nothing behind it is read: those layers' weights may hold anything."""
    config = _pattern("DMDMDD")
    tokens, mask, alone = rows(config)
    spoilt = {name: np.array(value) for name, value in random_params(config).items()}
    s_last = len(config.segments) - 1
    assert [segment.pattern for segment in config.segments] == [("dense", "moe"), ("dense",)]
    for name, value in spoilt.items():
        if name.startswith((f"segments.{s_last}.", "final_norm", "lm_head")):
            value[:] = np.nan
        if name.startswith("segments.0.1.moe.experts"):
            value[-1] = np.nan
    got = np.asarray(run_routers(config, Weights.of(spoilt), tokens, attention_mask=mask))
    for row, (n, (_, routers)) in enumerate(zip(LENGTHS, alone, strict=True)):
        close(got[:, row, :n], routers)


def _pattern_gradient(chosen: Any, compute: Compute) -> dict[str, np.ndarray]:
    """Gradients of the parameters chosen, the others frozen."""
    config = VARIANTS["chunks, layers without positions, alternating kinds"]
    params, (tokens, mask, _) = random_params(config), rows(config)

    def loss(trainable, frozen):
        out = forward(config, Weights(frozen, trainable), tokens, attention_mask=mask, compute=compute)
        return jnp.square(out.logits).mean()

    trainable = {name: value for name, value in params.items() if chosen(name)}
    frozen = {name: value for name, value in params.items() if not chosen(name)}
    return jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(trainable, frozen))


@pytest.fixture(scope="module")
def gradient_of_everything() -> dict[str, np.ndarray]:
    return _pattern_gradient(lambda name: True, Compute(experts="dense"))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_of_a_pattern_do_not_depend_on_the_split(remat, gradient_of_everything):
    """Of frozen and trainable parameters mixed within one layer, or of all of them trainable."""
    chosen = lambda name: any(part in name for part in ("q_proj", "router", "mlp.up"))  # noqa: E731
    for name, value in _pattern_gradient(chosen, Compute(remat=remat)).items():
        assert np.abs(value).max() > 1e-4, name
        np.testing.assert_allclose(value, gradient_of_everything[name], atol=1e-5, rtol=1e-3)


def test_sinks_and_norms_have_the_gradient_of_a_finite_difference():
    # All experts are chosen: a choice that flips within the step would be no derivative.
    config = replace(VARIANTS["every other layer slides, sinks, biases"], top_k=PLAIN.n_experts)
    params, (tokens, mask, _) = random_params(config), rows(config)

    @jax.jit
    @jax.value_and_grad
    def loss(changed):
        out = forward(config, Weights.of({**params, **changed}), tokens, attention_mask=mask)
        return jnp.square(out.logits).mean()

    names = ("segments.0.0.attention.sinks", "segments.0.0.input_norm.scale")
    start = {name: np.asarray(params[name]) for name in names}
    gradient = loss(start)[1]
    for name in names:
        direction = np.random.default_rng(4).normal(size=start[name].shape).astype(np.float32)
        up, down = (loss({**start, name: start[name] + step * direction})[0] for step in (5e-3, -5e-3))
        slope = np.vdot(gradient[name], direction)
        np.testing.assert_allclose(slope, (float(up) - float(down)) / 1e-2, rtol=2e-2)


def test_latent_attention_refuses_what_it_does_not_have():
    config = replace(VARIANTS["latent, full queries, windows"], sinks=True)
    with pytest.raises(InputError, match="sinks with latent attention"):
        declare(config)


def test_layers_that_agree_cost_no_scanned_array():
    """A config without windows compiles to a program without comparisons of positions beyond causality."""
    plain = jax.make_jaxpr(lambda p, t: forward(PLAIN, Weights.of(p), t).logits)
    sliding_config = replace(PLAIN, layers=(LayerConfig(window=3), MOE, MOE, MOE))
    sliding = jax.make_jaxpr(lambda p, t: forward(sliding_config, Weights.of(p), t).logits)
    params, tokens = random_params(PLAIN), jnp.zeros((1, 4), jnp.int32)
    scans = [
        next(eqn for eqn in program(params, tokens).eqns if eqn.primitive.name == "scan")
        for program in (plain, sliding)
    ]
    operands = [len(eqn.invars) for eqn in scans]
    # The second scans the windows and closes over the positions of queries and keys.
    assert operands[1] > operands[0]
