"""AdamW against optax and by hand; schedules against the published facts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from safemoe_jax.training.config import OptimizerConfig
from safemoe_jax.training.optimizer import decays, hyper, init_moments, learning_rate, update

PARAMS = {"a.kernel": jnp.asarray([[0.5, -1.0], [2.0, 0.25]]), "a.norm.scale": jnp.asarray([1.0, 2.0])}


def gradients(steps: int) -> list[dict[str, jax.Array]]:
    """Gradients of norms below and above 1."""
    keys = jax.random.split(jax.random.key(0), steps)
    return [
        {name: (0.1 + i) * jax.random.normal(jax.random.fold_in(key, len(name)), value.shape)
         for name, value in PARAMS.items()}
        for i, key in enumerate(keys)
    ]  # fmt: skip


def test_many_steps_equal_optax():
    config = OptimizerConfig(weight_decay=0.1, clip_norm=1.0)
    rates = [0.0, 1e-2, 3e-3, 1e-3, 0.0]
    reference = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            optax.join_schedules([optax.constant_schedule(r) for r in rates], list(range(1, 5))),
            weight_decay=0.1,
            mask={"a.kernel": True, "a.norm.scale": False},
        ),
    )
    ours, moments = PARAMS, init_moments(PARAMS)
    theirs, state = PARAMS, reference.init(PARAMS)
    for gradient, rate in zip(gradients(5), rates, strict=True):
        ours, moments, _ = update(gradient, moments, ours, hyper(config, rate, config.clip_norm))
        change, state = reference.update(gradient, state, theirs)
        theirs = optax.apply_updates(theirs, change)
    for name in PARAMS:
        # torch's clipping divides by the norm + 1e-6, optax's by the norm.
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-6, err_msg=name)


def test_first_step_by_hand():
    config = OptimizerConfig(weight_decay=0.01, clip_norm=None, eps=1e-8)
    gradient = {"a.kernel": jnp.asarray([[3.0, -4.0], [0.0, 0.0]]), "a.norm.scale": jnp.asarray([12.0, 0.0])}
    moved, _, norm = update(gradient, init_moments(PARAMS), PARAMS, hyper(config, 0.1, None))
    assert float(norm) == pytest.approx(13.0)
    # Bias correction makes the first step's size the sign of the gradient; decay is multiplied by the rate.
    expected = PARAMS["a.kernel"] * (1 - 0.1 * 0.01) - 0.1 * jnp.asarray([[1.0, -1.0], [0.0, 0.0]])
    np.testing.assert_allclose(moved["a.kernel"], expected, rtol=1e-4)
    np.testing.assert_allclose(moved["a.norm.scale"], [0.9, 2.0], rtol=1e-4)


@pytest.mark.parametrize(
    ("decayed", "names"),
    [
        (
            False,
            "final_norm.scale attention.q_norm.scale attention.kv_a_norm.scale input_norm.bias lm_head.bias",
        ),
        (False, "attention.q_proj.bias moe.router.bias moe.experts.gate_bias moe.experts.down_bias"),
        (True, "embed.embedding lm_head.kernel attention.sinks moe.experts.gate moe.router.kernel"),
        (True, "attention.q_proj.lora_a moe.experts.gate_up_lora_b"),
    ],
)
def test_norms_and_biases_have_no_decay(decayed, names):
    """As Trainer: every parameter decays whose name has neither bias nor a norm in it."""
    assert {decays(f"segments.0.0.{name}") for name in names.split()} == {decayed}


def test_clipping_scales_only_long_gradients():
    config, gradient = OptimizerConfig(), {"a.kernel": jnp.full((2, 2), 3.0), "a.norm.scale": jnp.zeros(2)}
    _, clipped, norm = update(gradient, init_moments(PARAMS), PARAMS, hyper(config, 0.1, 1.5))
    _, whole, _ = update(gradient, init_moments(PARAMS), PARAMS, hyper(config, 0.1, 100.0))
    _, free, _ = update(gradient, init_moments(PARAMS), PARAMS, hyper(config, 0.1, None))
    assert float(norm) == pytest.approx(6.0)
    np.testing.assert_allclose(clipped.mu["a.kernel"], 0.1 * 3.0 * 1.5 / 6.0, rtol=1e-5)
    np.testing.assert_array_equal(whole.mu["a.kernel"], free.mu["a.kernel"])


def test_a_step_at_rate_0_changes_no_parameter():
    moved, _, _ = update(gradients(1)[0], init_moments(PARAMS), PARAMS, hyper(OptimizerConfig(), 0.0, 1.0))
    for name in PARAMS:
        np.testing.assert_array_equal(moved[name], PARAMS[name])


def test_published_cosine_schedule():
    """516 steps, 3 % warm-up rounded up; rates at the ends of epochs as the method's description has them."""
    config, total = OptimizerConfig(learning_rate=1e-4, schedule="cosine", warmup=0.03), 516
    rates = np.array([learning_rate(config, step, total) for step in range(total + 1)])
    assert rates[0] == 0
    assert int(np.argmax(rates)) == math.ceil(0.03 * total) == 16
    assert rates[16] == 1e-4
    assert rates[total] == 0
    assert rates[172] / 1e-4 == pytest.approx(0.77, abs=0.02)
    assert rates[344] / 1e-4 == pytest.approx(0.26, abs=0.02)
    assert np.all(np.diff(rates[16:]) < 0)


def test_linear_and_constant_schedules():
    linear = OptimizerConfig(learning_rate=2.0, schedule="linear", warmup=0.1)
    assert [learning_rate(linear, step, 20) for step in (0, 1, 2, 11, 20)] == [0, 1, 2, 1, 0]
    constant = OptimizerConfig(learning_rate=2.0, schedule="constant", warmup=0.0)
    assert {learning_rate(constant, step, 20) for step in range(21)} == {2.0}
