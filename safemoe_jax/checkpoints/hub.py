"""Where a checkpoint lies: a folder as given, or the files of a hub repository that are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safemoe_jax.errors import InputError

DESCRIPTION_FILES = ("*.json", "*.jinja")
"""What describes a checkpoint: configuration, index, tokenizer and chat template, no weights."""


def find_checkpoint(path_or_hub_id: str | Path, patterns: Sequence[str]) -> Path:
    """The folder of a checkpoint: as given, or fetched from the Hugging Face hub.

    Args:
        path_or_hub_id: a folder, or `owner/name` where no such folder is there.
        patterns: file names to fetch from the hub, with wildcards.

    Raises:
        InputError: neither a folder nor something that the hub has.
    """
    path, text = Path(path_or_hub_id).expanduser(), str(path_or_hub_id)
    if path.is_dir():
        return path
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1:
        raise InputError(
            "no such folder", where=text, expected="a checkpoint folder, or a hub id like owner/name"
        )
    return _fetch(text, patterns)


def _fetch(hub_id: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"neither a folder here nor a checkpoint that the hub gives: {reason}",
            where=hub_id,
            expected="a checkpoint folder, or a hub id that this machine can reach and may read",
        ) from error
