"""What a training step changes: one pytree, donated to every step and written to checkpoints."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from safemoe_jax.models.config import ModelConfig
from safemoe_jax.models.params import Params, shardings
from safemoe_jax.models.transformer import declare
from safemoe_jax.parallel.mesh import replicated
from safemoe_jax.training.optimizer import init_moments


class TrainState(NamedTuple):
    """State of a run.

    step: int32, optimizer steps so far, interleaved ones included. task_step: int32, task steps so far.
    trainable: float32 parameters. moments: Adam's moments of them, and its count of steps.
    """

    step: jax.Array
    task_step: jax.Array
    trainable: Params
    moments: optax.ScaleByAdamState


def init_state(trainable: Params, placed: TrainState) -> TrainState:
    """The state before the first step; parameters are copied, because steps overwrite what they are given.

    Args:
        trainable: initial parameters.
        placed: where each leaf is to lie (`state_shardings`).
    """
    copied = {name: jnp.array(value, dtype=jnp.float32, copy=True) for name, value in trainable.items()}
    # Two counters, two buffers: one buffer cannot be donated twice.
    counters = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return jax.device_put(TrainState(*counters, copied, init_moments(copied)), placed)


def state_shardings(config: ModelConfig, trainable: Params, mesh: Mesh) -> TrainState:
    """Where each leaf of the state lies: parameters and moments as declared, counters on every device."""
    placed = shardings({name: spec for name, spec in declare(config).items() if name in trainable}, mesh)
    whole = replicated(mesh)
    return TrainState(whole, whole, placed, optax.ScaleByAdamState(whole, placed, dict(placed)))


def frozen_shardings(config: ModelConfig, frozen: Params, mesh: Mesh) -> Params:
    """Where each frozen parameter lies; one that the network does not declare (a projection) is on every
    device."""
    placed = shardings({name: spec for name, spec in declare(config).items() if name in frozen}, mesh)
    return {name: placed.get(name, replicated(mesh)) for name in frozen}


def abstract(state: TrainState, placed: TrainState) -> TrainState:
    """Shapes, dtypes and shardings without values, for restoring."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed)
