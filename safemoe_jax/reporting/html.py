"""The report: one HTML page that needs no other file and asks no other machine for anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safemoe_jax.checkpoints.atomic import new_file
from safemoe_jax.reporting import figures, tables
from safemoe_jax.reporting.run_folder import Answer, Condition, Run, read_run
from safemoe_jax.reporting.verdict import judge_run

TEMPLATE = Path(__file__).parent / "report.html.jinja"
SAMPLES_PER_SUITE = 4


@dataclass(frozen=True)
class Comparison:
    """One prompt with every condition's answer to it."""

    prompt: str
    answers: tuple[Answer | None, ...]


def write_report(folder: Path | str) -> Path:
    """Writes report.html into a run folder, from the files in it.

    Raises:
        InputError: the folder has no results.json, or a file in it is damaged.
    """
    run = read_run(folder)
    target = run.folder / "report.html"
    with new_file(target) as draft:
        draft.write_text(render(run), encoding="utf-8")
    return target


def render(run: Run) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(_content(run))


def _content(run: Run) -> dict[str, Any]:
    colours = [figures.colour_class(condition, i) for i, condition in enumerate(run.conditions)]
    return {
        "run": run,
        "verdict": judge_run(run.conditions),
        "titles": {condition.name: condition.title for condition in run.conditions},
        "header": tables.HEADER,
        "rows": tables.condition_rows(run.conditions),
        "colours": colours,
        "timed": any(condition.round_seconds for condition in run.conditions),
        "legend": list(zip(colours, run.conditions, strict=True)),
        "judges": sorted({condition.judge for condition in run.conditions if condition.judge}),
        "intervals": figures.interval_chart(run.conditions),
        "heatmap": figures.drift_heatmap(run.conditions),
        "suite_drift": tables.suite_drift(run.conditions),
        "curves": figures.curve_chart(run.conditions),
        "training_chart": figures.training_chart(run.metrics),
        "training": flatten(run.training),
        "suites": compare_answers(run.conditions),
        "environment": flatten(run.environment),
        "organism": bool(run.environment.get("organism")),
    }


def compare_answers(conditions: Sequence[Condition]) -> list[tuple[str, list[Comparison]]]:
    """For each suite of prompts the first few, those first on which the conditions differ."""
    suites: dict[str, dict[str, list[Answer | None]]] = {}
    for i, condition in enumerate(conditions):
        for answer in condition.answers:
            rows = suites.setdefault(answer.suite, {})
            rows.setdefault(answer.prompt, [None] * len(conditions))[i] = answer
    return [(suite, _chosen(rows)) for suite, rows in suites.items()]


def _chosen(rows: dict[str, list[Answer | None]]) -> list[Comparison]:
    comparisons = [Comparison(prompt, tuple(answers)) for prompt, answers in rows.items()]
    differing = [c for c in comparisons if len({answer.label for answer in c.answers if answer}) > 1]
    alike = [c for c in comparisons if c not in differing]
    return (differing + alike)[:SAMPLES_PER_SUITE]


def flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested dictionaries as (dotted name, text) pairs."""
    pairs: list[tuple[str, str]] = []
    for name, value in tree.items():
        if isinstance(value, dict):
            pairs += flatten(value, f"{prefix}{name}.")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            pairs.append((prefix + name, shown))
    return pairs
