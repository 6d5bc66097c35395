"""Runs whose base is held in 8 or 4 bits: by the command, from memory, interrupted, exported, measured,
refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from safemoe_jax.checkpoints.reference import (
    fingerprint,
    fingerprint_folder,
    read_reference,
    write_reference,
)
from safemoe_jax.cli import main
from safemoe_jax.errors import InputError
from safemoe_jax.model import load_pretrained
from safemoe_jax.models.config import LoraConfig
from safemoe_jax.models.lora import add_adapters
from safemoe_jax.models.quantisation import dequantise_params
from safemoe_jax.models.quantised import Quantisation
from safemoe_jax.training.config import TrainConfig, to_dict
from safemoe_jax.workflows.train import finetune
from tests.training.tiny import HARMFUL_TEXTS, World, make_world

TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)


class Interrupted(Exception):
    """Raised in the middle of a run."""


def run_config(world: World, output: Path, **changes) -> TrainConfig:
    """Nine task steps, with routing passes that hold on to a reference made in floats."""
    fields = {
        "quantisation": "int8",
        "epochs": 1.0,
        "batch_size": 2,
        "defence": world.defence("safemoe", t_reg=3),
    }
    return world.train_config(str(output), **fields | changes)


def run(*arguments: object) -> int:
    """`safemoe` with these arguments; its exit status."""
    return main([*map(str, arguments), "--xla_cache", "off"])


def train(config: TrainConfig, folder: Path, *flags: str) -> int:
    """`safemoe train` with this configuration as a file; its exit status."""
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)))
    return run("train", "--config", file, *flags)


def final_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> World:
    """Inputs whose model has widths that blocks of 64 divide. Its experts get few rows each, for which there
    is one size of block to compile and not three."""
    return make_world(tmp_path_factory.mktemp("wide"), d_model=64, expert_dim=64, n_experts=32)


@pytest.fixture(scope="module")
def floats(wide: World, tmp_path_factory) -> Path:
    """The folder of a run without quantisation."""
    return finetune(run_config(wide, tmp_path_factory.mktemp("floats") / "run", quantisation=None)).run_dir


# Programs for each take long to compile. The third, int4, differs from int4-64 in the size of a block alone:
# `test_mesh.py` has a run of it by the command.
@pytest.fixture(scope="module", params=["int8", "int4-64"])
def method(request) -> Quantisation:
    """How the base is held."""
    return request.param


@pytest.fixture(scope="module")
def whole(wide: World, method: Quantisation, tmp_path_factory) -> Path:
    """The folder of a run by the command line, which was asked for few bits by a flag."""
    folder = tmp_path_factory.mktemp("whole")
    config = run_config(wide, folder / "run", quantisation=None)
    assert train(config, folder, "--quantisation", method) == 0
    return folder / "run"


def only(method: Quantisation) -> pytest.MarkDecorator:
    """For tests of which one method says as much as all."""
    return pytest.mark.parametrize("method", [method], indirect=True)


def test_the_adapter_is_one_that_peft_loads(floats, whole, method):
    theirs, ours = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (floats, whole))
    shapes = [{name: (v.shape, v.dtype) for name, v in found.items()} for found in (theirs, ours)]
    assert shapes[0] == shapes[1]
    assert any(np.abs(ours[name] - theirs[name]).max() > 0 for name in ours)
    configs = [json.loads((run / "adapter" / "adapter_config.json").read_text()) for run in (floats, whole)]
    assert configs[0] == configs[1]
    assert yaml.safe_load((whole / "config.yaml").read_text())["quantisation"] == method


def losses(run: Path) -> list[float]:
    """Of every step, routing passes included."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_loss_is_that_of_the_rounded_weights_in_floats(wide, floats, whole, method, tmp_path):
    model = load_pretrained(wide.model, quantisation=method).merged()
    rounded = fingerprint(model.config, model.params)
    reference = dataclasses.replace(read_reference(wide.reference), model_fingerprint=rounded)
    write_reference(tmp_path / "reference.safetensors", reference)
    same = dataclasses.replace(wide, reference=tmp_path / "reference.safetensors")
    in_floats = finetune(run_config(same, tmp_path / "run", quantisation=None), model=model).run_dir
    # A pass's loss may be far below 1: what float32 leaves of its logits' sums is an absolute error.
    np.testing.assert_allclose(losses(whole), losses(in_floats), rtol=1e-4, atol=1e-5)
    assert np.abs(np.subtract(losses(whole), losses(floats))).max() > 1e-3


