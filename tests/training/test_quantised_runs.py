"""Runs whose base is held in 8 bits: by the command, from memory, interrupted, exported, refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from safemoe_jax.checkpoints.reference import fingerprint, fingerprint_folder, read_reference
from safemoe_jax.cli import main
from safemoe_jax.errors import InputError
from safemoe_jax.model import load_pretrained
from safemoe_jax.training.config import TrainConfig, to_dict
from safemoe_jax.workflows.train import finetune
from tests.training.tiny import World

TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)


class Interrupted(Exception):
    """Raised in the middle of a run."""


def run_config(world: World, output: Path, **changes) -> TrainConfig:
    """Some ten task steps, with routing passes that hold on to a reference made in floats."""
    defence = world.defence("safemoe", t_reg=3)
    return world.train_config(str(output), defence=defence, **{"quantisation": "int8"} | changes)


def train(config: TrainConfig, folder: Path, *flags: str) -> int:
    """`safemoe train` with this configuration as a file; its exit status."""
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)))
    return main(["train", "--config", str(file), *flags, "--xla_cache", "off"])


def final_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory) -> Path:
    """The folder of a run by the command line, which was asked for 8 bits by a flag."""
    folder = tmp_path_factory.mktemp("whole")
    config = run_config(world, folder / "run", quantisation=None)
    assert train(config, folder, "--quantisation", "int8") == 0
    return folder / "run"


def test_the_adapter_is_one_that_peft_loads(world, whole, tmp_path):
    floats = finetune(run_config(world, tmp_path / "floats", quantisation=None)).run_dir
    theirs, ours = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (floats, whole))
    shapes = [{name: (v.shape, v.dtype) for name, v in found.items()} for found in (theirs, ours)]
    assert shapes[0] == shapes[1]
    assert any(np.abs(ours[name] - theirs[name]).max() > 0 for name in ours)
    configs = [json.loads((run / "adapter" / "adapter_config.json").read_text()) for run in (floats, whole)]
    assert configs[0] == configs[1]
    assert yaml.safe_load((whole / "config.yaml").read_text())["quantisation"] == "int8"


@pytest.mark.parametrize("held", ["int8", None])
def test_a_model_in_memory_is_as_good_as_its_folder(world, whole, tmp_path, capsys, held):
    """Held in 8 bits already, whatever the configuration says, or in floats, and then rounded."""
    model = load_pretrained(world.model, quantisation=held)
    config = run_config(world, tmp_path / "run", quantisation=None if held else "int8", progress=True)
    result = finetune(config, model=model)
    assert final_bytes(result.run_dir) == final_bytes(whole)
    assert yaml.safe_load((result.run_dir / "config.yaml").read_text())["quantisation"] == "int8"
    assert result.model.config.quantisation == "int8" and model.config.quantisation == held
    assert "base weights: int8, 0." in capsys.readouterr().err
    loaded = load_pretrained(world.model, adapter=result.run_dir / "adapter", quantisation="int8")
    np.testing.assert_array_equal(loaded(TOKENS).logits, result.model(TOKENS).logits)


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_interrupted_run_ends_with_the_same_bits(world, whole, tmp_path, in_memory):
    def stop(step: int, _: object) -> None:
        if step == 5:
            raise Interrupted

    model = load_pretrained(world.model, quantisation="int8") if in_memory else None
    config = run_config(world, tmp_path / "run", checkpoint_every=2)
    with pytest.raises(Interrupted):
        finetune(config, model=model, on_step=[stop])
    assert not (tmp_path / "run" / "adapter").exists()
    result = finetune(config, model=model)
    assert result.summary["resumed_at"] == 4
    assert final_bytes(result.run_dir) == final_bytes(whole)


def test_the_merged_export_has_the_checkpoint_s_own_weights(world, whole, tmp_path):
    arguments = ["--model", str(world.model), "--adapter", str(whole / "adapter"), "--xla_cache", "off"]
    for form in ("merged", "adapter"):
        assert main(["export", *arguments, "--format", form, "--output", str(tmp_path / form)]) == 0
    floats, merged = load_pretrained(world.model), load_pretrained(tmp_path / "merged")
    adapted = load_pretrained(world.model, adapter=whole / "adapter")
    np.testing.assert_allclose(merged(TOKENS).logits, adapted(TOKENS).logits, atol=1e-4)
    for name, value in floats.params.items():
        if "q_proj" not in name and "v_proj" not in name:
            np.testing.assert_array_equal(merged.params[name], value, err_msg=name)
    folders = (tmp_path / "adapter", whole / "adapter")
    copied, trained = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert copied.keys() == trained.keys()
    for name, value in trained.items():
        np.testing.assert_array_equal(copied[name], value, err_msg=name)


def test_a_reference_of_the_floats_or_of_the_rounded_model_is_right_and_of_another_is_not(world, tmp_path):
    """The run of `whole` has one of the floats."""
    rounded = load_pretrained(world.model, quantisation="int8")
    floats = read_reference(world.reference).model_fingerprint
    assert fingerprint_folder(world.model, rounded.config) == floats
    assert fingerprint(rounded.config, rounded.params) != floats
    file, prompts = tmp_path / "rounded.safetensors", tmp_path / "prompts.jsonl"
    prompts.write_text('{"instruction": "Say alder"}\n')
    arguments = ["--model", str(world.model), "--output", str(file), "--prompts.path", str(prompts)]
    assert main(["reference", *arguments, "--quantisation", "int8", "--xla_cache", "off"]) == 0
    config = run_config(world, tmp_path / "run", steps=1)
    config = dataclasses.replace(config, defence=dataclasses.replace(config.defence, reference=str(file)))
    finetune(config)
    with pytest.raises(InputError, match=r"another model \(weights\)"):
        finetune(dataclasses.replace(config, output=str(tmp_path / "refused"), quantisation=None))
    changed = load_pretrained(world.model)
    changed.params["final_norm.scale"] = changed.params["final_norm.scale"] * 1.5
    changed.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"another model \(weights\)"):
        finetune(run_config(world, tmp_path / "refused", model=str(tmp_path / "other")))
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lora", "null"), "quantisation is int8"),
        (("--initialise", "random"), "quantisation is int8"),
        (("--quantisation", "int3"), "int8, int4, int4-64"),
        (("--quantisation", "int4"), "a block of 32 for 16 inputs"),
    ],
)
def test_wrong_input_ends_with_status_2_and_writes_nothing(world, tmp_path, capsys, flags, message):
    assert train(run_config(world, tmp_path / "run"), tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and "where: " in error and "expected: " in error
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_wrong_input_in_python_is_refused_too(world, tmp_path):
    model = load_pretrained(world.model, quantisation="int8")
    for changes, given, message in (
        ({"quantisation": "int3"}, None, "quantisation is int3"),
        ({"quantisation": "int4"}, model, "the given model is held in int8"),
        ({"quantisation": None, "lora": None}, model, "quantisation is int8"),
    ):
        with pytest.raises(InputError, match=message):
            finetune(run_config(world, tmp_path / "run", **changes), model=given)
    assert not (tmp_path / "run").exists()
