"""Every kind of attention and of expert computes on eight devices what it computes on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel.families_on_meshes import MESHES, NETWORKS, ROUNDED, cases


@pytest.fixture(scope="module")
def report(repository: Path) -> dict:
    """What the child process found."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.families_on_meshes"],
        cwd=repository,
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("network", "mesh"), cases(NETWORKS))
def test_logits_loss_and_gradients_equal_those_of_one_device(report, network, mesh):
    differences = report["differences"][f"{network}; {mesh}"]
    assert {"logits", "router_logits", "loss", "load_balancing", "embed.embedding"} <= differences.keys()
    assert {name: found for name, found in differences.items() if not found < 1e-5} == {}
    sizes = MESHES[mesh]
    assert report["shards"][f"{network}; {mesh}"] == sizes.fsdp * sizes.expert * sizes.tensor


@pytest.mark.parametrize(("network", "mesh"), cases(ROUNDED))
def test_a_network_read_into_few_bits_is_that_of_one_device(report, network, mesh):
    """Its frozen weights bit for bit; logits, losses and the gradient of every adapter closely."""
    case, sizes, (_, lora) = f"{network}; {mesh}", MESHES[mesh], ROUNDED[network]
    assert report["unequal"][case] == []
    differences = report["differences"][case]
    assert {"logits", "loss", "load_balancing"} <= differences.keys()
    assert sum(name.endswith("lora_a") for name in differences) == len(lora.targets)
    assert {name: found for name, found in differences.items() if not found < 1e-5} == {}
    assert report["shards"][case] == sizes.fsdp * sizes.expert * sizes.tensor
