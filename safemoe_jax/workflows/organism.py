"""`safemoe organism`: writes the built-in model organism, so that every other command can be tried on it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from safemoe_jax.organism.build import build, cache_folder, is_built
from safemoe_jax.organism.recipe import Recipe
from safemoe_jax.parallel.allocator import keep_freed_memory
from safemoe_jax.workflows.train import finetune


@dataclass(frozen=True)
class OrganismConfig:
    """Trains a small aligned Mixture-of-Experts model on a synthetic world and writes it in real formats:
    `model/` and `pretrained/` (Hugging Face folders), `data/*.jsonl` (chat messages).

    Attributes:
        output: a new folder.
        seed: of the world, the initial weights and the order of the data.
    """

    output: str = "runs/organism"
    seed: int = 0


def build_organism(config: OrganismConfig) -> str:
    """Builds the organism and returns what to print.

    Raises:
        InputError: the folder is there and not empty, or the disk refuses.
    """
    keep_freed_memory()
    seconds = build(Path(config.output), config.seed, Recipe(), finetune, _say)
    return f"{config.output}/model, {config.output}/data ({sum(seconds.values()):.0f} s)"


def cached_organism(recipe: Recipe, seed: int, root: str | None) -> Path:
    """The organism of a recipe and seed: from the cache, or built and left there for the next time."""
    folder = cache_folder(recipe, seed, root)
    if is_built(folder):
        _say(f"organism: from the cache, {folder}")
    else:
        build(folder, seed, recipe, finetune, _say)
    return folder


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
