"""What a defence may look at when it is built, and what the routing defences share.

Legend: L MoE layers, S prompts in a batch, P prompts of a set, E experts.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from safemoe_jax.checkpoints.reference import Reference
from safemoe_jax.errors import InputError
from safemoe_jax.models.config import ModelConfig
from safemoe_jax.routing.penalty import alignment_penalty, layer_selection
from safemoe_jax.training.config import DefenceConfig
from safemoe_jax.training.hooks import Batch

HARMFUL, BENIGN = 0, 1


@dataclass(frozen=True)
class DefenceContext:
    """A run, as far as a defence needs it.

    Attributes:
        model_config: the network, adapters included.
        batch_size: samples a task step.
        seed: of the run.
        row_multiple: rows of every batch are a multiple of this.
        clip_norm: longest gradient of a task step, or None.
        references: reference files, read and checked against the model; none where none is configured.
        reference_files: their paths, for messages.
    """

    model_config: ModelConfig
    batch_size: int
    seed: int = 0
    row_multiple: int = 1
    clip_norm: float | None = None
    references: tuple[Reference, ...] = ()
    reference_files: tuple[str, ...] = ()


class PromptSet(NamedTuple):
    """Prompts of one kind from all reference files.

    prompts: token ids. router_logits: float32 [L, P, E]. log_probs: float32 [P, V], or None where not asked
    for.
    """

    prompts: list[np.ndarray]
    router_logits: np.ndarray
    log_probs: np.ndarray | None


class RoutingTarget(NamedTuple):
    """What routing is held to: router_logits float32 [L, P, E], layer_weights float32 [L], temperature a
    scalar."""

    router_logits: np.ndarray
    layer_weights: np.ndarray
    temperature: np.float32


def prompt_set(context: DefenceContext, group: int, *, with_log_probs: bool = False) -> PromptSet:
    """The prompts of one kind (HARMFUL or BENIGN).

    Raises:
        InputError: there are none, or log-probabilities are asked for that a file does not have.
    """
    chosen = [(reference, np.flatnonzero(reference.group == group)) for reference in context.references]
    chosen = [(reference, rows) for reference, rows in chosen if len(rows)]
    if not chosen:
        kind, place = (
            ("harmful", "defence.reference") if group == HARMFUL else ("benign", "defence.benign_reference")
        )
        raise InputError(
            f"the defence has no {kind} prompts",
            where=f"the configuration, field {place}",
            expected=f"a file that `safemoe reference` wrote for {kind} prompts",
        )
    if with_log_probs:
        _require_log_probs(context)
    return PromptSet(
        [reference.prompts[row] for reference, rows in chosen for row in rows],
        np.concatenate([reference.router_logits[:, rows] for reference, rows in chosen], axis=1),
        np.concatenate([r.log_probs_SV()[rows] for r, rows in chosen]) if with_log_probs else None,
    )


def _require_log_probs(context: DefenceContext) -> None:
    for reference, file in itertools.zip_longest(context.references, context.reference_files):
        if reference.log_probs is None:
            raise InputError(
                "the reference has no next-token log-probabilities",
                where=file or f"reference of {reference.model or 'unknown model'}",
                expected="a file that `safemoe reference --log_probs true` wrote",
            )


def routing_target(
    config: DefenceConfig, model_config: ModelConfig, router_logits: np.ndarray, default_temperature: float
) -> RoutingTarget:
    """Constants of the routing penalty. Raises InputError for a layer that has no router."""
    temperature = default_temperature if config.temperature is None else config.temperature
    weights = layer_selection(model_config.moe_layers, config.layers)
    return RoutingTarget(np.asarray(router_logits, np.float32), weights, np.float32(temperature))


def prompt_penalty(
    router_logits_LNTE: jax.Array, batch: Batch, target: RoutingTarget, direction: str, reduction: str
) -> jax.Array:
    """The routing penalty at the last tokens of the batch's prompts, weighted by prompt_weights; a scalar."""
    return alignment_penalty(
        router_logits_LNTE[:, batch["prompt_row"], batch["prompt_column"]],
        target.router_logits[:, batch["prompt_index"]],
        temperature=target.temperature,
        layer_weights=target.layer_weights,
        token_mask=batch["prompt_weights"],
        direction=direction,
        reduction=reduction,
    )
