"""The places in a run where a defence acts. A defence fills one or two of them and leaves the others alone.

Functions held by a hook run inside the compiled step. They are compared by value (frozen dataclasses or
module functions), so that two runs with equal functions share one compiled step; everything that differs
between runs of one defence (reference logits, temperatures, coefficients) goes into `constants`, which are
data.

Legend: N rows, T row length, S prompts, P prompts of a set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from safemoe_jax.data.formats import Sample
from safemoe_jax.models.config import Compute, ModelConfig
from safemoe_jax.models.params import Params, Weights
from safemoe_jax.models.transformer import Output

Batch = dict[str, Any]
"""Arrays by name; tokens, segment_ids, positions [N, T], and what the step or hook looks at besides."""
Metrics = dict[str, jax.Array]
Constants = Any

LossTerm = Callable[[ModelConfig, Weights, Output, Batch, Constants], tuple[jax.Array, Metrics]]
PassLoss = Callable[[ModelConfig, Weights, Batch, Constants, Compute], tuple[jax.Array, Metrics]]
GradientEdit = Callable[[ModelConfig, Weights, Params, Batch, Constants, Compute], tuple[Params, Metrics]]


@dataclass(frozen=True)
class LossHook:
    """A term added to the task loss, computed from the same forward pass.

    Attributes:
        term: (config, weights, output, batch, constants) -> (scalar, metrics). Where the batch carries
            prompts (prompt_row, prompt_column, prompt_index, prompt_weights [S], weights summing to 1 over
            the whole step), the term must be a sum weighted by prompt_weights: a step may be computed in
            parts. A term that looks at no prompts must multiply by batch["share"], the part's share of the
            step.
        constants: pytree of arrays handed to the term.
        prompts: token ids of the prompt set, each int32; they ride in the task batch as extra packed samples.
        prompts_for_step: task step -> indices into `prompts`, always equally many.
    """

    term: LossTerm
    constants: Constants = None
    prompts: Sequence[np.ndarray] = ()
    prompts_for_step: Callable[[int], list[int]] | None = None


@dataclass(frozen=True)
class GradientHook:
    """An edit of a task step's gradient before it is clipped.

    Attributes:
        edit: (config, weights, gradient, batch, constants, compute) -> (gradient, metrics).
        constants: pytree of arrays handed to the edit.
    """

    edit: GradientEdit
    constants: Constants = None


@dataclass(frozen=True)
class InterleaveHook:
    """Extra optimizer steps between task steps, on the same optimizer state, one for each batch of a pass.

    Attributes:
        due: number of finished task steps -> whether a pass follows now; None is at the end of every epoch.
        batches: the pass, in its fixed order; in at most two shapes (the last batch may be smaller).
        loss: (config, weights, batch, constants, compute) -> (scalar, metrics).
        constants: pytree of arrays handed to the loss.
        clip_norm: longest gradient of these steps, or None.
    """

    due: Callable[[int], bool] | None
    batches: Sequence[Batch]
    loss: PassLoss
    constants: Constants = None
    clip_norm: float | None = None


@dataclass(frozen=True)
class Defence:
    """A defence, as the hooks that it fills.

    Attributes:
        name: its name in the registry.
        data: changes the training samples before they are encoded.
        init: (config, weights) -> weights: changes initial adapters or frozen weights.
        loss: a term in the task loss.
        gradient: an edit of the task gradient.
        interleave: extra steps between task steps.
        post: (config, weights) -> weights: edits the weights after the last step.
        notes: facts for the run's results (numbers of prompts, temperature, ...).
    """

    name: str
    data: Callable[[list[Sample]], list[Sample]] | None = None
    init: Callable[[ModelConfig, Weights], Weights] | None = None
    loss: LossHook | None = None
    gradient: GradientHook | None = None
    interleave: InterleaveHook | None = None
    post: Callable[[ModelConfig, Weights], Weights] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
