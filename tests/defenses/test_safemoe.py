"""The published form: schedule of the passes, the loss, which constants go in."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from safemoe_jax import defenses
from safemoe_jax.checkpoints.reference import read_reference
from safemoe_jax.defenses import DefenceContext
from safemoe_jax.errors import InputError
from safemoe_jax.models.config import Compute, LoraConfig
from safemoe_jax.models.lora import add_adapters
from safemoe_jax.models.params import Weights, is_adapter, split_trainable
from safemoe_jax.models.transformer import forward
from safemoe_jax.training.config import DefenceConfig
from tests.training.tiny import N_HARMFUL, World, padded


@pytest.fixture(scope="module")
def context(world: World) -> DefenceContext:
    return DefenceContext(world.config, 4, references=(read_reference(world.reference),), clip_norm=1.0)


@pytest.fixture(scope="module")
def moved(world: World):
    """Config and weights of a model whose routing has drifted."""
    config, params = add_adapters(world.config, world.params, LoraConfig(4), jax.random.key(0))
    changed = {
        name: 0.5 * jax.random.normal(jax.random.key(3), value.shape) if is_adapter(name) else value
        for name, value in params.items()
    }
    return config, split_trainable(config, changed)


def test_the_pass_holds_the_harmful_prompts_in_file_order_in_training_batches(context):
    hook = defenses.build(DefenceConfig("safemoe"), context).interleave
    assert [batch["prompt_index"].tolist() for batch in hook.batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len({batch["tokens"].shape for batch in hook.batches}) <= 2
    for batch in hook.batches:
        for row, column, index in zip(
            batch["prompt_row"], batch["prompt_column"], batch["prompt_index"], strict=True
        ):
            prompt = context.references[0].prompts[index]
            start = column + 1 - len(prompt)
            np.testing.assert_array_equal(batch["tokens"][row, start : column + 1], prompt)
    assert hook.clip_norm is None


def test_schedule_and_clipping_follow_the_configuration(context):
    hook = defenses.build(DefenceConfig("safemoe", t_reg=3, clip=True), context).interleave
    assert [step for step in range(1, 10) if hook.due(step)] == [3, 6, 9]
    assert hook.clip_norm == 1.0
    assert defenses.build(DefenceConfig("safemoe"), context).interleave.due is None


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_loss_is_the_divergence_at_last_prompt_tokens(context, moved, direction):
    """Against unpacked prompts and the formula written out in float64 numpy."""
    config, weights = moved
    chosen = DefenceConfig("safemoe", temperature=0.5, direction=direction, layers=(1,))
    hook = defenses.build(chosen, context).interleave
    loss = jax.jit(hook.loss, static_argnums=(0, 4))
    reference = context.references[0]
    tokens, mask = padded(list(reference.prompts[:N_HARMFUL]))
    out = jax.jit(forward, static_argnums=0)(
        config, Weights.of(weights.merged()), tokens, attention_mask=mask
    )
    last = mask.sum(axis=1) - 1

    def log_softmax(logits) -> np.ndarray:
        x = np.asarray(logits, np.float64) / 0.5
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    for batch in hook.batches:
        rows = batch["prompt_index"]
        current = log_softmax(out.router_logits[1, rows, last[rows]])
        aligned = log_softmax(reference.router_logits[1, rows])
        p, q = (aligned, current) if direction == "forward" else (current, aligned)
        expected = np.sum(np.exp(p) * (p - q), axis=-1).mean()
        value, metrics = loss(config, weights, batch, hook.constants, Compute())
        assert float(value) == pytest.approx(expected, rel=1e-4)
        assert float(metrics["routing_penalty"]) == float(value) > 1e-3


def test_the_aligned_model_has_no_penalty(world, context):
    hook = defenses.build(DefenceConfig("safemoe"), context).interleave
    value, _ = hook.loss(world.config, Weights.of(world.params), hook.batches[0], hook.constants, Compute())
    assert abs(float(value)) < 1e-5


def test_a_defence_without_its_reference_is_refused(world):
    empty = DefenceContext(world.config, 4)
    with pytest.raises(InputError, match="no harmful prompts"):
        defenses.build(DefenceConfig("safemoe"), empty)
    with pytest.raises(InputError, match="no harmful prompts"):
        defenses.build(DefenceConfig("safemoe_anchored"), empty)


def test_an_unknown_defence_or_layer_is_refused(context):
    with pytest.raises(InputError, match="unknown defence 'safe_moe'"):
        defenses.build(DefenceConfig("safe_moe"), context)
    with pytest.raises(InputError, match="layer 2 has no router"):
        defenses.build(DefenceConfig("safemoe", layers=(2,)), context)
