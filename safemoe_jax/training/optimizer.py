"""AdamW with the learning rate as data: one set of moments for task steps and interleaved steps.

The schedule is a function of the number of finished task steps and lives on the host; a compiled step
receives the current rate, so neither the length of a run nor its rate is part of the compiled program.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from safemoe_jax.models.params import Params
from safemoe_jax.training.config import OptimizerConfig


class Hyper(NamedTuple):
    """What a compiled step receives each time, float32 scalars.

    learning_rate: the current rate. clip_norm: longest gradient, infinity for none. weight_decay, b1, b2,
    eps: AdamW.
    """

    learning_rate: np.float32
    clip_norm: np.float32
    weight_decay: np.float32
    b1: np.float32
    b2: np.float32
    eps: np.float32


def hyper(config: OptimizerConfig, learning_rate: float, clip_norm: float | None) -> Hyper:
    """The scalars of one step."""
    clip = math.inf if clip_norm is None else clip_norm
    return Hyper(
        *map(np.float32, (learning_rate, clip, config.weight_decay, config.b1, config.b2, config.eps))
    )


def learning_rate(config: OptimizerConfig, task_step: int, total_steps: int) -> float:
    """Rate after `task_step` finished task steps of `total_steps`, as transformers' schedules with warm-up.

    The first step has rate 0 when there is a warm-up. A pass after the last step of a cosine or linear
    schedule has rate 0 and changes nothing, as in the published code.
    """
    peak = config.learning_rate
    warmup = math.ceil(config.warmup * total_steps)
    if task_step < warmup:
        return peak * task_step / max(1, warmup)
    if config.schedule == "constant":
        return peak
    progress = (task_step - warmup) / max(1, total_steps - warmup)
    if config.schedule == "linear":
        return peak * max(0.0, 1.0 - progress)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))


def init_moments(trainable: Params) -> optax.ScaleByAdamState:
    """Zero moments."""
    return optax.scale_by_adam().init(trainable)


def update(
    gradient: Params, moments: optax.ScaleByAdamState, trainable: Params, scalars: Hyper
) -> tuple[Params, optax.ScaleByAdamState, jax.Array]:
    """One AdamW step as torch computes it: decay and update both multiplied by the learning rate.

    Returns:
        New parameters, new moments, and the gradient's norm before clipping.
    """
    norm = optax.tree.norm(gradient)
    # torch.nn.utils.clip_grad_norm_ adds the same 1e-6.
    scale = jnp.minimum(1.0, scalars.clip_norm / (norm + 1e-6))
    clipped = jax.tree.map(lambda g: g * scale, gradient)
    adam = optax.scale_by_adam(b1=scalars.b1, b2=scalars.b2, eps=scalars.eps)
    direction, moments = adam.update(clipped, moments)
    rate = scalars.learning_rate

    def moved(name: str) -> jax.Array:
        decay = rate * scalars.weight_decay if decays(name) else 0.0
        return trainable[name] * (1.0 - decay) - rate * direction[name]

    return {name: moved(name) for name in trainable}, moments, norm


def decays(name: str) -> bool:
    """Whether weight decay acts on a parameter: not on norm scales and on biases (the experts' included), as
    in Hugging Face's Trainer."""
    return not name.endswith(("scale", "bias"))
