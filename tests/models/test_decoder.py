"""What every field of the config says about a layer, against the decoder written out in NumPy."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

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
    initialise,
    prefill,
    routing_pass,
)
from safemoe_jax.models.kv_cache import Apart, Stacked
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


@pytest.fixture(params=VARIANTS, ids=lambda name: name.replace(" ", "_"))
def config(request) -> ModelConfig:
    return VARIANTS[request.param]


@cache
def random_params(config: ModelConfig) -> dict[str, jax.Array]:
    """Random everywhere, norms and biases too, or a wrong one would not show."""
    drawn = initialise(declare(config), jax.random.key(0), stddev=0.4)
    keys = jax.random.split(jax.random.key(1), len(drawn))
    return {
        name: value + 0.3 * jax.random.normal(key, value.shape) if value.ndim < 3 else value
        for key, (name, value) in zip(keys, sorted(drawn.items()), strict=True)
    }


@cache
def rows(config: ModelConfig) -> tuple[jax.Array, jax.Array, tuple]:
    """Right-padded rows, their mask, and logits and router logits of each from NumPy."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (len(LENGTHS), max(LENGTHS)))
    mask = np.arange(max(LENGTHS)) < np.asarray(LENGTHS)[:, None]
    params = random_params(config)
    alone = tuple(decoder(config, params, row[:n]) for row, n in zip(tokens, LENGTHS, strict=True))
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask, jnp.int32), alone


def close(got, wanted) -> None:
    np.testing.assert_allclose(got, wanted, atol=3e-5, rtol=1e-4)


def test_right_padded_rows(config):
    tokens, mask, alone = rows(config)
    out = run(config, Weights.of(random_params(config)), tokens, attention_mask=mask)
    assert out.router_logits.shape == (config.n_moe_layers, *tokens.shape, config.n_experts)
    for row, (n, (logits, routers)) in enumerate(zip(LENGTHS, alone, strict=True)):
        close(out.logits[row, :n], logits)
        close(out.router_logits[:, row, :n], routers)


def test_packed_samples(config):
    """Windows, chunks and temperature count positions within the sample, not within the row."""
    tokens, _, alone = rows(config)
    packed = jnp.concatenate([row[:n] for row, n in zip(tokens, LENGTHS, strict=True)])[None]
    packed = jnp.pad(packed, ((0, 0), (0, 2)))
    samples = jnp.asarray([[1] * LENGTHS[0] + [2] * LENGTHS[1] + [0] * 2])
    positions = jnp.asarray([[*range(LENGTHS[0]), *range(LENGTHS[1]), 0, 0]])
    out = run(config, Weights.of(random_params(config)), packed, segment_ids=samples, positions=positions)
    assert jnp.isfinite(out.logits).all()
    start = 0
    for n, (logits, routers) in zip(LENGTHS, alone, strict=True):
        close(out.logits[0, start : start + n], logits)
        close(out.router_logits[:, 0, start : start + n], routers)
        start += n


def stacked(place):
    """The form of the cache that other platforms than a CPU have."""
    return Stacked(*(jnp.concatenate(arrays) for arrays in zip(*place.layers, strict=True)))


@pytest.mark.parametrize("kind", [Stacked, Apart])
def test_prefill_and_decoding_steps(config, kind):
    """Rows of unequal prompt length; decoded tokens lie behind the padding, at their rows' own positions."""
    tokens, _, alone = rows(config)
    prompts, prompt, steps = np.array([6, 3]), 6, 4
    slots = np.arange(prompt + steps)[None]
    weights = Weights.of(random_params(config))
    mask = jnp.asarray(np.arange(prompt) < prompts[:, None], jnp.int32)
    logits, state = jax.jit(prefill, static_argnums=0, static_argnames="cache_length")(
        config, weights, tokens[:, :prompt], mask, cache_length=slots.size
    )
    close(logits, np.stack([alone[row][0][n - 1] for row, n in enumerate(prompts)]))
    if kind is Stacked:
        state = state._replace(segments=tuple(tuple(map(stacked, places)) for places in state.segments))
    step = jax.jit(decode_step, static_argnums=0)
    for j in range(steps):
        valid = (slots < prompts[:, None]) | ((slots >= prompt) & (slots <= prompt + j))
        logits, state = step(
            config,
            weights,
            tokens[np.arange(2), prompts + j],
            jnp.asarray(prompts + j, jnp.int32),
            jnp.int32(prompt + j),
            state,
            valid_BS=jnp.asarray(valid),
        )
        close(logits, np.stack([alone[row][0][n + j] for row, n in enumerate(prompts)]))


