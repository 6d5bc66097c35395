"""SafeMoE as published (arXiv 2509.22745, section 4): interleaved optimizer steps on the routing penalty
alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax

from safemoe_jax.data.packing import prompt_batches
from safemoe_jax.defenses.context import (
    HARMFUL,
    DefenceContext,
    RoutingTarget,
    prompt_penalty,
    prompt_set,
    routing_target,
)
from safemoe_jax.models.config import Compute, ModelConfig
from safemoe_jax.models.params import Weights
from safemoe_jax.models.transformer import routing_pass
from safemoe_jax.training.config import DefenceConfig
from safemoe_jax.training.hooks import Batch, Defence, InterleaveHook, Metrics

TEMPERATURE = 0.1


@dataclass(frozen=True)
class RoutingLoss:
    """L_reg on one batch of harmful prompts; compared by value, so that runs share the compiled step."""

    direction: str
    reduction: str

    def __call__(
        self, config: ModelConfig, weights: Weights, batch: Batch, target: RoutingTarget, compute: Compute
    ) -> tuple[jax.Array, Metrics]:
        """Penalty and metrics; stops at the last router, so neither its experts nor the vocabulary are
        computed."""
        router_logits = routing_pass(
            config,
            weights,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            compute=compute,
        )
        penalty = prompt_penalty(router_logits, batch, target, self.direction, self.reduction)
        return penalty, {"routing_penalty": penalty}


def build(config: DefenceConfig, context: DefenceContext) -> Defence:
    """A pass over the harmful prompts every `t_reg` task steps, or at the end of every epoch.

    The order of the prompts is that of the reference file, always; batches have the training batch size; the
    learning-rate schedule stands still during the pass. With a cosine or linear schedule the pass after the
    last task step has rate 0.

    Raises:
        InputError: no reference with harmful prompts, or a layer without a router.
    """
    harmful = prompt_set(context, HARMFUL)
    target = routing_target(config, context.model_config, harmful.router_logits, TEMPERATURE)
    hook = InterleaveHook(
        due=None if config.t_reg is None else _every(config.t_reg),
        batches=prompt_batches(harmful.prompts, context.batch_size, row_multiple=context.row_multiple),
        loss=RoutingLoss(config.direction, config.reduction),
        constants=target,
        clip_norm=context.clip_norm if config.clip else None,
    )
    notes = {
        "harmful_prompts": len(harmful.prompts),
        "temperature": float(target.temperature),
        "t_reg": config.t_reg,
    }
    return Defence("safemoe", interleave=hook, notes=notes)


def _every(t_reg: int) -> Callable[[int], bool]:
    return lambda task_step: task_step % t_reg == 0
