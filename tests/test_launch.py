"""What starts a run elsewhere: each script, with the cluster's programs replaced by one that records."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import jax
import pytest
import yaml

from safemoe_jax.configuration import parse
from safemoe_jax.parallel.multihost import start_processes
from safemoe_jax.training.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = sorted((ROOT / "experiments").glob("olmoe_*.yaml"))


def call(script: str, recorded: str, tmp_path: Path, *arguments: str, **environment: str) -> list[str]:
    """Runs a launch script and returns the arguments that the program `recorded` was called with."""
    program = tmp_path / recorded
    program.write_text(
        '#!/bin/sh\nfor a in "$@"; do echo "$a"; done > "$RECORD"\necho "$SAFEMOE_MULTIHOST" >> "$RECORD"\n'
    )
    program.chmod(0o755)
    record = tmp_path / "record"
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(record)}
    subprocess.run(
        [str(ROOT / "launch" / script), *arguments], env=os.environ | paths | environment, check=True
    )
    return record.read_text().split("\n")[:-1]


def test_single_host_passes_configuration_and_flags_on(tmp_path: Path) -> None:
    called = call("single_host.sh", "safemoe", tmp_path, "a b.yaml", "--mesh.fsdp", "8")
    assert called == ["train", "--config", "a b.yaml", "--mesh.fsdp", "8", ""]


def test_slurm_starts_one_process_a_task_that_finds_the_others(tmp_path: Path) -> None:
    called = call("slurm.sbatch", "srun", tmp_path, "a b.yaml", "--seed", "1")
    assert called[1:] == ["safemoe", "train", "--config", "a b.yaml", "--seed", "1", "auto"]


def test_a_tpu_pod_gets_the_same_command_on_every_host(tmp_path: Path) -> None:
    called = call("tpu_pod.sh", "gcloud", tmp_path, "a b.yaml", "--seed", "1", TPU="slice", ZONE="zone")
    assert "--worker=all" in called and "slice" in called
    command = called[called.index("--command") + 1]
    assert command.strip() == "SAFEMOE_MULTIHOST=auto safemoe train --config a\\ b.yaml --seed 1"


@pytest.mark.parametrize("script", ["single_host.sh", "slurm.sbatch", "tpu_pod.sh"])
def test_a_script_without_a_configuration_says_how_to_use_it(script: str) -> None:
    done = subprocess.run([str(ROOT / "launch" / script)], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "usage" in done.stderr


def test_kubernetes_numbers_its_processes_consistently(monkeypatch) -> None:
    service, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    assert container["command"][:3] == ["safemoe", "train", "--config"]
    environment = {entry["name"]: entry.get("value", "1") for entry in container["env"]}
    assert spec["completions"] == spec["parallelism"] == int(environment["SAFEMOE_PROCESSES"])
    host = environment["SAFEMOE_COORDINATOR"].split(":")[0]
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()

    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    start_processes()
    address = environment["SAFEMOE_COORDINATOR"]
    assert calls == [{"coordinator_address": address, "num_processes": 2, "process_id": 1}]


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_the_published_rows_are_valid_and_differ_from_the_defaults_in_data_and_defence_only(
    file: Path,
) -> None:
    config, _ = parse(TrainConfig, ["--config", str(file)], program="safemoe train")
    published = TrainConfig(config.model, config.output, config.data, defence=config.defence)
    olmoe_default = replace(published.lora, targets=("q_proj", "v_proj"))  # written out in the file
    assert config == replace(published, lora=olmoe_default)
    assert [source.take for source in config.data] == [5000, 500]
    assert config.output == f"runs/{file.stem}"


def test_there_is_a_file_for_every_published_olmoe_row() -> None:
    assert {file.stem for file in EXPERIMENTS} >= {
        f"olmoe_{task}_{defence}" for task in ("samsum", "sql") for defence in ("undefended", "safemoe")
    }
