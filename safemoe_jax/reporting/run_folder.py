"""Reads a run folder for the report. What is missing stays missing: no value is made up or carried over."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safemoe_jax.errors import InputError

TITLES = {
    "model": "The model",  # of a run folder with one model only
    "aligned": "Aligned, before fine-tuning",
    "undefended": "Fine-tuned, no defence",
    "safemoe": "SafeMoE, as published",
    "safemoe_anchored": "SafeMoE, anchored",
}


MEASURES = {"hs", "over_refusal", "fa", "drift"}


@dataclass(frozen=True)
class Measure:
    """A figure with its 95 % interval, both in the unit of the figure; None: not measured."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Answer:
    """One prompt and one condition's answer to it, with what the judge said."""

    suite: str
    prompt: str
    text: str
    label: str


@dataclass(frozen=True)
class Condition:
    """Everything measured about one model of the run.

    Attributes:
        name: key in results.json.
        title: what a reader sees.
        hs, over_refusal, fa: percent.
        drift: mean KL over layers and prompts, nats.
        n: number of harmful prompts.
        seconds: time it took to train, or None.
        round_seconds: time of the same training steps under each condition, the conditions taking turns, or
            None.
        layers, drift_by_layer: index of each MoE layer and its mean KL, nats.
        drift_by_suite: mean KL on each kind of prompt (harmful, benign, task), nats.
        hs_curve: (optimizer step, HS in percent) pairs.
        judge: name of the judge of harmfulness, or "".
        answers: raw generations.
    """

    name: str
    title: str
    hs: Measure
    over_refusal: Measure
    fa: Measure
    drift: Measure
    n: int | None
    seconds: float | None
    round_seconds: float | None
    layers: tuple[int, ...]
    drift_by_layer: tuple[float, ...]
    drift_by_suite: dict[str, Measure]
    hs_curve: tuple[tuple[float, float], ...]
    judge: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Run:
    """A run folder as the report needs it.

    Attributes:
        folder: the run folder.
        seed, seconds: of the whole run, where the results name them.
        conditions: the models that were evaluated.
        configuration: config.yaml, "" without one.
        environment: environment.json.
        training: what a training run says of itself in results.json.
        metrics: rows of metrics.jsonl, one an optimizer step.
    """

    folder: Path
    seed: int | None
    seconds: float | None
    conditions: tuple[Condition, ...]
    configuration: str
    environment: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    metrics: tuple[dict[str, Any], ...] = ()


def relative_time(condition: Condition, undefended: Condition | None) -> float | None:
    """Training time as a multiple of the undefended model's; None where it was not measured in turns."""
    if undefended is None or not undefended.round_seconds or condition.round_seconds is None:
        return None
    return condition.round_seconds / undefended.round_seconds


def read_run(folder: Path | str) -> Run:
    """Reads results.json (required), metrics.jsonl, generations/*.jsonl, config.yaml and environment.json.

    Raises:
        InputError: the folder or its results.json is missing, or a file is not valid JSON.
    """
    folder = Path(folder)
    if not (folder / "results.json").is_file():
        raise InputError(
            "there is nothing to report", where=str(folder), expected="a run folder with results.json in it"
        )
    results = _read_json(folder / "results.json")
    conditions = results.get("conditions") or ({"model": results} if MEASURES & set(results) else {})
    config = folder / "config.yaml"
    environment = folder / "environment.json"
    return Run(
        folder=folder,
        seed=results.get("seed"),
        seconds=results.get("seconds"),
        conditions=tuple(_condition(name, entry, folder) for name, entry in conditions.items()),
        configuration=config.read_text(encoding="utf-8") if config.is_file() else "",
        environment=_read_json(environment) if environment.is_file() else {},
        training=results.get("training") or {},
        metrics=_read_rows(folder / "metrics.jsonl"),
    )


def _condition(name: str, entry: dict[str, Any], folder: Path) -> Condition:
    by_layer = tuple(float(value) for value in entry.get("drift_by_layer") or ())
    return Condition(
        name=name,
        title=_title(name),
        hs=_measure(entry, "hs"),
        over_refusal=_measure(entry, "over_refusal"),
        fa=_measure(entry, "fa"),
        drift=_measure(entry, "drift"),
        n=entry.get("n"),
        seconds=entry.get("seconds"),
        round_seconds=entry.get("round_seconds"),
        layers=tuple(entry.get("moe_layers") or range(len(by_layer))),
        drift_by_layer=by_layer,
        drift_by_suite={
            name: _measure(found, "drift") for name, found in (entry.get("routing") or {}).items()
        },
        hs_curve=tuple((float(step), float(hs)) for step, hs in entry.get("hs_curve") or ()),
        judge=entry.get("judge") or "",
        answers=tuple(map(_answer, _read_rows(folder / "generations" / f"{name}.jsonl"))),
    )


def _title(name: str) -> str:
    """A name of the user's own begins in upper case, as titles begin sentences of the verdict."""
    return TITLES.get(name) or name[:1].upper() + name[1:].replace("_", " ")


def _measure(entry: dict[str, Any], name: str) -> Measure:
    value = entry.get(name)
    low, high = entry.get(f"{name}_interval") or (None, None)
    return Measure(value, low, high)


def _read_rows(file: Path) -> tuple[dict[str, Any], ...]:
    """Rows of a JSON Lines file, none without a file; a last line without its end is still being written."""
    if not file.is_file():
        return ()
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    return tuple(_parse(line, f"{file}, line {i}") for i, line in enumerate(lines, start=1) if line.strip())


def _answer(row: dict[str, Any]) -> Answer:
    return Answer(
        suite=str(row.get("suite", "")),
        prompt=str(row.get("prompt", "")),
        text=str(row.get("answer", "")),
        label=str(row.get("label", "")),
    )


def _read_json(file: Path) -> dict[str, Any]:
    return _parse(file.read_text(encoding="utf-8"), str(file))


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"not valid JSON: {error}", where=where, expected="a file written by this program"
        ) from error
    if not isinstance(value, dict):
        raise InputError("not a JSON object", where=where, expected="a file written by this program")
    return value
