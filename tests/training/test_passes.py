"""A run whose routing passes change nothing is no defended run, and is refused."""

from __future__ import annotations

import dataclasses

import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.training.config import OptimizerConfig
from safemoe_jax.workflows.train import finetune, plan_run

# 18 samples in batches of 4: an epoch has 4 whole steps.


@pytest.mark.parametrize(
    ("t_reg", "changes", "told"),
    [
        (5, {"steps": 4}, "t_reg is 5, and in its 4 task steps"),
        (4, {"steps": 4}, "t_reg is 4, and in its 4 task steps"),
        (None, {"epochs": 0.5}, r"t_reg is null \(the ends of epochs\), and in its 2 task steps"),
        (None, {"epochs": 1.0}, r"t_reg is null \(the ends of epochs\), and in its 4 task steps"),
        (1, {"steps": 1, "optimizer": OptimizerConfig(1e-2, warmup=0.0)}, "t_reg is 1, and in its 1 task"),
    ],
)
def test_a_run_whose_passes_change_nothing_is_refused(world, tmp_path, t_reg, changes, told):
    config = world.train_config(
        str(tmp_path / "run"), defence=world.defence("safemoe", t_reg=t_reg), **changes
    )
    with pytest.raises(InputError, match=told) as caught:
        finetune(config)
    assert "defence.t_reg" in caught.value.where and not (tmp_path / "run").exists()


def test_what_the_refusal_recommends_is_accepted(world, tmp_path):
    config = world.train_config(str(tmp_path / "run"), defence=world.defence("safemoe"), epochs=1.0)
    with pytest.raises(InputError) as caught:
        plan_run(config)
    assert "t_reg from 1 to 3" in caught.value.expected
    plan_run(dataclasses.replace(config, defence=world.defence("safemoe", t_reg=3)))
    plan_run(dataclasses.replace(config, epochs=2.0))
    plan_run(dataclasses.replace(config, optimizer=OptimizerConfig(1e-2, schedule="constant")))


def test_the_published_setting_is_accepted(world, tmp_path):
    """Three epochs, a pass at the end of each; only the last one has rate 0."""
    config = world.train_config(str(tmp_path / "run"), defence=world.defence("safemoe"), epochs=3.0)
    plan, _, _ = plan_run(config)
    assert plan.epoch_ends == (4, 9, 13)
