"""Where a checkpoint lies: a folder as given, or the files of a hub repository that are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safemoe_jax.errors import InputError

# Configuration, index, tokenizer and chat template.
_DESCRIPTION = ("*.json", "*.jinja")
_WHOLE = (*_DESCRIPTION, "*.safetensors", "merges.txt", "tokenizer.model")


def find_folder(path_or_hub_id: str | Path) -> Path:
    """The folder of a checkpoint: as given, or a snapshot fetched from the Hugging Face hub.

    Args:
        path_or_hub_id: a folder, or `owner/name` where no such folder is there.

    Raises:
        InputError: neither a folder nor something that the hub has.
    """
    return _find(path_or_hub_id, _WHOLE)


def find_description(path_or_hub_id: str | Path) -> Path:
    """`find_folder` without weights: of the hub only the files that describe the checkpoint are fetched."""
    return _find(path_or_hub_id, _DESCRIPTION)


def _find(path_or_hub_id: str | Path, patterns: Sequence[str]) -> Path:
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
