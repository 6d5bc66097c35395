"""The compiled steps: the loss is the plain one, parts add up, both kinds of step share one state."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safemoe_jax.data.chat import encode_samples, load_tokenizer
from safemoe_jax.data.pipeline import TrainPipeline
from safemoe_jax.data.sources import SourceConfig, read_source
from safemoe_jax.models.config import Compute, LoraConfig
from safemoe_jax.models.lora import add_adapters
from safemoe_jax.models.params import Weights, split_trainable
from safemoe_jax.models.transformer import forward
from safemoe_jax.parallel.mesh import MeshConfig, make_mesh
from safemoe_jax.training import step as step_module
from safemoe_jax.training.config import OptimizerConfig
from safemoe_jax.training.optimizer import hyper
from safemoe_jax.training.state import init_state, state_shardings
from safemoe_jax.training.step import PassStep, TaskConstants, TaskStep
from tests.training.tiny import World, padded

SCALARS = hyper(OptimizerConfig(), 1e-2, 1.0)


@pytest.fixture(scope="module")
def encoded(world: World):
    samples = read_source(SourceConfig(str(world.data)))
    return encode_samples(load_tokenizer(str(world.model)), samples, 96)


@pytest.fixture(scope="module")
def setting(world: World, encoded):
    """Config with adapters that already do something, its weights, and a batch whose rows split into two
    parts."""
    config, params = add_adapters(
        world.config, world.params, LoraConfig(4, 8.0, ("q_proj", "v_proj", "gate")), jax.random.key(0)
    )
    for name in [name for name in params if name.endswith("lora_b")]:
        params[name] = 0.1 * jax.random.normal(jax.random.key(len(name)), params[name].shape)
    prompts = [encoded[i].tokens for i in (1, 3, 5)]
    pipeline = TrainPipeline.build(encoded, 8, row_multiple=2, prompts=prompts)
    return config, split_trainable(config, params), pipeline.batch(0), pipeline.sample_ids(0)


def task_step(config, **changes) -> TaskStep:
    return TaskStep(config, Compute(), make_mesh(MeshConfig()), **changes)


@functools.cache
def compiled_gradient(step: TaskStep):
    """One program for equal steps: several tests compare with the plain one."""
    return jax.jit(step.gradient)


def gradient_of(step: TaskStep, weights: Weights, batch, constants=TaskConstants()):  # noqa: B008
    found = compiled_gradient(step)(weights.frozen, weights.trainable, batch, constants)
    return jax.tree.map(np.asarray, found)


def prompt_term(config, weights, output, batch, constants):
    """A term that depends on the states at the prompts' last tokens."""
    hidden_SD = output.hidden[batch["prompt_row"], batch["prompt_column"]]
    value = constants * jnp.sum(batch["prompt_weights"] * jnp.sum(hidden_SD**2, axis=-1))
    return value, {"term": value}


def test_loss_is_the_mean_cross_entropy_of_answer_tokens_without_packing(setting, encoded):
    config, weights, batch, ids = setting
    _, metrics = gradient_of(task_step(config), weights, batch)
    samples = [encoded[number] for number in ids]
    tokens, mask = padded([sample.tokens for sample in samples])
    logits = jax.jit(forward, static_argnums=0)(config, weights, tokens, attention_mask=mask).logits
    total = count = 0.0
    for row, sample in zip(np.asarray(logits, np.float64), samples, strict=True):
        log_probs = row - np.log(np.exp(row).sum(axis=-1, keepdims=True))
        targets = np.flatnonzero(sample.loss_mask)
        total -= log_probs[targets - 1, sample.tokens[targets]].sum()
        count += len(targets)
    assert float(metrics["loss"]) == pytest.approx(total / count, rel=1e-5)


def test_accumulation_equals_no_accumulation(setting):
    config, weights, batch, _ = setting
    assert len(batch["tokens"]) % 2 == 0 and len(batch["prompt_row"]) == 3
    results = [
        gradient_of(
            task_step(config, accumulation=parts, loss_term=prompt_term), weights, batch, TaskConstants(0.5)
        )
        for parts in (1, 2)
    ]
    (whole, metrics), (parts, part_metrics) = results
    assert float(metrics["term"]) > 0
    for name in metrics:
        assert float(part_metrics[name]) == pytest.approx(float(metrics[name]), rel=1e-6)
    for name in whole:
        scale = float(np.abs(whole[name]).max())
        np.testing.assert_allclose(parts[name], whole[name], atol=1e-6 * max(scale, 1), err_msg=name)


