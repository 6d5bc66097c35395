"""A run that spans two real processes on this machine."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import load_file

from safemoe_jax.parallel.mesh import MeshConfig
from safemoe_jax.training.config import TrainConfig, to_dict
from safemoe_jax.workflows.train import finetune
from tests.training.tiny import make_world


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _train_in_two_processes(config: TrainConfig, folder: Path, repository: Path) -> list[str]:
    """Runs the command line twice, two fake devices each; returns what the processes said on stderr."""
    file, port = folder / "two.yaml", _free_port()
    file.write_text(yaml.safe_dump(to_dict(config)))
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "SAFEMOE_COORDINATOR": f"127.0.0.1:{port}",
        "SAFEMOE_PROCESSES": "2",
    }
    command = [sys.executable, "-m", "safemoe_jax.cli", "train", "--config", str(file)]
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"SAFEMOE_PROCESS_ID": str(number)},
            cwd=repository,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    messages = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n---\n".join(messages)
    return messages


def test_two_processes_train_what_one_does(tmp_path, repository):
    world = make_world(tmp_path)
    shared = {"epochs": 1.0, "defence": world.defence("safemoe_anchored"), "checkpoint_every": None}
    alone = finetune(world.train_config("one", **shared))
    config = world.train_config("two", **shared, mesh=MeshConfig(data=2, fsdp=2))
    _train_in_two_processes(dataclasses.replace(config, progress=False), tmp_path, repository)
    expected = load_file(alone.run_dir / "adapter" / "adapter_model.safetensors")
    trained = load_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors")
    assert trained.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(trained[name], value, atol=1e-4, err_msg=name)
    rows = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == alone.summary["task_steps"]
