"""Anchored routing alignment (this project's own): a term in every task step, no extra optimizer steps.

A few harmful and a few benign prompts ride in each task batch. At their last token the routing and the
next-token distribution are held to the aligned model's:

    coefficient * mean_S [ sum_l KL(softmax(r0_l / tau) || softmax(r_l / tau)) + KL(p0 || p) ]

The benign prompts keep the anchor from turning into refusals of everything.

Legend: S prompts in a batch, P prompts of a set, D model width, V vocabulary, L MoE layers, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from safemoe_jax.defenses.context import (
    BENIGN,
    HARMFUL,
    DefenceContext,
    RoutingTarget,
    prompt_penalty,
    prompt_set,
    routing_target,
)
from safemoe_jax.models.config import ModelConfig
from safemoe_jax.models.params import Weights
from safemoe_jax.models.transformer import Output, unembed
from safemoe_jax.training.config import DefenceConfig
from safemoe_jax.training.hooks import Batch, Defence, LossHook, Metrics

TEMPERATURE = 1.0


class Anchor(NamedTuple):
    """routing: see `RoutingTarget`. log_probs: float32 [P, V], the aligned model's. coefficient: a scalar."""

    routing: RoutingTarget
    log_probs: np.ndarray
    coefficient: np.float32


@dataclass(frozen=True)
class AnchorTerm:
    """The term; compared by value, so that runs share the compiled step."""

    direction: str
    reduction: str

    def __call__(
        self, config: ModelConfig, weights: Weights, output: Output, batch: Batch, anchor: Anchor
    ) -> tuple[jax.Array, Metrics]:
        """Term and metrics of the prompts that this part of the step holds."""
        weight_S = batch["prompt_weights"]
        # The penalty is a mean; the part's share of the weights turns it into a sum over parts.
        penalty = prompt_penalty(output.router_logits, batch, anchor.routing, self.direction, self.reduction)
        penalty = penalty * jnp.sum(weight_S)
        hidden_SD = output.hidden[batch["prompt_row"], batch["prompt_column"]]
        log_probs_SV = jax.nn.log_softmax(unembed(config, weights, hidden_SD).astype(jnp.float32), axis=-1)
        aligned_SV = anchor.log_probs[batch["prompt_index"]]
        moved_S = jnp.sum(jnp.exp(aligned_SV) * (aligned_SV - log_probs_SV), axis=-1)
        token = jnp.sum(weight_S * moved_S)
        return anchor.coefficient * (penalty + token), {"routing_penalty": penalty, "anchor": token}


def build(config: DefenceConfig, context: DefenceContext) -> Defence:
    """The term on `prompts_per_step` harmful and as many benign prompts in each step.

    Raises:
        InputError: no reference with harmful or with benign prompts, or one without next-token
        log-probabilities.
    """
    harmful = prompt_set(context, HARMFUL, with_log_probs=True)
    benign = prompt_set(context, BENIGN, with_log_probs=True)
    router_logits = np.concatenate([harmful.router_logits, benign.router_logits], axis=1)
    anchor = Anchor(
        routing_target(config, context.model_config, router_logits, TEMPERATURE),
        np.concatenate([harmful.log_probs, benign.log_probs]),
        np.float32(config.coefficient),
    )
    sizes = (len(harmful.prompts), len(benign.prompts))
    hook = LossHook(
        term=AnchorTerm(config.direction, config.reduction),
        constants=anchor,
        prompts=[*harmful.prompts, *benign.prompts],
        prompts_for_step=rotation(sizes, config.prompts_per_step, context.seed),
    )
    notes = {
        "harmful_prompts": sizes[0],
        "benign_prompts": sizes[1],
        "temperature": float(anchor.routing.temperature),
        "coefficient": config.coefficient,
    }
    return Defence("safemoe_anchored", loss=hook, notes=notes)


def rotation(sizes: Sequence[int], per_step: int, seed: int) -> Callable[[int], list[int]]:
    """Which prompts each step takes: `per_step` of every group, in shuffled order, all once before any twice.

    Args:
        sizes: prompts of each group; group g's indices follow those of the groups before it.
        per_step: prompts of each group in a step.
        seed: of the orders.
    """
    offsets = np.cumsum([0, *sizes[:-1]])

    @functools.cache
    def order(group: int, turn: int) -> np.ndarray:
        return np.random.default_rng([seed, group, turn]).permutation(sizes[group]) + offsets[group]

    def chosen(step: int) -> list[int]:
        places = range(step * per_step, (step + 1) * per_step)
        return [
            int(order(group, place // size)[place % size])
            for group, size in enumerate(sizes)
            for place in places
        ]

    return chosen
