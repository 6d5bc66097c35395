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
    initialise,
    prefill,
    routing_pass,
    split_trainable,
)
from safemoe_jax.models.attention import attend
from safemoe_jax.models.lora import add_adapters, merge_adapters

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
    return initialise(declare(CONFIG), jax.random.key(0), stddev=0.4)


def _tokens(rows: int, length: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (rows, length)), jnp.int32)


def test_output_shapes_and_dtypes(params):
    out = run(CONFIG, Weights.of(params), _tokens(2, 5), compute=Compute("bfloat16"))
    assert out.logits.shape == (2, 5, 40) and out.logits.dtype == jnp.float32
    assert out.router_logits.shape == (3, 2, 5, 6) and out.router_logits.dtype == jnp.float32
    assert out.hidden.shape == (2, 5, 16) and out.hidden.dtype == jnp.bfloat16


def test_packed_samples_equal_samples_alone(params):
    first, second = _tokens(1, 7, 1), _tokens(1, 4, 2)
    packed = jnp.concatenate([first, second, jnp.zeros((1, 3), jnp.int32)], axis=1)
    segments = jnp.asarray([[1] * 7 + [2] * 4 + [0] * 3])
    positions = jnp.asarray([[*range(7), *range(4), *range(3)]])
    weights = Weights.of(params)
    out = run(CONFIG, weights, packed, segment_ids=segments, positions=positions)
    for alone, start in ((first, 0), (second, 7)):
        expected = run(CONFIG, weights, alone)
        stop = start + alone.shape[1]
        np.testing.assert_allclose(out.logits[:, start:stop], expected.logits, atol=1e-5)
        np.testing.assert_allclose(out.router_logits[:, :, start:stop], expected.router_logits, atol=1e-5)


def test_right_padding_changes_nothing_for_real_tokens(params):
    tokens, weights = _tokens(1, 6), Weights.of(params)
    padded = jnp.pad(tokens, ((0, 0), (0, 3)))
    mask = jnp.asarray([[1] * 6 + [0] * 3])
    out = run(CONFIG, weights, padded, attention_mask=mask)
    np.testing.assert_allclose(out.logits[:, :6], run(CONFIG, weights, tokens).logits, atol=1e-5)


def test_cache_gives_the_logits_of_the_full_pass_for_rows_of_unequal_length(params):
    weights, tokens = Weights.of(params), _tokens(2, 9)
    lengths, prompt = np.array([5, 3]), 5
    mask = jnp.asarray(np.arange(prompt)[None] < lengths[:, None], jnp.int32)
    logits, cache = jax.jit(prefill, static_argnums=0, static_argnames="cache_length")(
        CONFIG, weights, tokens[:, :prompt], mask, cache_length=9
    )
    full = run(CONFIG, weights, tokens).logits
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
            jnp.asarray(lengths + j, jnp.int32),
            jnp.int32(prompt + j),
            cache,
            valid_BS=jnp.asarray(real),
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
    out = run(CONFIG, weights, tokens)
    everywhere = jnp.ones(tokens.shape, bool)
    same = run(CONFIG, weights, tokens, override=RoutingOverride(out.router_logits, everywhere))
    np.testing.assert_allclose(same.logits, out.logits, atol=1e-6)
    other = RoutingOverride(-out.router_logits, everywhere.at[:, :-1].set(False))
    forced = run(CONFIG, weights, tokens, override=other)
    np.testing.assert_allclose(forced.logits[:, :-1], out.logits[:, :-1], atol=1e-6)
    assert jnp.abs(forced.logits[:, -1] - out.logits[:, -1]).max() > 1e-2


def test_tied_embeddings_project_with_the_table():
    config = replace(CONFIG, tie_embeddings=True)
    params = initialise(declare(config), jax.random.key(1), stddev=0.4)
    assert "lm_head.kernel" not in params
    out = run(config, Weights.of(params), _tokens(1, 4))
    np.testing.assert_allclose(out.logits, out.hidden @ params["embed.embedding"].T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["dense", "blocks"])
def test_merged_adapters_give_the_logits_of_the_adapters(params, kernel):
    targets = ("q_proj", "o_proj", "gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    config, adapted = add_adapters(CONFIG, params, LoraConfig(3, 6.0, targets), jax.random.key(2))
    keys = jax.random.split(jax.random.key(3), len(adapted))
    adapted = {
        name: 0.3 * jax.random.normal(key, value.shape) if name.endswith("lora_b") else value
        for key, (name, value) in zip(keys, sorted(adapted.items()), strict=True)
    }
    tokens, compute = _tokens(2, 6), Compute(experts=kernel)
    with_adapters = run(config, Weights.of(adapted), tokens, compute=compute).logits
    merged_config, merged = merge_adapters(config, adapted)
    assert merged_config == CONFIG and merged.keys() == params.keys()
    np.testing.assert_allclose(
        run(merged_config, Weights.of(merged), tokens, compute=compute).logits, with_adapters, atol=1e-4
    )
    plain = run(CONFIG, Weights.of(params), tokens, compute=compute).logits
    assert jnp.abs(with_adapters - plain).max() > 1e-2


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


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_do_not_depend_on_rematerialisation_or_on_the_split(params, remat):
    """Adapter gradients with a frozen base equal those with everything trainable."""
    config, adapted = add_adapters(CONFIG, params, LoraConfig(), jax.random.key(4))
    weights, tokens = split_trainable(config, adapted), _tokens(2, 6)

    def loss(trainable, frozen, compute):
        return jnp.square(forward(config, Weights(frozen, trainable), tokens, compute=compute).logits).mean()

    lora = jax.jit(jax.grad(loss), static_argnums=2)(weights.trainable, weights.frozen, Compute(remat=remat))
    full = jax.jit(jax.grad(loss), static_argnums=2)(weights.merged(), {}, Compute(experts="dense"))
    for name, value in lora.items():
        np.testing.assert_allclose(value, full[name], atol=1e-6)
    assert any(jnp.abs(value).max() > 1e-4 for value in lora.values())


@pytest.mark.parametrize("length", [127, 300, 1100])
def test_attention_in_blocks_is_softmax_attention(length):
    """Values and gradients against the textbook formula, packed rows and grouped heads."""
    keys = jax.random.split(jax.random.key(5), 3)
    q = jax.random.normal(keys[0], (2, length, 4, 8))
    k, v = (jax.random.normal(key, (2, length, 2, 8)) for key in keys[1:])
    columns, segments = jnp.arange(length), jnp.arange(length) // 90
    mask = (columns[:, None] >= columns) & (segments[:, None] == segments)
    mask = jnp.broadcast_to(mask, (2, length, length))

    def textbook(q, k, v):
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(8)
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhts,bshd->bthd", weights, v)

    def sum_of_squares(function):
        return jax.jit(jax.value_and_grad(lambda *a: jnp.square(function(*a)).sum(), argnums=(0, 1, 2)))

    ours, expected = sum_of_squares(lambda q, k, v: attend(q, k, v, mask)), sum_of_squares(textbook)
    np.testing.assert_allclose(attend(q, k, v, mask), textbook(q, k, v), atol=1e-5)
    for got, wanted in zip(ours(q, k, v)[1], expected(q, k, v)[1], strict=True):
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
