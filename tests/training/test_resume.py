"""A run that is killed and started again ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from safemoe_jax.workflows.train import finetune
from tests.training.children import long_run
from tests.training.tiny import make_world

TIMED = ("tokens_per_second",)


def rows(path: Path) -> list[dict]:
    """Rows of a metrics file without what a clock decides."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMED} for row in found]


def run_until(folder: Path, repository: Path, n_rows: int) -> int:
    """Starts the run and kills it, without warning, when its metrics file has so many rows; returns its
    status."""
    command = [sys.executable, "-m", "tests.training.children", "killed", str(folder)]
    child = subprocess.Popen(command, cwd=repository, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    metrics = folder / "killed" / "metrics.jsonl"
    while child.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= n_rows:
            os.kill(child.pid, signal.SIGKILL)
        time.sleep(0.005)
    assert child.returncode in (0, -signal.SIGKILL), child.stderr.read().decode()[-4000:]
    return child.returncode


def test_killed_runs_end_with_the_bits_of_an_uninterrupted_one(tmp_path: Path, repository: Path):
    """Three kills, while checkpoints are being written; the fourth start finishes."""
    world = make_world(tmp_path)
    whole = finetune(long_run(world, "whole"))
    statuses = [run_until(tmp_path, repository, n_rows) for n_rows in (5, 14, 27, 10**6)]
    assert statuses == [-signal.SIGKILL] * 3 + [0]
    killed = tmp_path / "killed"
    assert rows(killed / "metrics.jsonl") == rows(whole.run_dir / "metrics.jsonl")
    assert len(rows(killed / "metrics.jsonl")) == 22 + 7 * 3
    adapters = [run / "adapter" / "adapter_model.safetensors" for run in (killed, whole.run_dir)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    resumed = json.loads((killed / "results.json").read_text())["training"]
    assert 0 < resumed["resumed_at"] < 22
    finished = finetune(long_run(world, "killed", checkpoint_every=1))
    assert finished.summary["resumed_at"] == 22
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
