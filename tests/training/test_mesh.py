"""Eight fake devices compute what one device computes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """What `children` left where eight devices are seen."""
    folder = tmp_path_factory.mktemp("meshes")
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.children", "meshes", str(folder)],
        cwd=repository,
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_losses_on_eight_devices_equal_those_on_one(runs: Path):
    """data 2, fsdp 2, tensor 2: task steps, routing passes and the anchored term."""
    losses = json.loads((runs / "losses.json").read_text())
    for defence in ("safemoe", "safemoe_anchored"):
        assert losses[f"{defence}-eight-shards"] > losses[f"{defence}-one-shards"] == 1
        one, eight = losses[f"{defence}-one"], losses[f"{defence}-eight"]
        assert len(one) == len(eight) >= 3
        for ours, theirs in zip(eight, one, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_losses_on_quantised_weights_too(runs: Path):
    """fsdp 2, expert 2, tensor 2, by the command: task steps and routing passes on 8 and on 4 bits. A pass's
    loss is far below 1 and adds up what float32 leaves of logits: its error is absolute, as in floats."""
    found = {}
    for method in ("int8", "int4"):
        for name, devices in (("one", 1), ("eight", 8)):
            folder = runs / f"{method}-{name}"
            config = yaml.safe_load((folder / "config.yaml").read_text())
            assert config["quantisation"] == method and math.prod(config["mesh"].values()) == devices
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            found[method, name] = [row["loss"] for row in rows]
        assert len(found[method, "one"]) >= 4
        np.testing.assert_allclose(found[method, "eight"], found[method, "one"], rtol=1e-5, atol=1e-5)
    assert np.abs(np.subtract(found["int8", "one"], found["int4", "one"])).max() > 1e-3
