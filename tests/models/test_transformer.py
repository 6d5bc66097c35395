"""The decoder: outputs, packing, cache, routing-only pass, memory."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safemoe_jax.models import (
    Compute,
    LoraConfig,
    ModelConfig,
    RopeConfig,
    RoutingOverride,
    Weights,
    declare,
    decode_step,
    forward,
    hidden_states,
    prefill,
    routing_pass,
    split_trainable,
)
from safemoe_jax.models.attention import attend
from safemoe_jax.models.lora import merge_adapters
from tests.models.drawn import draw_params

CONFIG = ModelConfig(
    family="olmoe",
    vocab_size=40,
    d_model=16,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=4,
    norm_eps=0.02,
    n_experts=6,
    top_k=2,
    expert_dim=8,
    rope=RopeConfig(100.0),
    clip_qkv=2.0,
    qk_norm="full",
)


run = jax.jit(forward, static_argnums=0, static_argnames="compute")


@pytest.fixture(scope="module")
def params():
    return draw_params(CONFIG)


def _tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (rows, length), np.int32)


def test_output_shapes_and_dtypes(params):
    out = run(CONFIG, Weights.of(params), _tokens(2, 5), compute=Compute("bfloat16"))
    assert out.logits.shape == (2, 5, 40) and out.logits.dtype == jnp.float32
    assert out.router_logits.shape == (3, 2, 5, 6) and out.router_logits.dtype == jnp.float32
    assert out.hidden.shape == (2, 5, 16) and out.hidden.dtype == jnp.bfloat16


def test_packed_samples_equal_samples_alone(params):
    first, second = _tokens(1, 7, 1), _tokens(1, 4, 2)
    packed = np.concatenate([first, second, np.zeros((1, 3), np.int32)], axis=1)
    segments = np.asarray([[1] * 7 + [2] * 4 + [0] * 3])
    positions = np.asarray([[*range(7), *range(4), *range(3)]])
    weights = Weights.of(params)
    out = run(CONFIG, weights, packed, segment_ids=segments, positions=positions)
    logits, router_logits = np.asarray(out.logits), np.asarray(out.router_logits)
    for alone, start in ((first, 0), (second, 7)):
        expected = run(CONFIG, weights, alone)
        stop = start + alone.shape[1]
        np.testing.assert_allclose(logits[:, start:stop], expected.logits, atol=1e-5)
        np.testing.assert_allclose(router_logits[:, :, start:stop], expected.router_logits, atol=1e-5)


def test_right_padding_changes_nothing_for_real_tokens(params):
    tokens, weights = _tokens(1, 7), Weights.of(params)
    padded = np.pad(tokens, ((0, 0), (0, 2)))
    mask = np.asarray([[1] * 7 + [0] * 2])
    out = run(CONFIG, weights, padded, attention_mask=mask)
    alone = run(CONFIG, weights, tokens).logits
    np.testing.assert_allclose(np.asarray(out.logits)[:, :7], alone, atol=1e-5)


def test_cache_gives_the_logits_of_the_full_pass_for_rows_of_unequal_length(params):
    weights, tokens = Weights.of(params), _tokens(2, 9)
    lengths, prompt = np.array([5, 3]), 5
    mask = np.asarray(np.arange(prompt)[None] < lengths[:, None], np.int32)
    logits, cache = jax.jit(prefill, static_argnums=0, static_argnames="cache_length")(
        CONFIG, weights, tokens[:, :prompt], mask, cache_length=9
    )
    full = np.asarray(run(CONFIG, weights, tokens).logits)
    np.testing.assert_allclose(logits, full[np.arange(2), lengths - 1], atol=1e-5)
    step = jax.jit(decode_step, static_argnums=0)
    for j in range(3):
        slots = np.arange(9)[None]
        real = (slots < lengths[:, None]) | ((slots >= prompt) & (slots <= prompt + j))
        token = tokens[np.arange(2), lengths + j]
        logits, cache = step(
            CONFIG,
            weights,
            token,
            np.int32(lengths + j),
            np.int32(prompt + j),
            cache,
            valid_BS=real,
        )
        np.testing.assert_allclose(logits, full[np.arange(2), lengths + j], atol=1e-5)


def test_routing_pass_gives_the_router_logits_of_the_full_pass(params):
    tokens = _tokens(2, 6)
    expected = run(CONFIG, Weights.of(params), tokens).router_logits
    routing = jax.jit(routing_pass, static_argnums=0)(CONFIG, Weights.of(params), tokens)
    np.testing.assert_allclose(routing, expected, atol=1e-6)


def test_routing_pass_computes_neither_the_vocabulary_nor_the_last_experts():
    """Floating-point operations of the compiled one-layer program against a count by hand."""
    config = replace(CONFIG, n_layers=1, layers=(), d_model=32, head_dim=8, expert_dim=256, vocab_size=2048)
    rows, length = 4, 32
    specs = declare(config)
    shapes = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in specs.items()}
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def flops(function) -> float:
        lowered = jax.jit(lambda p, t: function(config, Weights.of(p), t, compute=Compute(experts="dense")))
        return lowered.lower(shapes, tokens).compile().cost_analysis()["flops"]

    n, d, heads = rows * length, 32, 4 * 8
    attention = 2 * n * d * (2 * heads + 2 * (2 * 8)) + 2 * 2 * n * length * heads
    router = 2 * n * d * config.n_experts
    experts = 2 * n * 3 * d * config.expert_dim * config.n_experts
    vocabulary = 2 * n * d * config.vocab_size
    assert flops(routing_pass) < 2 * (attention + router) < experts
    assert flops(lambda *a, **k: hidden_states(*a, **k).hidden) > experts
    assert flops(lambda *a, **k: forward(*a, **k).logits) > experts + vocabulary


def test_override_with_the_models_own_logits_changes_nothing_and_with_others_does(params):
    tokens, weights = _tokens(2, 6), Weights.of(params)
    own = run(CONFIG, weights, tokens)
    logits, router_logits = np.asarray(own.logits), np.asarray(own.router_logits)
    everywhere = np.ones(tokens.shape, bool)
    same = run(CONFIG, weights, tokens, override=RoutingOverride(router_logits, everywhere))
    np.testing.assert_allclose(same.logits, logits, atol=1e-6)
    last = np.arange(tokens.shape[1]) == tokens.shape[1] - 1
    other = RoutingOverride(-router_logits, everywhere & last)
    forced = np.asarray(run(CONFIG, weights, tokens, override=other).logits)
    np.testing.assert_allclose(forced[:, :-1], logits[:, :-1], atol=1e-6)
    assert np.abs(forced[:, -1] - logits[:, -1]).max() > 1e-2


def test_tied_embeddings_project_with_the_table():
    config = replace(CONFIG, tie_embeddings=True)
    params = draw_params(config, 1)
    assert "lm_head.kernel" not in params
    out = run(config, Weights.of(params), _tokens(1, 4))
    expected = np.asarray(out.hidden) @ np.asarray(params["embed.embedding"]).T
    np.testing.assert_allclose(out.logits, expected, rtol=1e-5, atol=1e-5)


def test_merged_adapters_give_the_logits_of_the_adapters(params):
    """By the plainest kernel; every kernel's adapters are those of the sum (`test_adapted_experts`)."""
    targets = ("q_proj", "o_proj", "gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    config = replace(CONFIG, lora=LoraConfig(3, 6.0, targets))
    adapted = {**draw_params(config, 2, updates=0.3), **params}
    tokens, compute = _tokens(2, 6), Compute(experts="dense")
    with_adapters = np.asarray(run(config, Weights.of(adapted), tokens, compute=compute).logits)
    merged_config, merged = merge_adapters(config, adapted)
    assert merged_config == CONFIG and merged.keys() == params.keys()
    np.testing.assert_allclose(
        run(merged_config, Weights.of(merged), tokens, compute=compute).logits, with_adapters, atol=1e-4
    )
    plain = np.asarray(run(CONFIG, Weights.of(params), tokens, compute=compute).logits)
    assert np.abs(with_adapters - plain).max() > 1e-2


def test_lora_gradient_holds_no_copy_of_the_frozen_weights():
    """Temporary memory of the compiled gradient stays far below the bytes of the frozen stacks."""
    config = replace(CONFIG, n_layers=6, layers=(), d_model=128, head_dim=32, n_experts=16, expert_dim=512)
    config = replace(config, lora=LoraConfig(targets=("q_proj", "v_proj")))
    shapes = {n: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for n, spec in declare(config).items()}
    trainable = {n: s for n, s in shapes.items() if "lora" in n}
    frozen = {n: s for n, s in shapes.items() if "lora" not in n}

    def loss(trainable, frozen, tokens):
        out = forward(config, Weights(frozen, trainable), tokens, compute=Compute(experts="blocks"))
        return out.logits.mean()

    lowered = jax.jit(jax.grad(loss)).lower(trainable, frozen, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    frozen_bytes = sum(4 * np.prod(s.shape) for s in frozen.values())
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 0.25 * frozen_bytes


@pytest.fixture(scope="module")
def gradient(params):
    """The gradient of a loss of the adapted network, and its parameters."""
    config = replace(CONFIG, lora=LoraConfig(targets=("q_proj", "v_proj")))
    adapted, tokens = {**draw_params(config, 4), **params}, _tokens(2, 6)

    def loss(trainable, frozen, compute):
        return jnp.square(forward(config, Weights(frozen, trainable), tokens, compute=compute).logits).mean()

    return jax.jit(jax.grad(loss), static_argnums=2), split_trainable(config, adapted)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_do_not_depend_on_rematerialisation_or_on_the_split(gradient, remat):
    """Adapter gradients with a frozen base equal those with everything trainable."""
    take, weights = gradient
    lora = take(weights.trainable, weights.frozen, Compute(remat=remat))
    full = take(weights.merged(), {}, Compute(experts="dense"))
    for name, value in lora.items():
        np.testing.assert_allclose(value, full[name], atol=1e-6)
    assert any(np.abs(value).max() > 1e-4 for value in lora.values())


@pytest.mark.parametrize("length", [127, 300, 1100])
def test_attention_in_blocks_is_softmax_attention(length):
    """Values and gradients against the textbook formula, packed rows and grouped heads."""
    rng = np.random.default_rng(5)
    q, k, v = (rng.normal(size=(2, length, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    columns, segments = np.arange(length), np.arange(length) // 90
    mask = (columns[:, None] >= columns) & (segments[:, None] == segments)
    mask = np.broadcast_to(mask, (2, length, length))

    def textbook(q, k, v):
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(8)
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhts,bshd->bthd", weights, v)

    def value_and_gradients(function):
        """Those of the sum of squares; the value is the function's own."""

        def loss(*qkv):
            y = function(*qkv)
            return jnp.square(y).sum(), y

        gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return y, gradients

    y, gradients = value_and_gradients(lambda q, k, v: attend(q, k, v, mask))
    expected_y, expected = value_and_gradients(textbook)
    np.testing.assert_allclose(y, expected_y, atol=1e-5)
    for got, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_attention_keeps_no_scores_for_the_backward_pass():
    layers, rows, length, heads, width = 16, 1, 256, 8, 8
    shape, mask = (rows, length, heads, width), jnp.tril(jnp.ones((rows, length, length), bool))

    def loss(x):
        body = jax.checkpoint(
            lambda x, _: (x + attend(x, x, x, mask), None),
            policy=jax.checkpoint_policies.everything_saveable,
        )
        return jax.lax.scan(body, x, None, length=layers)[0].sum()

    compiled = jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
    scores_of_all_layers = layers * rows * heads * length * length * 4
    assert compiled.memory_analysis().temp_size_in_bytes < scores_of_all_layers / 2
