"""Defences against harmful fine-tuning, by name. Each file fills one or two hooks of
`training.hooks.Defence`."""

from __future__ import annotations

from collections.abc import Callable

from safemoe_jax.defenses import none, safemoe, safemoe_anchored
from safemoe_jax.defenses.context import DefenceContext
from safemoe_jax.errors import InputError
from safemoe_jax.training.config import DefenceConfig
from safemoe_jax.training.hooks import Defence

__all__ = ["REGISTRY", "DefenceContext", "build", "check_name"]

REGISTRY: dict[str, Callable[[DefenceConfig, DefenceContext], Defence]] = {
    "none": none.build,
    "safemoe": safemoe.build,
    "safemoe_anchored": safemoe_anchored.build,
}


def check_name(config: DefenceConfig) -> None:
    """Raises InputError for a defence that does not exist."""
    if config.name not in REGISTRY:
        raise InputError(
            f"unknown defence '{config.name}'",
            where="the configuration, field defence.name",
            expected=f"one of {', '.join(REGISTRY)}",
        )


def build(config: DefenceConfig, context: DefenceContext) -> Defence:
    """The configured defence for a run.

    Raises:
        InputError: an unknown name, or something that the defence needs and does not find.
    """
    check_name(config)
    return REGISTRY[config.name](config, context)
