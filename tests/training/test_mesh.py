"""Eight fake devices compute what one device computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np


def test_losses_on_eight_devices_equal_those_on_one(tmp_path: Path, repository: Path):
    """data 2, fsdp 2, tensor 2: task steps, routing passes and the anchored term."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "tests.training.children", "mesh", str(tmp_path)]
    done = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    losses = json.loads((tmp_path / "losses.json").read_text())
    for defence in ("safemoe", "safemoe_anchored"):
        assert losses[f"{defence}-eight-shards"] > losses[f"{defence}-one-shards"] == 1
        one, eight = losses[f"{defence}-one"], losses[f"{defence}-eight"]
        assert len(one) == len(eight) >= 3
        for ours, theirs in zip(eight, one, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
