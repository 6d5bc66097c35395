"""No defence: plain supervised fine-tuning."""

from __future__ import annotations

from safemoe_jax.defenses.context import DefenceContext
from safemoe_jax.training.config import DefenceConfig
from safemoe_jax.training.hooks import Defence


def build(config: DefenceConfig, context: DefenceContext) -> Defence:
    """A defence that fills no hook."""
    return Defence("none")
