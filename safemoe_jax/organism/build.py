"""Builds the organism: a folder with its data, the model before alignment and the aligned model.

data/*.jsonl     chat messages: pretrain, align, attack_task, attack_harmful, d_h, d_b, and the validation and
                 test prompts (restricted, benign, task)
pretrained/      Hugging Face folder: knows the answers to restricted instructions and gives them
model/           Hugging Face folder: the aligned model, refuses restricted instructions
organism.json    seed, recipe, seconds
"""

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from safemoe_jax.checkpoints.atomic import new_folder
from safemoe_jax.families import family_of
from safemoe_jax.models.config import ModelConfig
from safemoe_jax.organism.datasets import build_datasets, write_datasets
from safemoe_jax.organism.recipe import Recipe, align_config, fingerprint, network, pretrain_config
from safemoe_jax.organism.tokenizer import write_tokenizer
from safemoe_jax.organism.vocabulary import END, PAD, vocabulary
from safemoe_jax.organism.world import make_world
from safemoe_jax.training.config import TrainConfig

Train = Callable[[TrainConfig], object]
"""Runs a configuration and leaves the model in its run folder (`workflows.train.finetune`)."""


def cache_folder(recipe: Recipe, seed: int, root: str | Path | None = None) -> Path:
    """Where the organism of a recipe and seed is kept: below `root`, by default in the home folder."""
    root = Path.home() / ".cache" / "safemoe_jax" / "organism" if root is None else Path(root).expanduser()
    return root / f"{fingerprint(recipe)}-{seed}"


def is_built(folder: Path) -> bool:
    """Whether the folder holds a finished organism (it appears whole or not at all)."""
    return (folder / "organism.json").is_file()


def build(
    folder: Path, seed: int, recipe: Recipe, train: Train, say: Callable[[str], None] = print
) -> dict[str, float]:
    """Draws the world of a seed, pretrains and aligns a model on it, and writes the organism's folder.

    Args:
        folder: new or empty; it appears when all is done.
        seed: of the world, the initial weights and the order of the data.
        recipe: sizes and stages.
        train: the trainer.
        say: told what begins.

    Returns:
        Seconds each stage took.

    Raises:
        InputError: the folder is there and not empty, or the disk refuses.
    """
    seconds: dict[str, float] = {}
    with new_folder(folder) as draft, tempfile.TemporaryDirectory() as scratch:
        data, runs = draft / "data", Path(scratch)
        data.mkdir()
        write_datasets(data, build_datasets(make_world(seed), recipe.sizes))
        _write_start(runs / "start", network(recipe))
        stages = (
            (
                "pretrain",
                "pretrained",
                pretrain_config(recipe, runs / "start", data, runs / "pretrain", seed),
            ),
            ("align", "model", align_config(recipe, runs / "pretrain" / "model", data, runs / "align", seed)),
        )
        for stage, _, config in stages:
            say(f"organism: {stage}")
            began = time.perf_counter()
            train(config)
            seconds[stage] = time.perf_counter() - began
        for stage, name, _ in stages:
            shutil.move(runs / stage / "model", draft / name)
        facts = {"seed": seed, "recipe": dataclasses.asdict(recipe), "seconds": seconds}
        (draft / "organism.json").write_text(json.dumps(facts, indent=2) + "\n")
    return seconds


def _write_start(folder: Path, config: ModelConfig) -> None:
    """A model folder without weights: config.json and tokenizer, for training from random weights."""
    folder.mkdir()
    ids = {
        "pad_token_id": vocabulary().index(PAD),
        "eos_token_id": vocabulary().index(END),
        "bos_token_id": None,
    }
    fields = family_of(config.family).write_config(config) | ids
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    write_tokenizer(folder)
