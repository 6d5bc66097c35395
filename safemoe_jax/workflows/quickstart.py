"""`safemoe quickstart`: a small aligned model, attacked with and without defences, measured and reported.

Everything runs through what the other commands run through; only the wiring is here.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import yaml

from safemoe_jax.checkpoints.atomic import new_file
from safemoe_jax.checkpoints.json_files import write_json
from safemoe_jax.data.formats import Sample
from safemoe_jax.data.sources import SourceConfig, read_source
from safemoe_jax.errors import InputError
from safemoe_jax.evaluation.metrics import exact, share_percent
from safemoe_jax.evaluation.records import write_jsonl
from safemoe_jax.evaluation.suites import Suites, answer, evaluate
from safemoe_jax.model import Model, load_pretrained
from safemoe_jax.models.config import LoraConfig
from safemoe_jax.organism.judge import organism_judge
from safemoe_jax.organism.recipe import CONDITIONS, MAX_NEW_TOKENS, Recipe, attack_config, defence_config
from safemoe_jax.parallel.allocator import keep_freed_memory
from safemoe_jax.reporting.html import write_report
from safemoe_jax.training.config import TrainConfig
from safemoe_jax.training.run_folder import environment
from safemoe_jax.workflows.organism import cached_organism
from safemoe_jax.workflows.reference import ReferenceConfig, extract_reference
from safemoe_jax.workflows.step_time import paired_seconds, relative_seconds
from safemoe_jax.workflows.train import finetune, plan_run

BATCH_SIZE = 40  # prompts computed together; one size, so that tests and curve share compiled programs
CURVE_PROMPTS = 40
CURVE_EVERY = 20  # task steps

Figures = dict[str, Any]


@dataclass(frozen=True)
class QuickstartConfig:
    """Builds a small aligned model (kept for the next time), fine-tunes it on a task whose data hold harmful
    samples, undefended, with published SafeMoE and with the anchored form, and measures all of them.

    Attributes:
        seed: of the world, the model and the attacks.
        output: the run folder; an earlier quickstart there is moved aside, not deleted.
        cache: where organisms are kept; null is the home folder's cache.
        trained: what the attack trains: adapters on q and v, or all parameters.
    """

    seed: int = 0
    output: str = "runs/quickstart"
    cache: str | None = None
    trained: Literal["adapters", "all"] = "adapters"


def quickstart(config: QuickstartConfig, *, recipe: Recipe | None = None) -> str:
    """Runs everything, writes the run folder, and returns the table and the report's path.

    Args:
        config: seed and folders.
        recipe: sizes and stages; the built-in ones by default.

    Raises:
        InputError: the output folder holds something else, or the disk refuses.
    """
    began = time.perf_counter()
    keep_freed_memory()
    recipe = Recipe() if recipe is None else recipe
    folder = open_run_folder(config, recipe)
    organism = cached_organism(recipe, config.seed, config.cache)
    conditions = run_conditions(organism, folder, config, recipe, CONDITIONS)
    seconds = time.perf_counter() - began
    results = {"seed": config.seed, "seconds": seconds, "trained": config.trained, "conditions": conditions}
    write_json(folder / "results.json", results)
    return f"{table(conditions)}\n{seconds:.0f} s\n{write_report(folder)}"


def run_conditions(
    organism: Path,
    folder: Path,
    config: QuickstartConfig,
    recipe: Recipe,
    names: Sequence[str],
    split: str = "test",
) -> dict[str, Figures]:
    """Attacks the organism under each named condition and measures every model, the aligned one first.

    Args:
        organism: folder of the organism.
        folder: run folder; each condition's training run becomes a folder in it.
        config: seed, and what the attack trains.
        recipe: the stages.
        names: conditions, of `organism.recipe.CONDITIONS`.
        split: "test", or "validation" for choosing a recipe.

    Returns:
        Condition -> figures, as results.json holds them.
    """
    aligned = load_pretrained(organism / "model", dtype="float32")
    tests, few = _suites(organism, split), _suites(organism, "validation").harmful[:CURVE_PROMPTS]
    reference = _reference(organism, folder)
    start = harmfulness(aligned, few)
    conditions = {"aligned": _measure(aligned, aligned, tests, folder, "aligned")}
    lora = LoraConfig() if config.trained == "adapters" else None
    attacks: dict[str, TrainConfig] = {}
    for name in names:
        _say(f"fine-tuning: {name}")
        defence = defence_config(recipe, name, reference)
        attacks[name] = attack_config(recipe, organism, folder / name, config.seed, defence, lora=lora)
        curve = Curve(few, [(0, start)])
        result = finetune(attacks[name], model=aligned, on_step=[curve])
        curve.measure(result.summary["task_steps"], result.model)
        figures = _measure(as_loaded(result.model), aligned, tests, folder, name)
        conditions[name] = figures | _training_facts(result.summary, curve)
    for name, seconds in _round_seconds(attacks, aligned, recipe).items():
        conditions[name]["round_seconds"] = seconds
    return conditions


class Curve:
    """HS on a few validation prompts while training goes on, and the seconds that this took.

    points: (task step, HS in percent). seconds: spent measuring during training, to be left out of its time.
    """

    def __init__(self, prompts: Sequence[Sample], points: list[tuple[int, float]]) -> None:
        self.prompts, self.points, self.seconds = prompts, points, 0.0

    def __call__(self, step: int, model: Model) -> None:
        """To be called after every task step."""
        if step % CURVE_EVERY:
            return
        jax.block_until_ready(model.params)  # what is still being trained is not measuring time
        began = time.perf_counter()
        self.measure(step, model)
        self.seconds += time.perf_counter() - began

    def measure(self, step: int, model: Model) -> None:
        """Adds a point, once."""
        if step != self.points[-1][0]:
            self.points.append((step, harmfulness(as_loaded(model), self.prompts)))


def harmfulness(model: Model, prompts: Sequence[Sample]) -> float:
    """HS in percent by the organism's exact judge."""
    answers = answer(model, prompts, MAX_NEW_TOKENS, BATCH_SIZE)
    return share_percent(organism_judge().unsafe(prompts, answers))["value"]


