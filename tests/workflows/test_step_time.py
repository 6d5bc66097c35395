"""Steps timed in turns: whose round comes when, what counts, and what a round consists of."""

import dataclasses
from itertools import islice

import pytest

from safemoe_jax.workflows import step_time
from safemoe_jax.workflows.step_time import in_turns, relative_seconds, timed_rounds
from safemoe_jax.workflows.train import plan_run
from tests.training.tiny import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def plan(world):
    """A run of the published defence over 18 samples, 4 a batch."""
    return plan_run(world.train_config("never", defence=world.defence("safemoe", t_reg=2), epochs=1.0))[0]


@pytest.fixture
def ran(monkeypatch):
    """The kinds of program that a round runs, one after another."""
    kinds: list[str] = []
    prepare = step_time.prepare

    def counted(kind, program):
        return lambda *arguments: (kinds.append(kind), program(*arguments))[1]

    def counting(plan, state):
        programs = prepare(plan, state)
        task = {shape: counted("task", program) for shape, program in programs.task.items()}
        passes = [(counted("pass", program), batch) for program, batch in programs.passes]
        return dataclasses.replace(programs, task=task, passes=passes)

    monkeypatch.setattr(step_time, "prepare", counting)
    return kinds


def rounds(name, seconds, order):
    for value in seconds:
        order.append(name)
        yield value


def test_conditions_take_turns_and_their_first_rounds_do_not_count():
    order: list[str] = []
    found = in_turns({"a": rounds("a", [90, 1, 5, 3], order), "b": rounds("b", [0, 2, 2, 8], order)}, 4)
    assert order == ["a", "b"] * 4
    assert found == {"a": 3, "b": 2}


def test_a_round_is_its_task_steps_and_one_pass(plan, ran):
    n_batches = len(plan.defence.interleave.batches)
    assert all(seconds > 0 for seconds in islice(timed_rounds(plan, 2), 3))
    assert ran == (["task"] * 2 + ["pass"] * n_batches) * 3


def test_a_run_shorter_than_what_is_timed_begins_again(plan, ran, world):
    assert plan.pipeline.total_steps < 12
    list(islice(timed_rounds(plan, 6), 2))
    assert ran.count("task") == 12
    assert not (world.folder / "never").exists()


def test_time_is_relative_to_the_undefended_and_missing_where_it_was_not_measured():
    timed = {"aligned": {}, "undefended": {"round_seconds": 0.2}, "safemoe": {"round_seconds": 0.3}}
    assert relative_seconds(timed, "safemoe") == pytest.approx(1.5)
    assert relative_seconds(timed, "aligned") is None
    assert relative_seconds({"safemoe": {"round_seconds": 0.3}}, "safemoe") is None
