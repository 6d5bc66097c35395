"""The training loop: the effects round the two compiled steps. Metrics, checkpoints, resuming.

Nothing in a step waits for the host. The loop reads a step's metrics a few steps later, when they have long
been computed, and reads all of them before it writes a checkpoint, so that no checkpoint holds a state that
went wrong.

Legend: N batch rows, T row length, M targets a row.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from safemoe_jax.checkpoints.train_state import TrainCheckpoints
from safemoe_jax.data.pipeline import TrainPipeline
from safemoe_jax.errors import InputError
from safemoe_jax.models.config import Compute, ModelConfig
from safemoe_jax.models.params import Weights
from safemoe_jax.parallel.mesh import replicated
from safemoe_jax.training.config import TrainConfig
from safemoe_jax.training.hooks import Batch, Defence
from safemoe_jax.training.metrics import Row, Sink
from safemoe_jax.training.optimizer import hyper, learning_rate
from safemoe_jax.training.state import TrainState, abstract, init_state, state_shardings
from safemoe_jax.training.step import (
    PassStep,
    TaskConstants,
    TaskStep,
    all_finite,
    batch_shardings,
    compile_all,
    place_batch,
)

_PROGRESS = ("step", "task_step", "data", "iterator")
LAG = 2
"""Steps whose metrics may be on their way while the next one is started."""

OnStep = Callable[[int, TrainState], None]
"""(finished task steps, state), called after each task step and the pass that follows it. The state's
arrays are gone
when the call returns: a callback that keeps something copies it."""


@dataclass(frozen=True)
class Plan:
    """A run, ready to start.

    Attributes:
        config: the run's configuration.
        model_config, compute, mesh: the network (adapters included), how it is computed, the devices.
        weights: placed on the mesh; the trainable ones are the initial values.
        pipeline: the batches.
        defence: its hooks.
        epoch_ends: numbers of finished task steps at which an epoch ends.
        name_samples: numbers from `pipeline.sample_ids` -> text for a message.
        inputs: fingerprints of what the run reads (`inputs.check_inputs`).
    """

    config: TrainConfig
    model_config: ModelConfig
    compute: Compute
    mesh: Mesh
    weights: Weights
    pipeline: TrainPipeline
    defence: Defence
    epoch_ends: tuple[int, ...]
    name_samples: Callable[[Sequence[int]], str] = str
    inputs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Programs:
    """The compiled steps of a run and what is on the devices for all of it."""

    task: dict[tuple[int, ...], jax.stages.Compiled]
    task_constants: TaskConstants
    passes: list[tuple[jax.stages.Compiled, Batch]]
    pass_constants: Any


@dataclass
class Totals:
    """What a run's steps add up to. Checkpoints carry it, so that a run in several parts has the figures of
    all of them.

    first_loss, final_loss: task loss of the first and of the newest step, None before there is one. tokens:
    of all steps. seconds: of the steps that were kept. compile_seconds: of every part.
    """

    first_loss: float | None = None
    final_loss: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0

    def add(self, row: Row, n_tokens: int) -> None:
        """Counts one finished step."""
        self.tokens += n_tokens
        if row["kind"] == "task":
            self.final_loss = row["loss"]
            self.first_loss = row["loss"] if self.first_loss is None else self.first_loss


@dataclass
class Start:
    """Where a run begins: its state, what its earlier parts add up to and, when it continues, the data
    iterator's state."""

    state: TrainState
    step: int = 0
    task_step: int = 0
    iterator: dict[str, Any] | None = None
    totals: Totals = field(default_factory=Totals)


@dataclass
class _Pending:
    """Metrics on their way from the devices, oldest first."""

    plan: Plan
    sinks: Sequence[Sink]
    totals: Totals
    rows: deque[tuple[Row, int, dict[str, jax.Array]]] = field(default_factory=deque)
    since: float = field(default_factory=time.perf_counter)

    def push(self, row: Row, n_tokens: int, metrics: dict[str, jax.Array]) -> None:
        """Takes a step's metrics and hands the overdue ones to the sinks."""
        self.rows.append((row, n_tokens, metrics))
        while len(self.rows) > LAG:
            self._fetch()

    def drain(self) -> None:
        """Waits for all of them."""
        while self.rows:
            self._fetch()
        for sink in self.sinks:
            sink.flush()

    def _fetch(self) -> None:
        row, n_tokens, metrics = self.rows.popleft()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        row |= {**values, "tokens_per_second": n_tokens / max(now - self.since, 1e-9)}
        self.since = now
        if not all(map(math.isfinite, values.values())):
            raise _diverged(self.plan, row)
        self.totals.add(row, n_tokens)
        for sink in self.sinks:
            sink.write(row)


