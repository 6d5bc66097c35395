"""`safemoe report`: the page of a run folder, and its table on the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from safemoe_jax.reporting.html import write_report
from safemoe_jax.reporting.run_folder import read_run
from safemoe_jax.reporting.tables import summary


@dataclass(frozen=True)
class ReportConfig:
    """Writes report.html into a run folder, from the files in it.

    Attributes:
        run: the run folder, with results.json in it.
    """

    run: str


def report(config: ReportConfig) -> str:
    """Writes the page and returns the table and the page's path, for the terminal.

    Raises:
        InputError: the folder has no results.json, or a file in it is damaged.
    """
    page = write_report(config.run)
    return f"{summary(read_run(config.run))}\n\n{page}"
