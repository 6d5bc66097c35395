"""The run folder: config.yaml, environment.json, metrics.jsonl, results.json, checkpoints/, adapter/ or
model/."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import yaml

from safemoe_jax.checkpoints.atomic import new_file
from safemoe_jax.checkpoints.huggingface import list_checkpoint
from safemoe_jax.checkpoints.json_files import read_if_there, write_json
from safemoe_jax.checkpoints.safetensors_files import list_tensors
from safemoe_jax.errors import InputError
from safemoe_jax.training.config import TrainConfig, identity, to_dict

PACKAGES = (
    "safemoe_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "transformers",
)


_LONGEST_NAME = 255  # bytes of one part of a path, on the usual file systems


def check_folder(config: TrainConfig) -> None:
    """Refuses an output folder that another run made. Nothing is written.

    Raises:
        InputError: the folder holds a run with another configuration, a damaged one, or something that is
            not a run; or it cannot be made.
    """
    folder = Path(config.output)
    if not _is_there(folder):
        return
    if not folder.is_dir():
        raise InputError("the output is a file", where=str(folder), expected="a new folder")
    if not any(not path.name.startswith(".") for path in folder.iterdir()):
        return
    written = folder / "config.yaml"
    if not written.is_file():
        raise InputError(
            "the output folder is not empty and holds no run",
            where=str(folder),
            expected="a new folder, or one of this same run to continue; nothing was changed",
        )
    before, now = _read_yaml(written), to_dict(config)
    different = _differences(identity(before), identity(now))
    if different:
        shown = "; ".join(f"{name} was {old!r}, is {new!r}" for name, old, new in different[:4])
        raise InputError(
            f"the output folder belongs to a run with another configuration: {shown}",
            where=str(written),
            expected="another output folder, or the configuration of that run to continue it",
        )
    _check_kinds(folder)
    read_if_there(folder / "results.json")  # to be added to after the training: damaged, it would be too late


def _is_there(folder: Path) -> bool:
    """Whether there is something at this path. Raises InputError where nothing can be made there."""
    try:
        os.stat(folder)
    except FileNotFoundError:
        # Below a folder that is not there yet the system looks no further.
        long = [part for part in folder.parts if len(os.fsencode(part)) > _LONGEST_NAME]
        if not long:
            return False
        reason = f"'{long[0][:20]}...' is longer than {_LONGEST_NAME} bytes"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    else:
        return True
    raise InputError(
        f"the output folder cannot be made: {reason}", where=str(folder), expected="a path for a new folder"
    )


def _check_kinds(folder: Path) -> None:
    """Refuses a run folder with a file in a folder's place, or the reverse."""
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "results.json"):
        if (folder / name).is_dir():
            raise InputError("a folder where a file belongs", where=str(folder / name), expected="a file")
    if (folder / "checkpoints").is_file():
        where = str(folder / "checkpoints")
        raise InputError("a file where a folder belongs", where=where, expected="the folder of checkpoints")


def open_folder(config: TrainConfig, facts: dict[str, Any]) -> Path:
    """Makes the folder, with the resolved configuration and what the run depends on besides.

    Args:
        config: the run's configuration.
        facts: fingerprints and the like, for environment.json.
    """
    folder = Path(config.output)
    if jax.process_index() == 0:
        with new_file(folder / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
        write_json(folder / "environment.json", environment() | {"seed": config.seed} | facts)
    return folder


def _damaged(path: Path) -> InputError:
    return InputError(
        "a file of the run folder is damaged: not YAML, or not a mapping",
        where=str(path),
        expected="the file that the run wrote; nothing was changed",
    )


def is_whole(folder: Path) -> bool:
    """Whether a folder with an adapter or a model has its config and all its weights, each file as long as
    its header says."""
    config, tensors_of = _SAVED[folder.name]
    try:
        return (folder / config).is_file() and bool(tensors_of(folder))
    except InputError:
        return False


_SAVED = {
    "adapter": ("adapter_config.json", lambda folder: list_tensors(folder / "adapter_model.safetensors")),
    "model": ("config.json", list_checkpoint),
}


def set_aside(folder: Path) -> Path:
    """Renames a folder to a name that is free, and returns it: what is in there is not lost."""
    names = (folder.with_name(f"{folder.name}-incomplete-{i}") for i in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    folder.rename(aside)
    return aside


def environment() -> dict[str, Any]:
    """Versions, devices and revision that a run's bits depend on."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "devices": {"count": len(devices), "kind": devices[0].device_kind, "processes": jax.process_count()},
        "git_revision": _git_revision(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Revision of the source tree that this package is imported from; None for an installed package."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _damaged(path) from error
    if not isinstance(value, dict):
        raise _damaged(path)
    return value


def _differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new), key=str)
        found = [_differences(old.get(k), new.get(k), f"{name}.{k}" if name else str(k)) for k in keys]
        return [difference for differences in found for difference in differences]
    return [] if old == new else [(name, old, new)]