def resume(plan: Plan, checkpoints: TrainCheckpoints | None) -> Start:
    """The newest checkpoint's state, or the initial one.

    Raises:
        InputError: the checkpoint's data were others than the plan's, or it is damaged.
    """
    placed = state_shardings(plan.model_config, plan.weights.trainable, plan.mesh)
    state = init_state(plan.weights.trainable, placed)
    if checkpoints is None or checkpoints.latest() is None:
        return Start(state)
    state, progress = checkpoints.restore(abstract(state, placed), _PROGRESS)
    if progress["data"] != plan.pipeline.fingerprint:
        raise InputError(
            "the training data are not those that this run began with",
            where=plan.config.output,
            expected="unchanged data files and tokenizer, or a new output folder",
        )
    # A checkpoint that is older than the totals counts from there on.
    totals = Totals(**progress.get("totals", {}))
    return Start(state, progress["step"], progress["task_step"], progress["iterator"], totals)


def prepare(plan: Plan, state: TrainState) -> Programs:
    """Compiles both kinds of step for every planned shape, and places constants and routing batches on the
    mesh."""
    defence, whole = plan.defence, replicated(plan.mesh)
    constants = TaskConstants(
        defence.loss.constants if defence.loss else None,
        defence.gradient.constants if defence.gradient else None,
    )
    constants = jax.device_put(constants, whole)
    task = TaskStep(
        plan.model_config,
        plan.compute,
        plan.mesh,
        plan.config.gradient_accumulation,
        plan.config.router_aux_coef,
        plan.config.router_z_coef,
        defence.loss.term if defence.loss else None,
        defence.gradient.edit if defence.gradient else None,
    )
    example = plan.pipeline.batch(0)
    frozen, hook = plan.weights.frozen, defence.interleave
    shapes = [tuple(shape) for shape in plan.pipeline.shapes]
    wanted = [(task, _resized(example, *shape), constants) for shape in shapes]
    if hook is not None:
        step = PassStep(plan.model_config, plan.compute, plan.mesh, hook.loss)
        pass_constants = jax.device_put(hook.constants, whole)
        wanted += [(step, batch, pass_constants) for batch in hook.batches]
    programs = compile_all(wanted, frozen, state)
    all_finite(state.trainable)
    task_programs = dict(zip(shapes, programs, strict=False))
    if hook is None:
        return Programs(task_programs, constants, [], None)
    batches = [jax.device_put(batch, batch_shardings(batch, plan.mesh)) for batch in hook.batches]
    passes = list(zip(programs[len(shapes) :], batches, strict=True))
    return Programs(task_programs, constants, passes, pass_constants)


def train(
    plan: Plan,
    programs: Programs,
    start: Start,
    sinks: Sequence[Sink],
    checkpoints: TrainCheckpoints | None,
    on_step: Sequence[OnStep] = (),
) -> tuple[TrainState, int]:
    """Runs all steps that are left.

    Returns:
        The final state, and the number of optimizer steps of the whole run. `start.totals` holds what they
        add up to.

    Raises:
        InputError: a loss or gradient is not finite; names the step and its samples. Checkpoints from
        before stay.
    """
    totals, began = start.totals, time.perf_counter() - start.totals.seconds
    pending = _Pending(plan, sinks, totals)
    state, step = start.state, start.step
    iterator = plan.pipeline.iter(start.task_step)
    if start.iterator is not None:
        iterator.set_state(start.iterator)
    for task_step in range(start.task_step, plan.pipeline.total_steps):
        state = _task_step(plan, programs, state, next(iterator), step, task_step, pending)
        step, done = step + 1, task_step + 1
        if _pass_due(plan, done):
            state, step = _routing_pass(plan, programs, state, step, done, pending)
        for callback in on_step:
            callback(done, state)
        if checkpoints is not None and _checkpoint_due(plan, done):
            pending.drain()
            _check_parameters(plan, state, step)
            totals.seconds = time.perf_counter() - began
            progress = {"step": step, "task_step": done, "data": plan.pipeline.fingerprint}
            progress |= {"iterator": iterator.get_state(), "totals": dataclasses.asdict(totals)}
            checkpoints.save(done, state, progress)
    pending.drain()
    _check_parameters(plan, state, step)
    totals.seconds = time.perf_counter() - began
    return state, step


