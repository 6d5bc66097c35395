"""The two compiled steps: a task step, and an interleaved step on a loss of its own. One state, one set of
moments.

A step is compiled for given shapes and shardings, ahead of its first use, and kept for the life of the
process: a second run with the same network, shapes and hook functions compiles nothing. Learning rates,
clipping, temperatures and reference logits are arguments.

Legend: N batch rows, T row length, M targets a row, D model width, V vocabulary, S prompts, A parts of a step
(gradient accumulation).
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from safemoe_jax.models.config import Compute, ModelConfig
from safemoe_jax.models.params import Params, Weights
from safemoe_jax.models.transformer import hidden_states, unembed
from safemoe_jax.parallel.mesh import BATCH_AXES, mesh_axis_sizes, replicated
from safemoe_jax.routing.auxiliary import load_balancing_loss, z_loss
from safemoe_jax.training.hooks import Batch, Constants, GradientEdit, LossTerm, Metrics, PassLoss
from safemoe_jax.training.optimizer import Hyper, update
from safemoe_jax.training.state import TrainState, frozen_shardings, state_shardings

ROW_ARRAYS = ("tokens", "segment_ids", "positions", "target_index", "targets", "target_weights")
"""Batch arrays whose first axis is the batch row; they are split over the devices, all others are on every
one."""

LOGIT_BYTES = 256 * 2**20
"""Float32 logits that are held at once on a device; more targets are taken in turns."""


class TaskConstants(NamedTuple):
    """Constants of the loss hook and of the gradient hook, None where there is no such hook."""

    loss: Constants = None
    gradient: Constants = None


@dataclass(frozen=True)
class TaskStep:
    """What a task step is, apart from shapes and values.

    Attributes:
        config, compute: the network and how it is computed.
        mesh: the devices.
        accumulation: parts that the rows are computed in, one after another.
        router_aux_coef: weight of the load-balancing loss.
        router_z_coef: weight of the router z-loss.
        loss_term: the loss hook's function, or None.
        gradient_edit: the gradient hook's function, or None.
    """

    __name__ = "task_step"  # what profiles and compiler logs call it

    config: ModelConfig
    compute: Compute
    mesh: Mesh
    accumulation: int = 1
    router_aux_coef: float = 0.0
    router_z_coef: float = 0.0
    loss_term: LossTerm | None = None
    gradient_edit: GradientEdit | None = None

    def __call__(
        self, frozen: Params, state: TrainState, batch: Batch, scalars: Hyper, constants: TaskConstants
    ) -> tuple[TrainState, Metrics]:
        """One optimizer step on the mean loss over all answer tokens of the batch."""
        gradient, metrics = self.gradient(frozen, state.trainable, batch, constants)
        if self.gradient_edit is not None:
            weights = Weights(frozen, state.trainable)
            gradient, extra = self.gradient_edit(
                self.config, weights, gradient, batch, constants.gradient, self.compute
            )
            metrics = {**metrics, **extra}
        state, norm = _stepped(state, gradient, scalars)
        return state._replace(task_step=state.task_step + 1), {**metrics, "grad_norm": norm}

    def gradient(
        self, frozen: Params, trainable: Params, batch: Batch, constants: TaskConstants
    ) -> tuple[Params, Metrics]:
        """Gradient of the step's loss, and its metrics."""
        batch = _weighted(batch)
        slope = jax.grad(functools.partial(self._part_loss, frozen, constants), has_aux=True)
        if self.accumulation == 1:
            return slope(trainable, batch)

        def add(carry: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, slope(trainable, part)), None

        parts = _parts(batch, self.accumulation)
        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(slope, trainable, first))
        return jax.lax.scan(add, zeros, parts)[0]

    def _part_loss(
        self, frozen: Params, constants: TaskConstants, trainable: Params, part: Batch
    ) -> tuple[jax.Array, Metrics]:
        weights = Weights(frozen, trainable)
        output = hidden_states(
            self.config,
            weights,
            part["tokens"],
            positions=part["positions"],
            segment_ids=part["segment_ids"],
            compute=self.compute,
        )
        loss = answer_loss(self.config, weights, output.hidden, part, self.compute)
        total, metrics = loss, {"loss": loss}
        for name, coefficient, value in self._router_losses(output.router_logits, part):
            total, metrics = total + coefficient * value, {**metrics, name: value}
        if self.loss_term is not None:
            term, extra = self.loss_term(self.config, weights, output, part, constants.loss)
            total, metrics = total + term, {**metrics, **extra}
        return total, metrics

    def _router_losses(self, router_logits: jax.Array, part: Batch) -> list[tuple[str, float, jax.Array]]:
        """Name, weight and this part's share of each router loss that the run asks for."""
        mask, share, losses = part["segment_ids"], part["share"], []
        if self.router_aux_coef:
            balance = load_balancing_loss(router_logits, mask, top_k=self.config.top_k)
            losses.append(("load_balancing", self.router_aux_coef, balance * share))
        if self.router_z_coef:
            losses.append(("router_z", self.router_z_coef, z_loss(router_logits, mask) * share))
        return losses