@pytest.mark.parametrize("rounded", [True, False])
def test_a_model_in_memory_is_as_good_as_its_folder(wide, whole, method, tmp_path, capsys, rounded):
    """Held in few bits already, whatever the configuration says, or in floats, and then rounded."""
    held = method if rounded else None
    model = load_pretrained(wide.model, quantisation=held)
    config = run_config(wide, tmp_path / "run", quantisation=None if rounded else method, progress=True)
    result = finetune(config, model=model)
    assert final_bytes(result.run_dir) == final_bytes(whole)
    assert yaml.safe_load((result.run_dir / "config.yaml").read_text())["quantisation"] == method
    assert result.model.config.quantisation == method and model.config.quantisation == held
    assert f"base weights: {method}, 0." in capsys.readouterr().err
    loaded = load_pretrained(wide.model, adapter=result.run_dir / "adapter", quantisation=method)
    np.testing.assert_array_equal(loaded(TOKENS).logits, result.model(TOKENS).logits)


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_interrupted_run_ends_with_the_same_bits(wide, whole, method, tmp_path, in_memory):
    def stop(step: int, _: object) -> None:
        if step == 5:
            raise Interrupted

    model = load_pretrained(wide.model, quantisation=method) if in_memory else None
    config = run_config(wide, tmp_path / "run", quantisation=method, checkpoint_every=2)
    with pytest.raises(Interrupted):
        finetune(config, model=model, on_step=[stop])
    assert not (tmp_path / "run" / "adapter").exists()
    result = finetune(config, model=model)
    assert result.summary["resumed_at"] == 4
    assert final_bytes(result.run_dir) == final_bytes(whole)


@only("int4-64")
def test_the_merged_export_has_the_checkpoint_s_own_weights(wide, whole, method, tmp_path):
    arguments = ["--model", wide.model, "--adapter", whole / "adapter"]
    for form in ("merged", "adapter"):
        assert run("export", *arguments, "--format", form, "--output", tmp_path / form) == 0
    floats, merged = load_pretrained(wide.model), load_pretrained(tmp_path / "merged")
    adapted = load_pretrained(wide.model, adapter=whole / "adapter")
    np.testing.assert_allclose(merged(TOKENS).logits, adapted(TOKENS).logits, atol=1e-4)
    for name, value in floats.params.items():
        if "q_proj" not in name and "v_proj" not in name:
            np.testing.assert_array_equal(merged.params[name], value, err_msg=name)
    folders = (tmp_path / "adapter", whole / "adapter")
    copied, trained = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert copied.keys() == trained.keys()
    for name, value in trained.items():
        np.testing.assert_array_equal(copied[name], value, err_msg=name)


@only("int4-64")
def test_the_commands_measure_it_as_they_measure_the_same_weights_in_floats(wide, whole, method, tmp_path):
    """Rounded weights and their adapter, against folders of floats that hold what they stand for."""
    held = ["--model", wide.model, "--adapter", whole / "adapter", "--quantisation", method]
    for name, adapter in (("tuned", whole / "adapter"), ("aligned", None)):
        model = load_pretrained(wide.model, adapter=adapter, quantisation=method)
        model.save_pretrained(tmp_path / name)
    floats = ["--model", tmp_path / "tuned", "--aligned", tmp_path / "aligned"]
    file, rows = tmp_path / "harmful.json", wide.data.read_text().splitlines()[:4]
    file.write_text(json.dumps([{"Goal": json.loads(row)["instruction"]} for row in rows]))
    found = []
    for name, arguments in (("held", held), ("floats", floats)):
        folder, arguments = tmp_path / "of" / name, [*arguments, "--max_new_tokens", 6]
        assert run("evaluate", *arguments, "--harmful.path", file, "--output", folder) == 0
        assert run("generate", *arguments, "--prompts.path", file, "--output", folder / "answers.jsonl") == 0
        results = json.loads((folder / "results.json").read_text())
        answers = [json.loads(line)["answer"] for line in (folder / "answers.jsonl").open()]
        found.append((answers, results["hs"], results["drift_by_layer"]))
    assert found[0][:2] == found[1][:2] and any(found[0][0])
    np.testing.assert_allclose(found[0][2], found[1][2], rtol=1e-3)
    assert min(found[0][2]) > 1e-4


