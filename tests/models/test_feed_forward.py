"""The feed-forward side of a layer, shared experts and adapters; experts with biases in the whole decoder.

Legend: B rows, T positions, D model width, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.models import (
    Compute,
    LayerConfig,
    LoraConfig,
    MlaConfig,
    ModelConfig,
    RoutingConfig,
    Weights,
    declare,
    forward,
)
from safemoe_jax.models.expert_stack import Place
from safemoe_jax.models.experts import MoE
from safemoe_jax.models.feed_forward import FeedForward
from safemoe_jax.models.lora import add_adapters, describe, lora_targets, merge_adapters, with_adapters
from safemoe_jax.models.params import bind, flat_state, is_adapter
from tests.models.drawn import draw_params

D, E = 16, 4
CONFIG = ModelConfig(
    family="any",
    vocab_size=24,
    d_model=D,
    n_layers=3,
    n_heads=2,
    n_kv_heads=2,
    head_dim=8,
    norm_eps=0.02,
    n_experts=E,
    top_k=2,
    expert_dim=8,
    dense_dim=12,
    layers=(LayerConfig(kind="dense"), LayerConfig(), LayerConfig()),
)
GPT_OSS = replace(
    CONFIG, activation="clamped", expert_bias=True, routing=RoutingConfig("softmax_chosen", bias=True)
)
LLAMA4 = replace(CONFIG, top_k=1, routing=RoutingConfig("sigmoid_input"), shared_dim=8)
QWEN2 = replace(CONFIG, shared_dim=20, shared_gate=True)


def random_arrays(module, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {name: variable.get_value().shape for name, variable in flat_state(module).items()}
    return {name: (0.5 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


@partial(jax.jit, static_argnums=0, static_argnames="compute")
def run_moe(config, arrays, x, forced=None, everywhere=None, *, compute):
    """The output and the router's logits of one layer."""
    return bind(MoE(config), arrays)(x, forced, everywhere, Place(), compute)


def states(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, 5, D)).astype(np.float32)


def swiglu(x, gate, up, down):
    return ((x @ gate) / (1 + np.exp(-(x @ gate))) * (x @ up)) @ down


