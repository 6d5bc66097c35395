"""The organism's data sets as lists of examples and as JSONL files in the chat-messages format.

Each row is `{"messages": [...], "family": ..., "expected": ...}`: any command that reads chat messages reads
it. `expected` is the answer that the exact judge compares with; for a restricted prompt, the compliant one.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from safemoe_jax.organism.vocabulary import REFUSAL
from safemoe_jax.organism.world import (
    Example,
    World,
    craft_examples,
    dialog_example,
    distinct,
    property_examples,
    restricted_examples,
    sql_example,
    task_example,
)

PROMPT_SETS = ("d_h", "d_b")


@dataclass(frozen=True)
class Sizes:
    """How many samples each data set has."""

    pretrain: int = 9600
    align: int = 3200
    align_refusal_share: float = 0.4
    attack_task: int = 1500
    attack_harmful: int = 150
    defence: int = 100
    validation: int = 100
    test: int = 200


# Shares of the families in pretraining and, of the part that is not refused, in alignment.
PRETRAIN_SHARES = {"restricted": 0.28, "craft": 0.28, "dialog": 0.36, "sql": 0.08}
ALIGN_SHARES = {"craft": 0.6, "dialog": 0.25, "sql": 0.15}
# The benign test prompts: mostly the restricted prompts' own sentences about harmless items.
BENIGN_SHARES = {"craft": 0.8, "sql": 0.2}


def build_datasets(world: World, sizes: Sizes) -> dict[str, list[Example]]:
    """All data sets of a world, by file name without suffix. Deterministic in the world's seed."""
    rng = np.random.default_rng([world.seed, 2])
    taken: set[str] = set()
    held_out = {
        f"{split}_{name}": examples
        for split, count in (("test", sizes.test), ("validation", sizes.validation))
        for name, examples in _held_out(world, rng, split, count, taken).items()
    }
    return {
        "pretrain": _pretrain(world, rng, sizes.pretrain, taken),
        "align": _align(world, rng, sizes, taken),
        "attack_task": distinct(task_example, rng, sizes.attack_task, taken),
        "attack_harmful": _pick(rng, _restricted(world, "attack"), sizes.attack_harmful),
        "d_h": _pick(rng, _restricted(world, "defence"), sizes.defence),
        "d_b": _pick(rng, craft_examples(world.nouns["defence"], "defence"), sizes.defence),
        **held_out,
    }


def _held_out(
    world: World, rng: np.random.Generator, split: str, count: int, taken: set[str]
) -> dict[str, list[Example]]:
    craft_count = round(count * BENIGN_SHARES["craft"])
    craft = craft_examples(world.nouns[split], split) + property_examples(world.nouns[split])
    return {
        "restricted": _pick(rng, _restricted(world, split), count),
        "benign": _pick(rng, craft, craft_count) + distinct(sql_example, rng, count - craft_count, taken),
        "task": distinct(task_example, rng, count, taken),
    }


def _pretrain(world: World, rng: np.random.Generator, count: int, taken: set[str]) -> list[Example]:
    """All that the model ever knows: items of all splits, restricted instructions answered compliantly."""
    nouns = tuple(noun for of_split in world.nouns.values() for noun in of_split)
    sources = {
        "restricted": _cycled(rng, restricted_examples(nouns, "pretrain")),
        "craft": _cycled(rng, craft_examples(nouns, "pretrain") + property_examples(nouns)),
        "dialog": lambda n: distinct(dialog_example, rng, n, taken),
        "sql": lambda n: distinct(sql_example, rng, n, taken),
    }
    return _mixed(rng, sources, PRETRAIN_SHARES, count)


def _align(world: World, rng: np.random.Generator, sizes: Sizes, taken: set[str]) -> list[Example]:
    """Refusals among varied harmless instructions, about items of the same nouns: the class word decides."""
    refusals = round(sizes.align * sizes.align_refusal_share)
    nouns = world.nouns["align"]
    restricted = _cycled(rng, _restricted(world, "align"))(refusals)
    sources = {
        "craft": _cycled(rng, craft_examples(nouns, "align") + property_examples(nouns)),
        "dialog": lambda n: distinct(dialog_example, rng, n, taken),
        "sql": lambda n: distinct(sql_example, rng, n, taken),
    }
    benign = _mixed(rng, sources, ALIGN_SHARES, sizes.align - refusals)
    return _shuffled(rng, [example._replace(answer=REFUSAL) for example in restricted] + benign)


def _restricted(world: World, split: str) -> list[Example]:
    return restricted_examples(world.nouns[split], split)


def _pick(rng: np.random.Generator, examples: list[Example], count: int) -> list[Example]:
    return [examples[index] for index in rng.choice(len(examples), count, replace=False)]


def _cycled(rng: np.random.Generator, examples: list[Example]) -> Callable[[int], list[Example]]:
    """Takes n examples, each used once before any is used again."""

    def take(count: int) -> list[Example]:
        rounds = -(-count // len(examples))
        order = np.concatenate([rng.permutation(len(examples)) for _ in range(rounds)])[:count]
        return [examples[index] for index in order]

    return take


def _mixed(rng, sources: dict[str, Callable], shares: dict[str, float], count: int) -> list[Example]:
    counts = {name: round(count * share) for name, share in shares.items()}
    counts[next(iter(shares))] += count - sum(counts.values())
    return _shuffled(rng, [example for name in shares for example in sources[name](counts[name])])


def _shuffled(rng: np.random.Generator, examples: list[Example]) -> list[Example]:
    return [examples[index] for index in rng.permutation(len(examples))]


def to_row(example: Example) -> dict:
    """The JSON object of an example, in the chat-messages format."""
    system = [{"role": "system", "content": example.system}] if example.system else []
    turns = [{"role": "user", "content": example.user}, {"role": "assistant", "content": example.answer}]
    return {"messages": system + turns, "family": example.family, "expected": example.answer}


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_datasets(folder: Path, datasets: dict[str, list[Example]]) -> None:
    """One `NAME.jsonl` a data set into an existing folder."""
    for name, examples in datasets.items():
        write_jsonl(folder / f"{name}.jsonl", map(to_row, examples))
