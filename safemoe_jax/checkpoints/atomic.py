"""Writing files and folders so that a reader sees the old one or the whole new one, never a half."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from safemoe_jax.errors import InputError


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends without an exception.

    Args:
        folder: the folder to make; it must not exist, or be empty. Nothing that was there is deleted.

    Yields:
        The folder to write into. After an exception it is removed.

    Raises:
        InputError: the folder is there and not empty, or the disk refuses (full, read-only, no permission).
    """
    folder = Path(folder)
    _require_free(folder)
    with _disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(folder)
        temporary.mkdir()
        try:
            yield temporary
            _require_free(folder)
            # Takes the place of an empty folder, and fails if somebody filled it meanwhile.
            os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` that replaces it when the block ends without an exception.

    Yields:
        The path to write to. After an exception it is removed and what was at `path` is still there.

    Raises:
        InputError: the disk refuses (full, read-only, no permission).
    """
    path = Path(path)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A name beside `path` for this process, after removing what killed processes left there for it.

    The name tells host and process: only a process of this host can be known to be gone.
    """
    stem = f".{path.name}.writing-{_host()}-"
    for left in path.parent.glob(f"{glob.escape(stem)}*"):
        number = left.name.removeprefix(stem)
        if number.isdecimal() and (int(number) == os.getpid() or not _is_running(int(number))):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    return path.parent / f"{stem}{os.getpid()}"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _require_free(folder: Path) -> None:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(
            "the output is already there",
            where=str(folder),
            expected="a new or empty folder; nothing was changed",
        )


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(_existing(path)).free / 1e9
        raise InputError(
            f"cannot write: {error.strerror or error}",
            where=str(error.filename or path),
            expected=f"a place with permission and room to write ({free:.1f} GB free there now)",
        ) from error


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())
