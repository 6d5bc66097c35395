"""The run folder of a run that is started again: what is compared, what is kept, what is written anew."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from safemoe_jax.checkpoints.reference import read_reference, write_reference
from safemoe_jax.data.sources import SourceConfig
from safemoe_jax.errors import InputError
from safemoe_jax.model import load_pretrained
from safemoe_jax.training.config import DefenceConfig, TrainConfig
from safemoe_jax.training.metrics import jsonl_sink
from safemoe_jax.workflows.train import finetune
from tests.training.tiny import World


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def training(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())["training"]


def refuses(config: TrainConfig, message: str) -> None:
    """The run is refused with this message, and its folder is as it was."""
    before = contents(Path(config.output))
    with pytest.raises(InputError, match=message):
        finetune(config)
    assert contents(Path(config.output)) == before


def changed_copy(world: World, folder: Path) -> None:
    """The world's model with another final norm, over the one in the folder."""
    model = load_pretrained(world.model)
    model.params["final_norm.scale"] = model.params["final_norm.scale"] * 1.5
    model.save_pretrained(folder.with_name("new"))
    (folder.with_name("new") / "model.safetensors").replace(folder / "model.safetensors")


@pytest.mark.parametrize("checkpoint_every", [0, 1])
def test_a_run_on_changed_data_is_refused_and_left_alone(world, tmp_path, checkpoint_every):
    data = tmp_path / "data.jsonl"
    data.write_text(world.data.read_text())
    sources = [SourceConfig(str(data))]
    every = {"steps": 2, "checkpoint_every": checkpoint_every}
    config = world.train_config(str(tmp_path / "run"), data=sources, **every)
    finetune(config)
    data.write_text("\n".join(reversed(world.data.read_text().splitlines())))
    refuses(config, "the training data are not those that this run began with")


@pytest.mark.parametrize("lora", [True, False])
def test_a_run_on_changed_weights_is_refused_also_when_it_is_finished(world, tmp_path, lora):
    load_pretrained(world.model).save_pretrained(tmp_path / "model")
    changes = {} if lora else {"lora": None}
    config = world.train_config(
        str(tmp_path / "run"), model=str(tmp_path / "model"), steps=2, checkpoint_every=1, **changes
    )
    finetune(config)
    finetune(config)
    changed_copy(world, tmp_path / "model")
    refuses(config, "the model's weights are not those that this run began with")


@pytest.mark.parametrize("part", ["router_logits", "log_probs"])
def test_a_run_with_a_changed_reference_is_refused_also_when_it_is_finished(world, tmp_path, part):
    file = tmp_path / "reference.safetensors"
    reference = read_reference(world.reference)
    write_reference(file, reference)
    config = world.train_config(
        str(tmp_path / "run"),
        defence=DefenceConfig("safemoe", str(file), t_reg=1),
        steps=2,
        checkpoint_every=1,
    )
    finetune(config)
    other = {
        "router_logits": reference.router_logits + np.float32(0.5),
        "log_probs": dataclasses.replace(reference.log_probs, step_S=reference.log_probs.step_S * 2),
    }
    write_reference(file, dataclasses.replace(reference, **{part: other[part]}))
    refuses(config, "the reference files are not those that this run began with")


def test_a_folder_that_records_no_fingerprints_is_continued(world, tmp_path):
    """It is of an earlier version."""
    config = world.train_config(str(tmp_path / "run"), steps=2, checkpoint_every=1)
    finetune(config)
    file = tmp_path / "run" / "environment.json"
    written = json.loads(file.read_text())
    del written["model"], written["references"]
    file.write_text(json.dumps(written))
    assert finetune(config).summary["resumed_at"] == 2


def test_a_finished_run_keeps_its_figures(world, tmp_path):
    config = world.train_config(str(tmp_path / "run"), steps=3, checkpoint_every=1)
    first = finetune(config)
    before = (tmp_path / "run" / "results.json").read_bytes()
    again = finetune(config)
    assert (tmp_path / "run" / "results.json").read_bytes() == before
    assert again.summary == {**first.summary, "resumed_at": 3} and again.summary["tokens"] > 0


class Stop(Exception):
    """What interrupts a run."""


def test_an_interrupted_run_reports_losses_tokens_and_seconds_of_all_its_parts(world, tmp_path):
    changes = {"steps": 6, "defence": world.defence("safemoe", t_reg=2), "checkpoint_every": 1}
    whole = finetune(world.train_config(str(tmp_path / "whole"), **changes)).summary
    config = world.train_config(str(tmp_path / "parts"), **changes)

    def stop(step: int, model) -> None:
        if step == 4:
            raise Stop

    with pytest.raises(Stop):
        finetune(config, on_step=[stop])
    parts = finetune(config).summary
    assert parts == training(tmp_path / "parts") and parts["resumed_at"] == 3
    for name in ("first_loss", "final_loss", "tokens", "task_steps", "routing_steps"):
        assert parts[name] == whole[name], name
    rows = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "task"]
    assert (losses[0], losses[-1]) == (parts["first_loss"], parts["final_loss"])

    assert parts["tokens_per_second"] == pytest.approx(parts["tokens"] / parts["seconds"])