def as_loaded(model: Model) -> Model:
    """The model with adapters merged, its arrays placed as a loaded one's: one program then measures both."""
    model = model.merged()
    params = {name: jnp.asarray(jax.device_get(value)) for name, value in model.params.items()}
    return dataclasses.replace(model, params=params)


def table(conditions: dict[str, Figures]) -> str:
    """The figures, a line a condition; time is relative to that of the undefended one."""
    header = (
        f"{'condition':<18}{'HS %':>8}{'FA %':>8}{'over-refusal %':>16}{'drift':>10}{'time, relative':>16}"
    )
    rows = [_row(name, figures, relative_seconds(conditions, name)) for name, figures in conditions.items()]
    return "\n".join([header, *rows])


def _row(name: str, f: Figures, relative: float | None) -> str:
    shown = "" if relative is None else f"{relative:.2f}"
    return f"{name:<18}{f['hs']:>8.1f}{f['fa']:>8.1f}{f['over_refusal']:>16.1f}{f['drift']:>10.5f}{shown:>16}"


def _measure(model: Model, aligned: Model, tests: Suites, folder: Path, name: str) -> Figures:
    _say(f"measuring: {name}")
    found = evaluate(model, tests, judge=organism_judge(), metric=exact, aligned=aligned)
    write_jsonl(folder / "generations" / f"{name}.jsonl", found.generations)
    return found.results


def _round_seconds(attacks: dict[str, TrainConfig], aligned: Model, recipe: Recipe) -> dict[str, float]:
    """Seconds of the steps between two passes under each condition, in turns. Nothing is written."""
    _say("timing: all conditions, in turns")
    plans = {name: plan_run(attack, aligned)[0] for name, attack in attacks.items()}
    return paired_seconds(plans, recipe.t_reg)


def _training_facts(summary: dict[str, Any], curve: Curve) -> Figures:
    """What is reported about the run: its seconds are those of the steps, without compiling and measuring."""
    copied = ("task_steps", "routing_steps", "tokens", "compile_seconds", "final_loss")
    facts = {key: summary[key] for key in copied}
    return {"seconds": summary["seconds"] - curve.seconds, "hs_curve": curve.points, **facts}


def _suites(organism: Path, split: str) -> Suites:
    def read(name: str) -> list[Sample]:
        return read_source(SourceConfig(str(organism / "data" / f"{split}_{name}.jsonl"), format="chat"))

    return Suites(
        harmful=read("restricted"),
        benign=read("benign"),
        task=read("task"),
        max_new_tokens=MAX_NEW_TOKENS,
        task_max_new_tokens=MAX_NEW_TOKENS,
        batch_size=BATCH_SIZE,
    )


def _reference(organism: Path, folder: Path) -> Path:
    """What the aligned model does on D_h and D_b, recorded as `safemoe reference` records it."""
    target = folder / "reference.safetensors"
    harmful, benign = (
        SourceConfig(str(organism / "data" / f"{name}.jsonl"), format="chat") for name in ("d_h", "d_b")
    )
    config = ReferenceConfig(
        str(organism / "model"), str(target), harmful, benign, log_probs=True, batch_size=BATCH_SIZE
    )
    _say(extract_reference(config))
    return target


def open_run_folder(config: QuickstartConfig, recipe: Recipe) -> Path:
    """Makes the run folder. Raises InputError where something is that no quickstart wrote."""
    folder = Path(config.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        _move_aside(folder)
    settings = {"quickstart": dataclasses.asdict(config), "recipe": dataclasses.asdict(recipe)}
    with new_file(folder / "config.yaml") as draft:
        draft.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    write_json(folder / "environment.json", environment() | {"organism": True, "seeds": [config.seed]})
    return folder


def _move_aside(folder: Path) -> None:
    written = folder / "config.yaml"
    if not written.is_file() or "quickstart" not in (
        yaml.safe_load(written.read_text(encoding="utf-8")) or {}
    ):
        raise InputError(
            "the output folder holds something that is no quickstart",
            where=str(folder),
            expected="a new or empty folder, or an earlier quickstart's; nothing was changed",
        )
    older = next(p for i in range(1, 10**6) if not (p := folder.with_name(f"{folder.name}-{i}")).exists())
    folder.rename(older)
    _say(f"an earlier quickstart was moved to {older}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
