"""Results and raw generations on disk: `results.json` and `generations/<name>.jsonl` of a run folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safemoe_jax.checkpoints.atomic import new_file
from safemoe_jax.checkpoints.json_files import read_if_there
from safemoe_jax.errors import InputError


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, the file whole or not at all."""
    with new_file(path) as temporary:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text("".join(lines), encoding="utf-8")


def check_free(folder: str | Path, section: str, settings: Mapping[str, Any]) -> None:
    """Refuses a folder whose results.json holds this section with other settings. Nothing is written.

    Args:
        folder: the output folder; it may be the one of a training run.
        section: key in results.json, such as "evaluation".
        settings: what the section's figures depend on.

    Raises:
        InputError: results of another configuration are there, or results.json is damaged.
    """
    path = Path(folder) / "results.json"
    before = read_if_there(path).get(section, {}).get("settings")
    settings = json.loads(json.dumps(settings))  # as they come back from the file: tuples become lists
    # A setting that an older file lacks counts as null.
    keys = {*before, *settings} if before is not None else ()
    changed = sorted(key for key in keys if before.get(key) != settings.get(key))
    if changed:
        raise InputError(
            f"the output folder holds an {section} with other settings ({', '.join(changed)})",
            where=str(path),
            expected="another output folder; nothing was changed",
        )