def test_targets_taken_in_turns_give_the_same_loss_and_gradient(setting, monkeypatch):
    config, weights, batch, _ = setting
    whole, metrics = gradient_of(task_step(config), weights, batch)
    rows, targets = batch["targets"].shape
    monkeypatch.setattr(step_module, "LOGIT_BYTES", rows * targets * config.vocab_size * 4 // 3)
    assert step_module._turns((rows, targets), config.vocab_size, 1) == 4
    in_turns = jax.jit(task_step(config).gradient)  # of its own: what is changed is read while tracing
    turns, turn_metrics = in_turns(weights.frozen, weights.trainable, batch, TaskConstants())
    assert float(turn_metrics["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    for name in whole:
        np.testing.assert_allclose(turns[name], whole[name], atol=1e-6, err_msg=name)


def test_load_balancing_adds_its_gradient(setting):
    config, weights, batch, _ = setting
    plain, _ = gradient_of(task_step(config), weights, batch)
    balanced, metrics = gradient_of(task_step(config, router_aux_coef=2.0), weights, batch)
    assert 1.0 < float(metrics["load_balancing"]) < config.n_experts
    router = [name for name in plain if "router" in name]
    assert router and all(np.any(np.abs(balanced[n] - plain[n]) > 1e-5) for n in router)


def test_z_loss_adds_its_gradient_and_is_off_by_default(setting):
    config, weights, batch, _ = setting
    plain, metrics = gradient_of(task_step(config), weights, batch)
    assert not {"load_balancing", "router_z"} & set(metrics)
    both, metrics = gradient_of(task_step(config, router_aux_coef=2.0, router_z_coef=0.5), weights, batch)
    one, _ = gradient_of(task_step(config, router_aux_coef=2.0), weights, batch)
    two, _ = gradient_of(task_step(config, router_z_coef=0.5), weights, batch)
    assert float(metrics["router_z"]) > 0 and float(metrics["load_balancing"]) > 1
    router = [name for name in plain if "router" in name]
    assert router and all(np.any(np.abs(two[n] - plain[n]) > 1e-5) for n in router)
    for name in plain:
        np.testing.assert_allclose(both[name], one[name] + two[name] - plain[name], atol=1e-5, err_msg=name)


def test_both_kinds_of_step_share_state_and_moments(setting):
    config, weights, batch, _ = setting
    mesh = make_mesh(MeshConfig())

    def pass_loss(config, weights, batch, constants, compute):
        return sum(jnp.sum(value) for value in weights.trainable.values()), {}

    state = init_state(weights.trainable, state_shardings(config, weights.trainable, mesh))
    wanted = (
        (task_step(config), batch, TaskConstants()),
        (PassStep(config, Compute(), mesh, pass_loss), {}, None),
    )
    task, routing = step_module.compile_all(wanted, weights.frozen, state)
    one, _ = task(weights.frozen, state, batch, SCALARS, TaskConstants())
    mu = jax.tree.map(np.array, one.moments.mu)  # the next step takes the arrays themselves
    unclipped = hyper(OptimizerConfig(), 1e-2, None)
    two, metrics = routing(weights.frozen, one, {}, unclipped, None)
    assert (int(two.step), int(two.task_step), int(two.moments.count)) == (2, 1, 2)
    size = sum(value.size for value in weights.trainable.values())
    assert float(metrics["grad_norm"]) == pytest.approx(size**0.5, rel=1e-5)
    for name in two.trainable:
        np.testing.assert_allclose(two.moments.mu[name], 0.9 * mu[name] + 0.1, rtol=1e-4, atol=1e-6)


def test_equal_steps_are_compiled_once_in_a_process(setting):
    config, weights, batch, _ = setting
    mesh = make_mesh(MeshConfig())
    state = init_state(weights.trainable, state_shardings(config, weights.trainable, mesh))

    def programs() -> list:
        wanted = (task_step(dataclasses.replace(config)), batch, TaskConstants())
        return step_module.compile_all([wanted, wanted], weights.frozen, state)

    first = programs()
    count = step_module.n_compiled()
    assert first[0] is first[1] and first[0] is programs()[0]
    assert step_module.n_compiled() == count
    new_state, _ = first[0](weights.frozen, state, batch, SCALARS, TaskConstants())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new_state))
