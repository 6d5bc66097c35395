"""The anchored form: its term by hand, its choice of prompts, what it refuses."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safemoe_jax import defenses
from safemoe_jax.checkpoints.reference import read_reference
from safemoe_jax.defenses import DefenceContext
from safemoe_jax.defenses.safemoe_anchored import rotation
from safemoe_jax.errors import InputError
from safemoe_jax.models.params import Weights
from safemoe_jax.models.transformer import Output
from safemoe_jax.training.config import DefenceConfig
from tests.training.tiny import N_BENIGN, N_HARMFUL, World


@pytest.fixture(scope="module")
def context(world: World) -> DefenceContext:
    return DefenceContext(world.config, 4, references=(read_reference(world.reference),), seed=7)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = np.asarray(logits, np.float64)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_the_term_by_hand(world, context):
    """coefficient * mean_S [sum_l KL(routing) + KL(next token)] on made-up outputs, in float64 numpy."""
    hook = defenses.build(DefenceConfig("safemoe_anchored", coefficient=2.5), context).loss
    config, reference = world.config, context.references[0]
    rng = np.random.default_rng(1)
    rows, columns, index = np.array([0, 1, 1]), np.array([4, 2, 5]), np.array([3, 0, N_HARMFUL + 1])
    router = rng.normal(size=(2, 2, 6, config.n_experts)).astype(np.float32)
    hidden = rng.normal(size=(2, 6, config.d_model)).astype(np.float32)
    weights = np.float32([0.5, 0.25, 0.25])
    batch = {"prompt_row": rows, "prompt_column": columns, "prompt_index": index, "prompt_weights": weights}
    output = Output(None, jnp.asarray(router), jnp.asarray(hidden))
    value, metrics = hook.term(config, Weights.of(world.params), output, batch, hook.constants)

    aligned, current = log_softmax(reference.router_logits[:, index]), log_softmax(router[:, rows, columns])
    routing = np.sum(np.exp(aligned) * (aligned - current), axis=(0, 2))
    p0 = np.asarray(reference.log_probs_SV()[index], np.float64)
    p = log_softmax(hidden[rows, columns] @ np.asarray(world.params["lm_head.kernel"], np.float64))
    token = np.sum(np.exp(p0) * (p0 - p), axis=-1)
    assert float(metrics["routing_penalty"]) == pytest.approx(np.sum(weights * routing), rel=1e-5)
    assert float(metrics["anchor"]) == pytest.approx(np.sum(weights * token), rel=1e-4)
    assert float(value) == pytest.approx(2.5 * np.sum(weights * (routing + token)), rel=1e-4)


def test_every_step_takes_as_many_of_both_kinds_each_once_before_any_twice():
    choose = rotation((10, 6), 2, seed=3)
    steps = [choose(step) for step in range(15)]
    assert all([i < 10 for i in step] == [True, True, False, False] for step in steps)
    assert Counter(i for step in steps[:5] for i in step if i < 10) == Counter(range(10))
    assert Counter(i for step in steps[:3] for i in step if i >= 10) == Counter(range(10, 16))
    assert Counter(i for step in steps for i in step if i >= 10) == Counter(dict.fromkeys(range(10, 16), 5))
    assert steps[:5] != steps[5:10]
    assert [rotation((10, 6), 2, seed=3)(step) for step in reversed(range(15))] == steps[::-1]
    assert [rotation((10, 6), 2, seed=4)(step) for step in range(15)] != steps


def test_prompts_are_those_of_the_reference_harmful_ones_first(context):
    hook = defenses.build(DefenceConfig("safemoe_anchored"), context).loss
    assert len(hook.prompts) == N_HARMFUL + N_BENIGN
    for ours, theirs in zip(hook.prompts, context.references[0].prompts, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(hook.prompts_for_step(0)) == 4


def test_two_files_are_as_good_as_one(context):
    both = context.references[0]

    def part(group: int):
        rows = np.flatnonzero(both.group == group)
        return dataclasses.replace(
            both,
            prompts=tuple(both.prompts[row] for row in rows),
            router_logits=both.router_logits[:, rows],
            group=both.group[rows],
            log_probs=dataclasses.replace(
                both.log_probs,
                **{f.name: getattr(both.log_probs, f.name)[rows] for f in dataclasses.fields(both.log_probs)},
            ),
        )

    config = DefenceConfig("safemoe_anchored")
    one = defenses.build(config, context).loss.constants
    two = defenses.build(config, dataclasses.replace(context, references=(part(0), part(1)))).loss.constants
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_missing_benign_prompts_or_log_probabilities_are_refused(context):
    reference = context.references[0]
    harmful_only = dataclasses.replace(reference, group=np.zeros_like(reference.group))
    with pytest.raises(InputError, match="no benign prompts"):
        defenses.build(
            DefenceConfig("safemoe_anchored"), dataclasses.replace(context, references=(harmful_only,))
        )
    bare = dataclasses.replace(reference, log_probs=None)
    lacking = dataclasses.replace(context, references=(bare,), reference_files=("d_h.safetensors",))
    with pytest.raises(InputError, match="no next-token log-probabilities") as caught:
        defenses.build(DefenceConfig("safemoe_anchored"), lacking)
    assert caught.value.where == "d_h.safetensors"