@pytest.mark.parametrize("damage", ["config", "weights", "half of the weights"])
@pytest.mark.parametrize("lora", [True, False])
def test_an_adapter_or_model_that_is_not_whole_is_written_anew_and_nothing_is_lost(
    world, tmp_path, damage, lora
):
    changes = {} if lora else {"lora": None}
    config = world.train_config(str(tmp_path / "run"), steps=1, checkpoint_every=1, **changes)
    saved = finetune(config).run_dir / ("adapter" if lora else "model")
    before = load_file(next(saved.glob("*.safetensors")))
    settings = saved / ("adapter_config.json" if lora else "config.json")
    weights = next(saved.glob("*.safetensors"))
    (saved / "notes.txt").write_text("precious")
    if damage == "half of the weights":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    else:
        (settings if damage == "config" else weights).unlink()
    left = {path.name: path.read_bytes() for path in saved.iterdir()}
    finetune(config)
    after = load_file(weights)
    assert settings.exists() and before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    aside = saved.with_name(f"{saved.name}-incomplete-1")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == left


def test_a_whole_adapter_is_left_alone(world, tmp_path):
    config = world.train_config(str(tmp_path / "run"), steps=1)
    weights = finetune(config).run_dir / "adapter" / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    before = weights.read_bytes()
    finetune(config)
    assert weights.read_bytes() == before


def fresh(path: Path) -> Path:
    """The path, with nothing there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return path


@pytest.fixture(scope="module")
def finished(world) -> TrainConfig:
    """A run of three steps with two checkpoints."""
    config = world.train_config("three", steps=3, checkpoint_every=1)
    finetune(config)
    return config


@pytest.fixture
def copied(finished, tmp_path) -> TrainConfig:
    """The same, in a folder that may be damaged."""
    shutil.copytree(finished.output, tmp_path / "run")
    return dataclasses.replace(finished, output=str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", b""),
        ("config.yaml", b"- a\n- b\n"),
        ("config.yaml", b"model: \xff\xfe\n"),
        ("environment.json", b'{"seed": 4'),
        ("results.json", b'{"training": {"task_'),
        ("results.json", b"[]"),
    ],
)
def test_a_damaged_file_is_refused_before_anything_is_written(copied, file, content):
    (Path(copied.output) / file).write_bytes(content)
    refuses(copied, f"(damaged: not YAML|{file} cannot be read|{file} is no object).*\n.*{file}")


def test_a_row_of_metrics_that_is_none_is_named(copied):
    file = Path(copied.output) / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for wrong in ("gar bage\n", "[1]\n", '{"loss": 1.0}\n', "\n"):
        file.write_text("".join([lines[0], wrong, *lines[2:]]))
        before = file.read_bytes()
        with pytest.raises(InputError, match="not a row of metrics\n.*metrics.jsonl, line 2"):
            finetune(copied)
        assert file.read_bytes() == before


def cut_data(step: Path) -> None:
    largest = max((p for p in step.glob("state/**/d/*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        cut_data,
        lambda step: shutil.rmtree(step / "state"),
        lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
        lambda step: (step / "_CHECKPOINT_METADATA").write_text("{}"),
    ],
    ids=["cut", "no state", "no metadata", "empty metadata"],
)
def test_a_damaged_checkpoint_is_named_and_without_it_the_one_before_is_used(copied, damage):
    step = Path(copied.output) / "checkpoints" / "3"
    damage(step)
    with pytest.raises(InputError, match="the checkpoint is damaged") as caught:
        finetune(copied)
    assert caught.value.where == str(step) and step.exists()
    shutil.rmtree(step)
    assert finetune(copied).summary["resumed_at"] == 2


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "results.json"])
def test_a_file_in_a_folders_place_is_refused_and_the_reverse(copied, name):
    path = fresh(Path(copied.output) / name)
    path.write_text("notes") if name == "checkpoints" else path.mkdir()
    refuses(copied, "where a (file|folder) belongs")


@pytest.mark.parametrize("above", ["", "new/"])
def test_a_name_that_is_too_long_is_refused(world, tmp_path, above):
    with pytest.raises(InputError, match="the output folder cannot be made"):
        finetune(world.train_config(f"{tmp_path}/{above}{'x' * 256}/run"))
    assert not list(tmp_path.iterdir())


def test_an_output_below_a_file_is_refused(world):
    with pytest.raises(InputError, match="the output folder cannot be made"):
        finetune(world.train_config(str(world.data / "run")))


def test_an_error_in_writing_rows_names_the_file(tmp_path, monkeypatch):
    """The system's own error does not."""

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    sink = jsonl_sink(tmp_path / "metrics.jsonl", 0)
    sink.write({"step": 1})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device") as caught:
        sink.flush()
    assert caught.value.where == str(tmp_path / "metrics.jsonl")
    sink.close()
