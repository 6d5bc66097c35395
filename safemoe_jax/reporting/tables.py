"""Tables as text, for the terminal and for Markdown files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from safemoe_jax.reporting.run_folder import Condition, Measure, Run, relative_time

HEADER = (
    "condition",
    "HS %",
    "over-refusal %",
    "task accuracy %",
    "drift (KL)",
    "n",
    "seconds",
    "time, relative",
)


@dataclass(frozen=True)
class Cell:
    """What a table says in one place: a figure, and below it its interval or \"\"."""

    text: str
    interval: str = ""


def summary(run: Run) -> str:
    """The run's conditions as a table for the terminal, each interval in the line below its figure."""
    lines = []
    for row in condition_rows(run.conditions):
        lines.append([cell.text for cell in row])
        if any(cell.interval for cell in row):
            lines.append([cell.interval for cell in row])
    return text_table(HEADER, lines)


def condition_rows(conditions: Sequence[Condition]) -> list[tuple[Cell, ...]]:
    """One row a condition, in the columns of `HEADER`; an en dash where nothing was measured."""
    undefended = next((c for c in conditions if c.name == "undefended"), None)
    return [
        (
            Cell(c.title),
            measured(c.hs, one_decimal),
            measured(c.over_refusal, one_decimal),
            measured(c.fa, one_decimal),
            measured(c.drift, significant),
            Cell(number(c.n, 0)),
            Cell(number(c.seconds, 1)),
            Cell(number(relative_time(c, undefended), 2)),
        )
        for c in conditions
    ]


def suite_drift(conditions: Sequence[Condition]) -> tuple[tuple[str, ...], list[tuple[Cell, ...]]]:
    """Header and rows of the drift on each kind of prompt; none for a single kind."""
    suites = list(dict.fromkeys(suite for c in conditions for suite in c.drift_by_suite))
    if len(suites) < 2:
        return (), []
    rows = [
        (Cell(c.title), *(measured(c.drift_by_suite.get(suite, Measure()), significant) for suite in suites))
        for c in conditions
        if c.drift_by_suite
    ]
    return ("condition", *(f"{suite} prompts" for suite in suites)), rows


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [_aligned(header, widths), "  ".join("-" * width for width in widths)]
    return "\n".join(lines + [_aligned(row, widths) for row in rows])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table in Markdown."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured(measure: Measure, shown: Callable[[float | None], str]) -> Cell:
    """A figure with its interval ("87.0 to 94.6") where it has one, both written by `shown`."""
    if measure.low is None or measure.high is None:
        return Cell(shown(measure.value))
    return Cell(shown(measure.value), f"{shown(measure.low)} to {shown(measure.high)}")


def number(value: float | None, digits: int) -> str:
    """A value with this many decimals, or an en dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def one_decimal(value: float | None) -> str:
    """A percentage as tables show it, or an en dash."""
    return number(value, 1)


def significant(value: float | None) -> str:
    """A value with three significant digits, or an en dash."""
    return "–" if value is None else f"{value:.3g}"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([cells[0].ljust(widths[0]), *rest]).rstrip()
