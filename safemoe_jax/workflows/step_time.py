"""Seconds of training steps under several conditions that take turns.

A run's own seconds say little on a machine that does other things too; turns see the same machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

import jax

from safemoe_jax.data.pipeline import TrainPipeline
from safemoe_jax.training.hooks import Batch
from safemoe_jax.training.loop import Plan, prepare, resume
from safemoe_jax.training.optimizer import hyper
from safemoe_jax.training.step import place_batch

ROUNDS = 12


def paired_seconds(plans: Mapping[str, Plan], n_steps: int, n_rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of a round of `n_steps` task steps and what belongs to them, under each plan.

    Args:
        plans: condition -> its run, of which nothing is written.
        n_steps: task steps a round; for a defence with passes, those between two passes.
        n_rounds: rounds of each condition, at least 2.
    """
    return in_turns({name: timed_rounds(plan, n_steps) for name, plan in plans.items()}, n_rounds)


def in_turns(rounds: Mapping[str, Iterator[float]], n_rounds: int) -> dict[str, float]:
    """Median of each condition's rounds, which take turns; their first ones warm up and do not count."""
    taken: dict[str, list[float]] = {name: [] for name in rounds}
    for _ in range(n_rounds):
        for name, seconds in rounds.items():
            taken[name].append(next(seconds))
    return {name: median(seconds[1:]) for name, seconds in taken.items()}


def timed_rounds(plan: Plan, n_steps: int) -> Iterator[float]:
    """Seconds of `n_steps` task steps, and of one pass if the defence has any, again and again."""
    state = resume(plan, None).state
    programs, batches = prepare(plan, state), _endless(plan.pipeline)
    optimizer = plan.config.optimizer
    scalars = hyper(optimizer, optimizer.learning_rate, optimizer.clip_norm)
    while True:
        began = time.perf_counter()
        for _ in range(n_steps):
            batch = next(batches)
            program = programs.task[(*batch["tokens"].shape, batch["targets"].shape[1])]
            batch = place_batch(batch, plan.mesh)
            state, _ = program(plan.weights.frozen, state, batch, scalars, programs.task_constants)
        for program, batch in programs.passes:
            state, _ = program(plan.weights.frozen, state, batch, scalars, programs.pass_constants)
        jax.block_until_ready(state)
        yield time.perf_counter() - began


def relative_seconds(conditions: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    """A condition's `round_seconds` in results.json over the undefended one's; None without both."""
    own, undefended = (conditions.get(n, {}).get("round_seconds") for n in (name, "undefended"))
    return own / undefended if own and undefended else None


def _endless(pipeline: TrainPipeline) -> Iterator[Batch]:
    """The run's batches, from the first again after the last: a short run has fewer than are timed."""
    while True:
        yield from pipeline.iter(0)