@dataclass(frozen=True)
class PassStep:
    """What an interleaved step is: the same state and moments, another loss, the learning-rate schedule
    stands still.

    Attributes:
        config, compute, mesh: as in `TaskStep`.
        loss: the interleave hook's function.
    """

    __name__ = "routing_step"

    config: ModelConfig
    compute: Compute
    mesh: Mesh
    loss: PassLoss

    def __call__(
        self, frozen: Params, state: TrainState, batch: Batch, scalars: Hyper, constants: Constants
    ) -> tuple[TrainState, Metrics]:
        """One optimizer step on the hook's loss."""

        def loss(trainable: Params) -> tuple[jax.Array, Metrics]:
            value, metrics = self.loss(
                self.config, Weights(frozen, trainable), batch, constants, self.compute
            )
            return value, {"loss": value, **metrics}

        gradient, metrics = jax.grad(loss, has_aux=True)(state.trainable)
        state, norm = _stepped(state, gradient, scalars)
        return state, {**metrics, "grad_norm": norm}


Step = TaskStep | PassStep


def answer_loss(
    config: ModelConfig, weights: Weights, hidden_NTD: jax.Array, batch: Batch, compute: Compute
) -> jax.Array:
    """Sum of target_weights * cross-entropy, float32; only the states that predict a target are unembedded.

    Args:
        hidden_NTD: final hidden states.
        batch: target_index [N, M] columns, targets [N, M] token ids, target_weights [N, M] (0 is padding).
    """
    hidden_NMD = jax.vmap(lambda row_TD, index_M: row_TD[index_M])(hidden_NTD, batch["target_index"])
    shards = mesh_axis_sizes(compute.mesh, BATCH_AXES)
    turns = _turns(batch["targets"].shape, config.vocab_size, shards)

    def loss(hidden_NMD: jax.Array, targets_NM: jax.Array, weights_NM: jax.Array) -> jax.Array:
        logits_NMV = unembed(config, weights, hidden_NMD).astype(jnp.float32)
        chosen_NM = jnp.take_along_axis(logits_NMV, targets_NM[..., None], axis=-1)[..., 0]
        return jnp.sum(weights_NM * (jax.nn.logsumexp(logits_NMV, axis=-1) - chosen_NM))

    arrays = (hidden_NMD, batch["targets"], batch["target_weights"])
    if turns == 1:
        return loss(*arrays)
    # Recomputing a turn's logits in the backward pass is what keeps them from being held together.
    taken = tuple(jnp.moveaxis(x.reshape(x.shape[0], turns, -1, *x.shape[2:]), 1, 0) for x in arrays)
    body = jax.checkpoint(lambda total, turn: (total + loss(*turn), None), prevent_cse=False)
    return jax.lax.scan(body, jnp.zeros((), jnp.float32), taken)[0]


def _turns(shape: tuple[int, int], vocab_size: int, shards: int) -> int:
    """Smallest divisor of M for which a turn's logits fit into LOGIT_BYTES."""
    rows, targets = shape
    wanted = math.ceil(rows * targets * vocab_size * 4 / (shards * LOGIT_BYTES))
    return next(n for n in range(1, targets + 1) if targets % n == 0 and (n >= wanted or n == targets))


def _stepped(state: TrainState, gradient: Params, scalars: Hyper) -> tuple[TrainState, jax.Array]:
    trainable, moments, norm = update(gradient, state.moments, state.trainable, scalars)
    return TrainState(state.step + 1, state.task_step, trainable, moments), norm


