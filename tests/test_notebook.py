"""The notebook runs from top to bottom within a minute of two cores, and its last cell's claim holds."""

from __future__ import annotations

import resource
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent


def children_seconds() -> float:
    """Processor seconds of the processes started here that have ended (the notebook's kernel)."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_quickstart_notebook_runs(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "experiments" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    before = children_seconds()
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    # Processor time, since a loaded machine says nothing about the notebook: a minute of two cores.
    assert children_seconds() - before < 120
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "text" in output
    )
    assert "safemoe_anchored" in printed and "layer 0: experts [" in printed