def test_routing_pass(config):
    tokens, mask, alone = rows(config)
    weights = Weights.of(random_params(config))
    got = jax.jit(routing_pass, static_argnums=0)(config, weights, tokens, attention_mask=mask)
    assert got.shape == (config.n_moe_layers, *tokens.shape, config.n_experts)
    for row, (n, (_, routers)) in enumerate(zip(LENGTHS, alone, strict=True)):
        close(got[:, row, :n], routers)


PATTERNS = ("MDMDM", "DMMDMM", "MDDMDD", "DDMM", "MDD", "MM")


def _pattern(kinds: str) -> ModelConfig:
    return _with([MOE if kind == "M" else DENSE for kind in kinds])


@pytest.mark.parametrize("kinds", PATTERNS)
def test_routers_come_in_layer_order_whatever_the_pattern(kinds):
    """Forcing routers one by one moves exactly the layers behind the one that is forced."""
    config = _pattern(kinds)
    params = random_params(config)
    tokens, _, alone = rows(config)
    weights, row = Weights.of(params), tokens[:1]
    out = run(config, weights, row)
    close(out.router_logits[:, 0], alone[0][1])
    passed = jax.jit(routing_pass, static_argnums=0)(config, weights, row)
    close(passed, out.router_logits)
    everywhere = jnp.ones(row.shape, bool)
    for layer in range(config.n_moe_layers):
        forced = out.router_logits.at[layer].multiply(-1)
        got = run(config, weights, row, override=RoutingOverride(forced, everywhere))
        moved = np.abs(got.router_logits - out.router_logits).max((1, 2, 3)) > 1e-3
        assert moved.tolist() == [behind > layer for behind in range(config.n_moe_layers)]
        assert jnp.abs(got.logits - out.logits).max() > 1e-3


def test_the_routing_pass_stops_at_the_last_router():
    """Nothing behind it is read: those layers' weights may hold anything."""
    config = _pattern("DMDMDD")
    params, (tokens, _, _) = random_params(config), rows(config)
    wanted = run(config, Weights.of(params), tokens).router_logits
    spoilt = dict(params)
    s_last = len(config.segments) - 1
    assert [segment.pattern for segment in config.segments] == [("dense", "moe"), ("dense",)]
    for name in params:
        if name.startswith((f"segments.{s_last}.", "final_norm", "lm_head")):
            spoilt[name] = jnp.full_like(params[name], jnp.nan)
        if name.startswith("segments.0.1.moe.experts"):
            spoilt[name] = params[name].at[-1].set(jnp.nan)
    got = jax.jit(routing_pass, static_argnums=0)(config, Weights.of(spoilt), tokens)
    close(got, wanted)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_of_a_pattern_do_not_depend_on_the_split(remat):
    """Of frozen and trainable parameters mixed within one layer, or of all of them trainable."""
    config = VARIANTS["chunks, layers without positions, alternating kinds"]
    params, (tokens, mask, _) = random_params(config), rows(config)
    chosen = {name for name in params if "q_proj" in name or "router" in name or "mlp.up" in name}

    def loss(trainable, frozen, compute):
        out = forward(config, Weights(frozen, trainable), tokens, attention_mask=mask, compute=compute)
        return jnp.square(out.logits).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    trainable = {name: params[name] for name in chosen}
    frozen = {name: value for name, value in params.items() if name not in chosen}
    some = gradient(trainable, frozen, Compute(remat=remat))
    everything = gradient(params, {}, Compute(experts="dense"))
    for name, value in some.items():
        assert jnp.abs(value).max() > 1e-4, name
        np.testing.assert_allclose(value, everything[name], atol=1e-5, rtol=1e-3)


def test_sinks_and_norms_have_the_gradient_of_a_finite_difference():
    # All experts are chosen: a choice that flips within the step would be no derivative.
    config = replace(VARIANTS["every other layer slides, sinks, biases"], top_k=PLAIN.n_experts)
    params, (tokens, mask, _) = random_params(config), rows(config)

    @jax.jit
    def loss(changed):
        out = forward(config, Weights.of({**params, **changed}), tokens, attention_mask=mask)
        return jnp.square(out.logits).mean()

    for name in ("segments.0.0.attention.sinks", "segments.0.0.input_norm.scale"):
        direction = jax.random.normal(jax.random.key(3), params[name].shape)
        slope = jnp.vdot(jax.grad(loss)({name: params[name]})[name], direction)
        up, down = (loss({name: params[name] + step * direction}) for step in (1e-2, -1e-2))
        np.testing.assert_allclose(slope, (up - down) / 2e-2, rtol=2e-2)


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