def _weighted(batch: Batch) -> Batch:
    """The batch with weights that sum to 1 over the whole step, so that its parts' losses simply add up."""
    weights = batch["target_weights"].astype(jnp.float32)
    batch = {**batch, "target_weights": weights / jnp.maximum(weights.sum(), 1.0), "share": jnp.float32(1)}
    if "prompt_row" in batch:
        given = batch.get("prompt_weights", jnp.ones(batch["prompt_row"].shape, jnp.float32))
        batch["prompt_weights"] = given / jnp.maximum(given.sum(), 1.0)
    return batch


def _parts(batch: Batch, parts: int) -> Batch:
    """Splits the rows into `parts`, stacked along a new first axis; part a has the rows a, a + A, a + 2A, ...

    Strided, so that every part is spread over all devices as the whole is. A prompt keeps its weight in the
    part that has its row and has none in the others.
    """

    def split(name: str, value: jax.Array) -> jax.Array:
        if name in ROW_ARRAYS:
            return jnp.moveaxis(value.reshape(-1, parts, *value.shape[1:]), 1, 0)
        return jnp.broadcast_to(value, (parts, *value.shape))

    divided = {name: split(name, value) for name, value in batch.items()}
    divided["share"] = divided["share"] / parts
    if "prompt_row" in batch:
        row_S = batch["prompt_row"]
        here_AS = row_S[None] % parts == jnp.arange(parts)[:, None]
        divided["prompt_row"] = jnp.broadcast_to(row_S // parts, here_AS.shape)
        divided["prompt_weights"] = jnp.where(here_AS, batch["prompt_weights"], 0.0)
    return divided


def compile_all(
    wanted: Sequence[tuple[Step, Batch, Constants]], frozen: Params, state: TrainState
) -> list[jax.stages.Compiled]:
    """The steps compiled for these shapes; (frozen, state, batch, Hyper, constants) -> (state, metrics).

    The state is donated: the arrays handed in are gone afterwards. Arrays may be given as shapes only. What
    this process has compiled before, for equal steps and shapes, is taken again.
    """
    described = [_described(step, (frozen, state, batch, constants)) for step, batch, constants in wanted]
    # Equal programs are asked for once: two threads would both compile them.
    missing = list(dict.fromkeys(key for key in described if key not in _PROGRAMS))
    # Processes of one run compile in the same order: some compilers wait for each other.
    workers = os.cpu_count() if jax.process_count() == 1 else 1
    with ThreadPoolExecutor(max_workers=workers) as pool:
        _PROGRAMS.update(zip(missing, pool.map(lambda key: _compile(*key), missing), strict=True))
    return [_PROGRAMS[key] for key in described]


_PROGRAMS: dict[Any, jax.stages.Compiled] = {}


def n_compiled() -> int:
    """Steps compiled so far in this process."""
    return len(_PROGRAMS)


def _described(step: Step, arguments: Any) -> tuple[Step, Any, tuple]:
    leaves, structure = jax.tree.flatten(arguments)
    return step, structure, tuple((leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves)


def _compile(step: Step, structure: Any, leaves: tuple) -> jax.stages.Compiled:
    arguments = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    frozen, state, batch, constants = arguments
    whole = replicated(step.mesh)
    placed_state = state_shardings(step.config, state.trainable, step.mesh)
    jitted = jax.jit(
        step,
        in_shardings=(
            frozen_shardings(step.config, frozen, step.mesh),
            placed_state,
            batch_shardings(batch, step.mesh),
            whole,
            whole,
        ),
        out_shardings=(placed_state, whole),
        donate_argnums=1,
    )
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return jitted.lower(frozen, state, batch, Hyper(*[scalar] * len(Hyper._fields)), constants).compile()


@jax.jit
def all_finite(params: Params) -> jax.Array:
    """Whether every number is finite, a bool scalar."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(value)) for value in jax.tree.leaves(params)]))


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Rows over (data, fsdp); what is not a row is on every device."""
    rows, whole = NamedSharding(mesh, PartitionSpec(BATCH_AXES)), replicated(mesh)
    return {name: rows if name in ROW_ARRAYS else whole for name in batch}


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """The batch as a compiled step takes it; every process holds the whole batch and hands over its
    devices' rows."""
    if jax.process_count() == 1:
        return batch
    placed = batch_shardings(batch, mesh)
    return {
        name: jax.make_array_from_callback(value.shape, placed[name], value.__getitem__)
        for name, value in batch.items()
    }