def test_dense_feed_forward_is_swiglu():
    arrays, x = random_arrays(FeedForward(CONFIG, 12)), states()
    assert {name: a.shape for name, a in arrays.items()} == {
        "gate_proj.kernel": (D, 12),
        "up_proj.kernel": (D, 12),
        "down_proj.kernel": (12, D),
    }
    expected = swiglu(x, *(arrays[f"{name}_proj.kernel"] for name in ("gate", "up", "down")))
    found = jax.jit(lambda arrays, x: bind(FeedForward(CONFIG, 12), arrays)(x))(arrays, x)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def moe_by_hand(config: ModelConfig, a: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Token by token, for the three configs above."""
    y = np.zeros_like(x)
    for place in np.ndindex(*x.shape[:-1]):
        logits = x[place] @ a["router.kernel"]
        chosen = np.argsort(-logits)[: config.top_k]
        for e in chosen:
            experts = (a[f"experts.{name}"][e] for name in ("gate", "up", "down"))
            if config.routing.kind == "sigmoid_input":
                y[place] += swiglu(x[place] / (1 + np.exp(-logits[e])), *experts)
            else:
                y[place] += np.exp(logits[e]) / np.exp(logits).sum() * swiglu(x[place], *experts)
    if config.shared_dim:
        shared = swiglu(x, *(a[f"shared.{name}_proj.kernel"] for name in ("gate", "up", "down")))
        gate = 1 / (1 + np.exp(-(x @ a["shared_gate.kernel"]))) if config.shared_gate else 1
        y += gate * shared
    return y


@pytest.mark.parametrize("config", [CONFIG, LLAMA4, QWEN2], ids=["routed", "ungated", "gated"])
@pytest.mark.parametrize("kernel", ["dense", "blocks"])
def test_shared_expert_is_added_to_the_routed_output(config, kernel):
    arrays, x = random_arrays(MoE(config)), states()
    y, logits = run_moe(config, arrays, x, compute=Compute(experts=kernel))
    np.testing.assert_allclose(y, moe_by_hand(config, arrays, x), atol=1e-5)
    np.testing.assert_allclose(logits, x @ arrays["router.kernel"], atol=1e-5)


def test_forced_logits_route_by_the_same_rule_and_leave_the_routers_own_logits():
    config = replace(CONFIG, routing=RoutingConfig("sigmoid", correction_bias=True))
    arrays, x, compute = random_arrays(MoE(config)), states(), Compute(experts="dense")
    own, logits = map(np.asarray, run_moe(config, arrays, x, compute=compute))
    forced, everywhere = -2 * logits, np.ones(x.shape[:2], bool)
    y, still = run_moe(config, arrays, x, forced, everywhere, compute=compute)
    np.testing.assert_array_equal(still, logits)
    arrays["router.kernel"] *= -2
    np.testing.assert_allclose(y, run_moe(config, arrays, x, compute=compute)[0], atol=1e-5)
    assert np.abs(y - own).max() > 1e-2


@pytest.mark.parametrize("wide", [False, True])
def test_combine_weights_are_rounded_in_bfloat16_unless_the_family_keeps_them(wide):
    """One expert that returns a power of two shows the weight itself."""
    config = replace(CONFIG, n_experts=2, top_k=1, routing=RoutingConfig(float32_weights=wide))
    arrays = {name: np.zeros_like(a) for name, a in random_arrays(MoE(config)).items()}
    arrays["router.kernel"][0] = [1.0, 0.0]
    arrays["experts.gate"][:, 0], arrays["experts.up"][:, 0], arrays["experts.down"][:] = 64, 1, 1 / 512
    x = np.eye(1, D, dtype=jnp.bfloat16)[None]
    y, _ = run_moe(config, arrays, x, compute=Compute("bfloat16", "dense"))
    weight = np.float32(1 / (1 + np.exp(-1.0)))
    kept = weight if wide else weight.astype(jnp.bfloat16).astype(np.float32)
    expected = np.float32(64 * 8 / 512) * kept
    np.testing.assert_array_equal(np.asarray(y)[0, 0, 0], expected.astype(jnp.bfloat16))


def _params(config: ModelConfig) -> dict[str, jax.Array]:
    params = draw_params(config)
    rng = np.random.default_rng(1)
    biases = [name for name in params if name.endswith("bias")]
    random = {n: jnp.asarray(rng.normal(size=params[n].shape), jnp.float32) for n in biases}
    return {**params, **random}


run = jax.jit(forward, static_argnums=0, static_argnames="compute")
TOKENS = np.random.default_rng(2).integers(0, 24, (2, 6), np.int32)


@pytest.mark.parametrize("config", [GPT_OSS, LLAMA4], ids=["gpt_oss", "llama4"])
def test_stacks_read_in_place_give_what_layers_alone_give(config):
    """Frozen weights are read from the stack of layers; trainable ones are scanned; dense computes all."""
    params = _params(config)

    def logits(weights, kernel):
        return np.asarray(run(config, weights, TOKENS, compute=Compute(experts=kernel)).logits)

    expected = logits(Weights({}, params), "dense")
    for weights in (Weights.of(params), Weights({}, params)):
        np.testing.assert_allclose(logits(weights, "blocks"), expected, atol=2e-5)
    for name in [name for name in params if name.endswith("_bias")]:
        without = Weights.of({**params, name: np.zeros_like(params[name])})
        assert np.abs(logits(without, "blocks") - expected).max() > 1e-2, name


MLA = MlaConfig(q_rank=6, kv_rank=6, nope_dim=4, rope_dim=4, v_dim=4)
GQA = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = ("gate_proj", "up_proj", "down_proj")
ROUTED = ("gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
LATENT = ("kv_a_proj_with_mqa", "kv_b_proj")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CONFIG, (*GQA, *DENSE, *ROUTED)),
        (replace(CONFIG, layers=(LayerConfig(),) * 3), (*GQA, *ROUTED)),
        (replace(CONFIG, n_experts=0, layers=(LayerConfig(kind="dense"),) * 3), (*GQA, *DENSE)),
        (QWEN2, (*GQA, *DENSE, "shared_expert_gate", *ROUTED)),
        (replace(CONFIG, mla=MLA), ("o_proj", "q_a_proj", "q_b_proj", *LATENT, *DENSE, *ROUTED)),
        (replace(CONFIG, mla=replace(MLA, q_rank=None)), ("q_proj", "o_proj", *LATENT, *DENSE, *ROUTED)),
    ],
    ids=["mixed", "moe", "dense", "shared", "latent", "latent, full q"],
)
def test_targets_are_those_of_the_declared_projections(config, expected):
    assert sorted(lora_targets(config)) == sorted(expected)
    with pytest.raises(InputError, match="conv") as error:
        with_adapters(config, LoraConfig(targets=("o_proj", "conv")))
    assert all(target in str(error.value) for target in expected)
    assert with_adapters(config, LoraConfig(targets=expected)).lora.targets == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CONFIG, ("q_proj", "v_proj")),
        (replace(CONFIG, mla=MLA), ("q_a_proj", "q_b_proj", *LATENT)),
        (replace(CONFIG, mla=replace(MLA, q_rank=None)), ("q_proj", *LATENT)),
    ],
    ids=["grouped", "latent", "latent, full q"],
)
def test_unnamed_targets_are_the_attentions_own(config, expected):
    adapted = with_adapters(config, LoraConfig(rank=2))
    assert adapted.lora == LoraConfig(rank=2, targets=expected)
    assert f"on {', '.join(expected)}: " in describe(adapted)
    with pytest.raises(InputError, match="no LoRA target is named"):
        with_adapters(config, LoraConfig(targets=()))


def test_a_target_of_other_models_is_refused():
    with pytest.raises(InputError, match="v_proj"):
        with_adapters(replace(CONFIG, mla=MLA), LoraConfig(targets=("q_b_proj", "v_proj")))
    with pytest.raises(InputError, match="kv_b_proj"):
        with_adapters(CONFIG, LoraConfig(targets=("kv_b_proj",)))


def test_a_target_adapts_dense_layers_and_shared_experts_alike():
    config, _ = add_adapters(QWEN2, {}, LoraConfig(2, 2.0, ("down_proj",)), jax.random.key(0))
    adapters = {name for name in declare(config) if name.endswith("lora_a")}
    assert adapters == {"segments.0.0.mlp.down_proj.lora_a", "segments.1.0.moe.shared.down_proj.lora_a"}
    assert "on down_proj: 3 projections" in describe(config)


@pytest.mark.parametrize(
    "config",
    [GPT_OSS, QWEN2, replace(LLAMA4, mla=MLA)],
    ids=["gpt_oss", "qwen2_moe", "latent"],
)
def test_merged_adapters_give_the_logits_of_the_adapters_on_every_target(config):
    params, lora = _params(config), LoraConfig(3, 6.0, lora_targets(config))
    adapted_config = with_adapters(config, lora)
    drawn = draw_params(adapted_config, 2, updates=0.2)
    adapted = {**params, **{name: value for name, value in drawn.items() if is_adapter(name)}}
    merged_config, merged = merge_adapters(adapted_config, adapted)
    assert merged_config == config and merged.keys() == params.keys()

    def logits(config, params):
        return np.asarray(run(config, Weights.of(params), TOKENS, compute=Compute(experts="blocks")).logits)

    expected = logits(adapted_config, adapted)
    np.testing.assert_allclose(logits(config, merged), expected, atol=2e-4)
    assert np.abs(logits(config, params) - expected).max() > 1e-2
