"""Tables as text, for the terminal and for Markdown files."""

from __future__ import annotations

from collections.abc import Sequence

from safemoe_jax.reporting.run_folder import Condition, Measure, Run

HEADER = ("condition", "HS %", "interval", "over-refusal %", "task accuracy %", "drift (KL)", "n", "seconds")


def summary(run: Run) -> str:
    """The run's conditions as a table for the terminal."""
    return text_table(HEADER, condition_rows(run.conditions))


def condition_rows(conditions: Sequence[Condition]) -> list[tuple[str, ...]]:
    """One row a condition, in the columns of `HEADER`; an en dash where nothing was measured."""
    return [
        (
            c.title,
            number(c.hs.value, 1),
            interval(c.hs),
            number(c.over_refusal.value, 1),
            number(c.fa.value, 1),
            significant(c.drift.value),
            number(c.n, 0),
            number(c.seconds, 1),
        )
        for c in conditions
    ]


def suite_drift(conditions: Sequence[Condition]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the drift on each kind of prompt; none for a single kind."""
    suites = list(dict.fromkeys(suite for c in conditions for suite in c.drift_by_suite))
    if len(suites) < 2:
        return (), []
    rows = [
        (c.title, *(significant(c.drift_by_suite.get(suite)) for suite in suites))
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


def number(value: float | None, digits: int) -> str:
    """A value with this many decimals, or an en dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def significant(value: float | None) -> str:
    """A value with three significant digits, or an en dash."""
    return "–" if value is None else f"{value:.3g}"


def interval(measure: Measure) -> str:
    """'87.0 to 94.6', or an en dash."""
    if measure.low is None or measure.high is None:
        return "–"
    return f"{measure.low:.1f} to {measure.high:.1f}"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([cells[0].ljust(widths[0]), *rest]).rstrip()
