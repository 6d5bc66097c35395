"""JSON files of a run folder: written whole or not at all, added to without losing what is there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safemoe_jax.checkpoints.atomic import new_file
from safemoe_jax.checkpoints.huggingface import read_json


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_if_there(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no file.

    Raises:
        InputError: the file is not a JSON object.
    """
    return read_json(path) if path.exists() else {}


def add_results(folder: str | Path, values: Mapping[str, Any]) -> None:
    """Adds keys to the folder's results.json and keeps the others."""
    path = Path(folder) / "results.json"
    write_json(path, read_if_there(path) | dict(values))
