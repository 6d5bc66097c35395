"""Generation against whole forward passes, one prompt and one token at a time, without a cache."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.evaluation.batches import batch_prompts, length_bucket
from safemoe_jax.evaluation.generate import ForcedRouting, generate, generate_batch
from safemoe_jax.evaluation.readout import (
    compare_routing,
    read_routing,
    read_routing_and_next_token,
)
from safemoe_jax.models import RoutingOverride, Weights, forward
from safemoe_jax.models.config import RoutingConfig
from tests.evaluation.small_models import CONFIG, random_prompts, small_model

LENGTHS = (3, 20, 7, 1, 12)
PADDED = 40  # one shape for all reference passes; causal attention never sees what stands behind
whole_pass = jax.jit(forward, static_argnums=0)


def pass_over(model, tokens, override=None):
    padded = np.zeros((1, PADDED), np.int32)
    padded[0, : len(tokens)] = tokens
    return whole_pass(model.config, Weights.of(model.params), padded, override=override)


def naive_greedy(model, prompt, n, aligned=None, where=None):
    tokens = list(prompt)
    for _ in range(n):
        override = None
        if aligned is not None:
            mask = np.zeros((1, PADDED), bool)
            mask[0, len(prompt) - 1 if where == "last_token" else 0 : len(prompt)] = True
            override = RoutingOverride(pass_over(aligned, prompt).router_logits, mask)
        tokens.append(int(np.argmax(pass_over(model, tokens, override).logits[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_greedy_is_the_argmax_of_whole_passes():
    model, prompts = small_model(), random_prompts(LENGTHS)
    got = generate(model, prompts, max_new_tokens=9, batch_size=2, stop_tokens=())
    assert got == [naive_greedy(model, prompt, 9) for prompt in prompts]


def test_decoding_is_given_the_experts_of_each_layer_in_place(monkeypatch):
    """What keeps weights from being copied in every step; the answers alone would not show it missing."""
    seen = []

    def spy(config, weights, *arguments, **options):
        seen.append(weights.layers)
        return generate_batch(config, weights, *arguments, **options)

    monkeypatch.setattr("safemoe_jax.evaluation.generate.generate_batch", spy)
    generate(small_model(), random_prompts(LENGTHS), max_new_tokens=9, batch_size=2, stop_tokens=())
    assert len(seen) == 3
    assert all({name.rsplit(".", 1)[1] for name in layers} == {"gate", "up", "down"} for layers in seen)
    assert all(len(views) == CONFIG.n_layers for layers in seen for views in layers.values())


def test_answers_end_before_the_first_stop_token():
    model, prompts = small_model(), random_prompts(LENGTHS)
    free = generate(model, prompts, max_new_tokens=9, stop_tokens=())
    stops = (free[0][2], free[1][4])
    cut = [next((i for i, token in enumerate(row) if token in stops), 9) for row in free]
    assert min(cut) < 9
    got = generate(model, prompts, max_new_tokens=9, stop_tokens=stops)
    assert got == [row[:end] for row, end in zip(free, cut, strict=True)]


@pytest.mark.parametrize("where", ["last_token", "prompt"])
def test_forced_routing_is_followed_on_the_prompt_only(where):
    model, aligned, prompts = small_model(0), small_model(1), random_prompts(LENGTHS)
    got = generate(model, prompts, max_new_tokens=4, stop_tokens=(), override=ForcedRouting(aligned, where))
    assert got == [naive_greedy(model, prompt, 4, aligned, where) for prompt in prompts]
    assert got != generate(model, prompts, max_new_tokens=4, stop_tokens=())


def test_sampling_does_not_depend_on_batching_but_on_the_seed():
    model, prompts = small_model(), random_prompts(LENGTHS)
    options = {"max_new_tokens": 8, "temperature": 1.0, "stop_tokens": ()}
    first = generate(model, prompts, seed=3, batch_size=5, **options)
    assert generate(model, prompts, seed=3, batch_size=2, **options) == first
    assert generate(model, prompts, seed=4, batch_size=5, **options) != first


def test_samples_are_distributed_as_the_tempered_softmax():
    model, prompt = small_model(), random_prompts([6])[0]
    n, temperature = 2_000, 1.5
    drawn = generate(
        model, [prompt] * n, max_new_tokens=1, temperature=temperature, batch_size=500, stop_tokens=()
    )
    logits = np.float64(pass_over(model, prompt).logits[0, len(prompt) - 1]) / temperature
    expected = n * np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    counts = np.bincount(np.ravel(drawn), minlength=CONFIG.vocab_size)
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < 49.7  # chi-square with 23 degrees of freedom exceeds this once in 1,000


def test_one_compilation_a_bucket():
    model = small_model()
    options = {"max_new_tokens": 3, "stop_tokens": (0,), "batch_size": 4}
    generate(model, random_prompts([5, 9, 16, 2]), **options)
    before = generate_batch._cache_size()
    generate(model, random_prompts([1, 16, 3, 8], seed=1), **options)
    assert generate_batch._cache_size() == before
    generate(model, random_prompts([17, 16, 3, 8], seed=1), **options)
    assert generate_batch._cache_size() == before + 1


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": [np.zeros(0, np.int32)]}, "prompt 0"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 1e-7}, "temperature"),
        ({"batch_size": 0}, "batch_size"),
        ({"override": ForcedRouting(small_model(2, replace(CONFIG, n_experts=6)))}, "random 2"),
    ],
)
def test_bad_arguments_are_named(change, where):
    arguments = {"prompts": random_prompts([3]), "max_new_tokens": 2, "stop_tokens": ()}
    with pytest.raises(InputError) as error:
        generate(small_model(), **(arguments | change))
    assert error.value.where == where


def test_batches_hold_every_prompt_once_in_few_shapes():
    lengths = np.random.default_rng(0).integers(1, 500, 101)
    prompts = random_prompts(lengths)
    batches = batch_prompts(prompts, 32, multiple=4)
    assert sorted(np.concatenate([batch.index for batch in batches])) == list(range(101))
    for batch in batches:
        assert len(batch.tokens) % 4 == 0 and len(batch.index) <= len(batch.tokens) <= 32
        for row, prompt in enumerate(batch.index):
            real = batch.tokens[row][batch.mask[row] == 1]
            np.testing.assert_array_equal(real, prompts[prompt])
            assert np.all(np.diff(batch.mask[row]) <= 0)
    assert len({batch.tokens.shape for batch in batches}) <= len(batches)


def test_length_buckets():
    buckets = [length_bucket(n) for n in range(1, 600)]
    assert sorted(set(buckets)) == [16, 32, 64, 96, 128, 192, 256, 384, 512, 768]
    assert all(n <= bucket for n, bucket in enumerate(buckets, start=1))


def test_read_out_is_the_last_position_of_a_whole_pass():
    model, prompts = small_model(), random_prompts(LENGTHS)
    passes = [pass_over(model, prompt) for prompt in prompts]
    want_LSE = np.stack(
        [out.router_logits[:, 0, len(p) - 1] for out, p in zip(passes, prompts, strict=True)], axis=1
    )
    logits_SV = np.stack([out.logits[0, len(p) - 1] for out, p in zip(passes, prompts, strict=True)])
    want_SV = np.log(np.exp(logits_SV) / np.exp(logits_SV).sum(-1, keepdims=True))
    routing_LSE, log_probs_SV = read_routing_and_next_token(model, prompts, batch_size=2)
    np.testing.assert_allclose(read_routing(model, prompts, batch_size=3), want_LSE, atol=1e-5)
    np.testing.assert_allclose(routing_LSE, want_LSE, atol=1e-5)
    np.testing.assert_allclose(log_probs_SV, want_SV, atol=1e-5)


def test_comparison_of_read_outs():
    rng = np.random.default_rng(0)
    student, reference = rng.normal(size=(2, CONFIG.n_layers, 7, 4))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (reference, student))
    kl_LS = (p * np.log(p / q)).sum(-1)
    found = compare_routing(student, reference, small_model())
    np.testing.assert_allclose(found["drift_by_layer"], kl_LS.mean(1), rtol=1e-4)
    np.testing.assert_allclose(found["drift"], kl_LS.mean(), rtol=1e-4)
    half = 1.96 * kl_LS.mean(0).std(ddof=1) / np.sqrt(7)
    np.testing.assert_allclose(np.diff(found["drift_interval"])[0], 2 * half, rtol=1e-3)
    assert found["n"] == 7
    same = compare_routing(student, student, small_model())
    assert same["drift"] < 1e-6 and same["overlap"] == 1.0


def test_overlap_is_of_the_experts_that_each_network_chooses_itself():
    """Raw logits name experts 0 and 1, corrections and groups others; a second model has its own."""
    routing = RoutingConfig("sigmoid", correction_bias=True, groups=2, top_groups=1, group_score="max")
    model = small_model(config=replace(CONFIG, routing=routing))
    name = "segments.0.0.moe.router.correction_bias"
    model.params[name] = jnp.asarray([[0.0, 0, 2, 0], [0, 0, 0, 0]])
    here = np.asarray([[[3.0, 2, 1, 0]], [[3, -1, 2, -1]]])
    # Layer 0: the correction puts expert 2's group first; layer 1: the group of expert 0, with expert 1.
    there = np.asarray([[[1.0, 0, 3, 2]], [[2, 3, 0, 0]]])
    found = compare_routing(here, there, model)
    assert found["overlap_by_layer"] == [1.0, 1.0]
    other = small_model(config=model.config)
    other.params[name] = jnp.asarray([[2.0, 0, 0, 0], [0, 0, 2, 0]])
    assert compare_routing(here, there, model, other)["overlap_by_layer"] == [0.0, 0.0]
    with pytest.raises(InputError, match="router logits of 1 layers"):
        compare_routing(here[:1], there[:1], model)


def test_a_mesh_gives_the_same_answers(repository):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-m", "tests.evaluation.on_a_mesh"]
    run = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["devices"] == 4
    assert found["split"] == found["split, own routing forced"] == found["whole"]
    assert found["difference"] < 1e-5