@only("int4-64")
def test_a_model_in_floats_is_merged_and_then_rounded_once(wide, whole, method, tmp_path):
    """No adapted weight lies further than half a step from the sum in float64; others are the folder's."""
    model = load_pretrained(wide.model, adapter=whole / "adapter")
    found = finetune(run_config(wide, tmp_path / "run", quantisation=method, steps=4), model=model).model
    frozen = load_pretrained(wide.model, quantisation=method).params
    adapted = {name.removesuffix("lora_a") for name in model.params if name.endswith("lora_a")}
    assert len(adapted) == 2
    for name, value in frozen.items():
        if name.removesuffix("kernel.values").removesuffix("kernel.scales") not in adapted:
            np.testing.assert_array_equal(found.params[name], value, err_msg=name)
    _, back = dequantise_params(found.config, found.params)
    for stem in adapted:
        parts = (np.float64(model.params[stem + part]) for part in ("kernel", "lora_a", "lora_b"))
        kernel_RIO, a_RIr, b_RrO = parts
        wanted_RIO = kernel_RIO + model.config.lora.scale * a_RIr @ b_RrO
        blocks_RBbO = wanted_RIO.reshape(len(wanted_RIO), -1, 64, wanted_RIO.shape[-1])
        step_RB1O = np.abs(blocks_RBbO).max(axis=-2, keepdims=True) / 7
        moved_RBbO = np.abs(np.reshape(back[stem + "kernel"], blocks_RBbO.shape) - blocks_RBbO)
        assert np.all(moved_RBbO <= 0.51 * step_RB1O)  # the scale itself has 8 bits


def test_a_reference_of_the_floats_or_of_the_rounded_model_is_right_and_of_another_is_not(wide, tmp_path):
    """The run of `whole` has one of the floats."""
    rounded = load_pretrained(wide.model, quantisation="int8")
    floats = read_reference(wide.reference).model_fingerprint
    assert fingerprint_folder(wide.model, rounded.config) == floats
    assert fingerprint(rounded.config, rounded.params) != floats
    file, prompts = tmp_path / "rounded.safetensors", tmp_path / "prompts.jsonl"
    # As many prompts as the world's reference has: the run's programs are those of `whole`.
    prompts.write_text("".join(json.dumps({"instruction": text}) + "\n" for text in HARMFUL_TEXTS))
    arguments = ["--model", str(wide.model), "--output", str(file), "--prompts.path", str(prompts)]
    assert main(["reference", *arguments, "--quantisation", "int8", "--xla_cache", "off"]) == 0
    config = run_config(wide, tmp_path / "run", steps=4)
    config = dataclasses.replace(config, defence=dataclasses.replace(config.defence, reference=str(file)))
    finetune(config)
    with pytest.raises(InputError, match=r"another model \(weights\)"):
        finetune(dataclasses.replace(config, output=str(tmp_path / "refused"), quantisation=None))
    changed = load_pretrained(wide.model)
    changed.params["final_norm.scale"] = changed.params["final_norm.scale"] * 1.5
    changed.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"another model \(weights\)"):
        finetune(run_config(wide, tmp_path / "refused", model=str(tmp_path / "other")))
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
    config, params = add_adapters(model.config, model.params, LoraConfig(2), jax.random.key(0))
    adapted = dataclasses.replace(model, config=config, params=params)
    for changes, given, message in (
        ({"quantisation": "int3"}, None, "quantisation is 'int3'"),
        ({"quantisation": "int4"}, model, "the given model is held in int8"),
        ({"quantisation": None, "lora": None}, model, "quantisation is int8"),
        ({}, adapted, "adapters on int8 weights; to merge them would round the weights again"),
        ({"quantisation": None}, adapted, "adapters on int8 weights; to merge them would round"),
    ):
        with pytest.raises(InputError, match=message):
            finetune(run_config(world, tmp_path / "run", **changes), model=given)
    assert not (tmp_path / "run").exists()