def _task_step(
    plan: Plan,
    programs: Programs,
    state: TrainState,
    batch: Batch,
    step: int,
    task_step: int,
    pending: _Pending,
) -> TrainState:
    optimizer = plan.config.optimizer
    rate = learning_rate(optimizer, task_step, plan.pipeline.total_steps)
    program = programs.task[(*batch["tokens"].shape, batch["targets"].shape[1])]
    n_tokens = int(np.count_nonzero(batch["segment_ids"]))
    scalars = hyper(optimizer, rate, optimizer.clip_norm)
    state, metrics = program(
        plan.weights.frozen, state, place_batch(batch, plan.mesh), scalars, programs.task_constants
    )
    row = {"step": step + 1, "task_step": task_step + 1, "kind": "task", "learning_rate": rate}
    pending.push(row, n_tokens, metrics)
    return state


def _routing_pass(
    plan: Plan, programs: Programs, state: TrainState, step: int, task_step: int, pending: _Pending
) -> tuple[TrainState, int]:
    """One pass over the interleave hook's batches at the rate that the next task step would have."""
    hook, optimizer = plan.defence.interleave, plan.config.optimizer
    rate = learning_rate(optimizer, task_step, plan.pipeline.total_steps)
    scalars = hyper(optimizer, rate, hook.clip_norm)
    for (program, batch), on_host in zip(programs.passes, hook.batches, strict=True):
        state, metrics = program(plan.weights.frozen, state, batch, scalars, programs.pass_constants)
        step += 1
        row = {"step": step, "task_step": task_step, "kind": "routing", "learning_rate": rate}
        pending.push(row, int(np.count_nonzero(on_host["segment_ids"])), metrics)
    return state, step


def _pass_due(plan: Plan, done: int) -> bool:
    hook = plan.defence.interleave
    if hook is None:
        return False
    return done in plan.epoch_ends if hook.due is None else hook.due(done)


def check_passes(plan: Plan) -> None:
    """Refuses a run that its defence's passes never change: it would be undefended, and look defended.

    Raises:
        InputError: no pass is due, or every one has learning rate 0.
    """
    optimizer, total = plan.config.optimizer, plan.pipeline.total_steps
    # At a peak of 0 nothing is trained at all: there is nothing to defend against.
    if plan.defence.interleave is None or optimizer.learning_rate == 0:
        return
    moving = [done for done in range(1, total + 1) if learning_rate(optimizer, done, total) > 0]
    if any(_pass_due(plan, done) for done in moving):
        return
    t_reg = plan.config.defence.t_reg
    told = "null (the ends of epochs)" if t_reg is None else t_reg
    raise InputError(
        f"the run would be undefended: t_reg is {told}, and in its {total} task steps no routing pass has a "
        "learning rate above 0",
        where="the configuration, field defence.t_reg",
        expected=f"t_reg from 1 to {moving[-1]}, or a longer run (more than one epoch where t_reg is null: a "
        "pass after the last step of a cosine or linear schedule changes nothing)"
        if moving
        else "more task steps, or optimizer.schedule: constant",
    )


def _checkpoint_due(plan: Plan, done: int) -> bool:
    every = plan.config.checkpoint_every
    if every == 0:
        return False
    if done == plan.pipeline.total_steps:
        return True
    return done in plan.epoch_ends if every is None else done % every == 0


def _resized(example: Batch, rows: int, length: int, targets: int) -> Batch:
    """The example's arrays as shapes only, in a batch of another planned shape."""
    sizes = dict.fromkeys(("tokens", "segment_ids", "positions"), (rows, length))
    sizes |= dict.fromkeys(("target_index", "targets", "target_weights"), (rows, targets))
    return {name: jax.ShapeDtypeStruct(sizes.get(name, x.shape), x.dtype) for name, x in example.items()}


def _check_parameters(plan: Plan, state: TrainState, step: int) -> None:
    if not bool(all_finite(state.trainable)):
        raise InputError(
            f"parameters are not finite after optimizer step {step}",
            where=plan.config.output,
            expected=_REMEDY,
        )


_REMEDY = "a smaller learning rate, or clipping; the last good checkpoint is kept"


def _diverged(plan: Plan, row: Row) -> InputError:
    wrong = ", ".join(
        f"{name} is {v}" for name, v in row.items() if isinstance(v, float) and not math.isfinite(v)
    )
    place = f"optimizer step {row['step']}"
    if row["kind"] == "task":
        ids = plan.pipeline.sample_ids(row["task_step"] - 1)
        place += f" (task step {row['task_step']}, samples {plan.name_samples(ids)})"
    else:
        place += f" (routing pass after task step {row['task_step']})"
    return InputError(f"training diverged: {wrong}", where=place, expected=_REMEDY)
