"""Checkpoints of a run in progress: the training state and where the run stands. The only user of Orbax."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from safemoe_jax.errors import InputError

State = TypeVar("State")


class TrainCheckpoints:
    """The checkpoints of one run, in one folder; the newest two are kept.

    A checkpoint appears under its final name only when it is complete, so a run that is killed while it
    writes one resumes from the one before. Use as a context manager: leaving it waits for the last write.

    Args:
        folder: made when it is not there. What an earlier process left half-written is removed.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._orbax = ocp.training.Checkpointer(
            self._folder,
            preservation_policy=ocp.training.preservation_policies.LatestN(2),
            cleanup_tmp_directories=True,
        )
        self._writing: Any = None
        # Orbax logs every exception of its threads with a traceback, and then raises it here anyway.
        self._log = logging.getLogger("absl")
        self._log.addFilter(_without_traceback)

    def __enter__(self) -> TrainCheckpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        finally:
            with self._disk_errors():
                self._orbax.close()
            self._log.removeFilter(_without_traceback)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        newest = self._orbax.latest
        return None if newest is None else newest.step

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Starts writing a checkpoint; the state's arrays may be donated as soon as this returns.

        Args:
            step: its number; above every earlier one.
            state: pytree of arrays.
            progress: JSON values: the data iterator's state and whatever else the run needs to continue.

        Raises:
            InputError: there is not enough room on the disk; earlier checkpoints are untouched.
        """
        self.wait()
        self._require_room(state)
        with self._disk_errors():
            self._writing = self._orbax.save_checkpointables_async(
                step, {"state": state}, force=True, custom_metadata=progress
            )

    def wait(self) -> None:
        """Returns when the checkpoint being written is complete. Raises InputError when the disk is full."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            with self._disk_errors():
                writing.result()

    def restore(self, abstract: State, needed: Sequence[str] = ()) -> tuple[State, dict[str, Any]]:
        """The newest checkpoint.

        Args:
            abstract: the state as `jax.ShapeDtypeStruct`s that carry shardings.
            needed: names that its progress must have.

        Returns:
            The state, placed as asked, and the progress given to `save`.

        Raises:
            InputError: the checkpoint is damaged; names its folder.
        """
        newest = self._orbax.latest
        try:
            restored = self._orbax.load_checkpointables(newest, {"state": abstract})
            progress = dict(self._orbax.metadata(newest).custom_metadata or {})
        except (LookupError, ValueError, TypeError, OSError) as error:
            raise self._damaged(newest.step, "its state cannot be read") from error
        lacking = [name for name in needed if name not in progress]
        if lacking:
            raise self._damaged(newest.step, f"its metadata lack {', '.join(lacking)}")
        return restored["state"], progress

    def _damaged(self, step: int, detail: str) -> InputError:
        place = self._folder / str(step)
        return InputError(
            f"the checkpoint is damaged: {detail}",
            where=str(place),
            expected=f"a whole checkpoint; without the folder {place} the run goes on from the checkpoint "
            "before it, or from the start where there is none. Nothing was deleted",
        )

    def _require_room(self, state: Any) -> None:
        needed = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self._folder).free
        if free < 1.1 * needed:
            sizes = f"a checkpoint takes {needed / 1e6:.3g} MB, {free / 1e6:.3g} MB are free"
            raise self._full(sizes)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turns a full disk into a message; Orbax's writers carry the system's words in several
        exceptions."""
        try:
            yield
        except (OSError, ValueError) as error:
            if "No space left on device" not in str(error):
                raise
            raise self._full("while a checkpoint was written") from error

    def _full(self, detail: str) -> InputError:
        return InputError(
            f"the disk is full: {detail}",
            where=str(self._folder),
            expected="room for two checkpoints; the earlier ones are untouched",
        )


def _without_traceback(record: logging.LogRecord) -> bool:
    return record.exc_info is None
