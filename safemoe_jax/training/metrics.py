"""Where a run's numbers go: metrics.jsonl, the progress bar, TensorBoard, Weights & Biases.

A row is a dictionary of one optimizer step: step, task_step, kind (task or routing), loss, learning_rate,
grad_norm, tokens_per_second, and what the defence reports (routing_penalty, ...).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safemoe_jax.errors import InputError
from safemoe_jax.training.config import TrainConfig

Row = dict[str, Any]


@dataclass(frozen=True)
class Sink:
    """Something that takes rows: `write` each, `flush` before a checkpoint, `close` at the end."""

    write: Callable[[Row], None]
    flush: Callable[[], None] = lambda: None
    close: Callable[[], None] = lambda: None


def jsonl_sink(path: Path, keep_until_step: int) -> Sink:
    """Appends rows to a JSON Lines file, after dropping rows of steps that will be done again.

    Args:
        path: the file; made when it is not there.
        keep_until_step: optimizer step that the run continues from.
    """
    truncate_rows(path, keep_until_step)
    file = path.open("a", encoding="utf-8")

    def write(row: Row) -> None:
        with _disk_errors(path):
            file.write(json.dumps(row) + "\n")

    def flush() -> None:
        with _disk_errors(path):
            file.flush()
            # A checkpoint must not be newer than the rows that lead up to it.
            os.fsync(file.fileno())

    def close() -> None:
        with _disk_errors(path):
            file.close()

    return Sink(write, flush, close)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """The system's errors in writing do not name the file."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write: {error.strerror or error}",
            where=str(path),
            expected="room on the disk; earlier checkpoints are untouched, the same command continues",
        ) from error


def truncate_rows(path: Path, last_step: int) -> None:
    """Cuts a metrics file behind the last row whose step is at most `last_step`; a half-written line goes
    too.

    Raises:
        InputError: a line before that is no row; the file is left as it is.
    """
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") or _step_of(line, f"{path}, line {number}") > last_step:
                break
            end += len(line)
    os.truncate(path, end)


def _step_of(line: bytes, where: str) -> int:
    try:
        step = json.loads(line)["step"]
        if isinstance(step, int):
            return step
    except (ValueError, LookupError, TypeError):
        pass
    raise InputError(
        "not a row of metrics", where=where, expected="a JSON object with a step; nothing was changed"
    )


def read_rows(path: Path) -> list[Row]:
    """All rows of a metrics file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def progress_sink(total_steps: int, done_steps: int, description: str) -> Sink:
    """A bar over task steps with loss, penalty, tokens/s and the time left."""
    from tqdm import tqdm

    bar = tqdm(
        total=total_steps,
        initial=done_steps,
        desc=description,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5,
    )
    shown: dict[str, float] = {}

    def write(row: Row) -> None:
        if row["kind"] == "task":
            shown["loss"] = row["loss"]
            shown["tokens/s"] = row["tokens_per_second"]
        if "routing_penalty" in row:
            shown["penalty"] = row["routing_penalty"]
        bar.set_postfix_str(", ".join(f"{name} {value:.4g}" for name, value in shown.items()), refresh=False)
        bar.update(row["kind"] == "task")

    return Sink(write, close=bar.close)


def check_packages(config: TrainConfig) -> None:
    """Refuses a sink whose package is not installed.

    Raises:
        InputError: names the field and the extra.
    """
    for package in ("tensorboard", "wandb"):
        if getattr(config, package) and importlib.util.find_spec(package) is None:
            raise _missing(package)


def tensorboard_sink(folder: Path) -> Sink:
    """TensorBoard event files; needs the extra `tensorboard`."""
    try:
        from tensorboard.summary import Writer
    except ImportError as error:
        raise _missing("tensorboard") from error
    writer = Writer(str(folder))

    def write(row: Row) -> None:
        for name, value in row.items():
            if isinstance(value, float):
                writer.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    return Sink(write, writer.flush, writer.close)


def wandb_sink(run_folder: Path, resolved: dict[str, Any]) -> Sink:
    """A Weights & Biases run; needs the extra `wandb`. Project, entity and mode come from its environment
    variables."""
    try:
        import wandb
    except ImportError as error:
        raise _missing("wandb") from error
    run = wandb.init(dir=str(run_folder), name=run_folder.name, config=resolved)

    def write(row: Row) -> None:
        named = {f"{row['kind']}/{name}": value for name, value in row.items() if isinstance(value, float)}
        run.log(named, step=row["step"])

    return Sink(write, close=run.finish)


def _missing(package: str) -> InputError:
    return InputError(
        f"{package} is not installed",
        where=f"the configuration, field {package}",
        expected=f"pip install 'safemoe_jax[{package}]', or {package}: false",
    )
