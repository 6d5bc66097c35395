"""`finetune`: the run folder, what it refuses, when it compiles, every hook of a defence."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax import monitoring

from safemoe_jax import defenses
from safemoe_jax.checkpoints import train_state
from safemoe_jax.checkpoints.huggingface import save_folder
from safemoe_jax.configuration import parse
from safemoe_jax.data.sources import SourceConfig
from safemoe_jax.errors import InputError
from safemoe_jax.families import family_of
from safemoe_jax.model import load_pretrained
from safemoe_jax.models.config import LoraConfig
from safemoe_jax.models.params import Weights
from safemoe_jax.parallel.mesh import MeshConfig
from safemoe_jax.training.config import DefenceConfig, OptimizerConfig, TrainConfig, to_dict
from safemoe_jax.training.hooks import Defence, GradientHook, LossHook
from safemoe_jax.training.metrics import truncate_rows
from safemoe_jax.training.run_folder import check_folder
from safemoe_jax.workflows.train import epoch_ends, finetune, plan_run
from tests.models.drawn import draw_params
from tests.training.tiny import BENIGN_TEXTS, HARMFUL_TEXTS, World


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def defended(world: World):
    """A finished run of the published defence with its defaults, and what was seen on the way."""
    compiled_at: list[int] = []
    steps: list[int] = [0]
    monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled_at.append(steps[-1]) if "backend_compile" in name else None
    )
    seen: list[tuple[int, float]] = []

    def watch(step: int, model) -> None:
        steps.append(step)
        b = next(value for name, value in model.params.items() if name.endswith("q_proj.lora_b"))
        # numpy's own sum: a jax one would be compiled here.
        seen.append((step, float(np.abs(np.asarray(b)).sum())))

    # A rank that no other test has: steps that this process has compiled before would not be compiled again.
    config = world.train_config(
        "defended",
        epochs=3.0,
        lora=LoraConfig(3, 6.0),
        defence=world.defence("safemoe"),
        checkpoint_every=None,
        tensorboard=True,
    )
    result = finetune(config, on_step=[watch])
    steps.append(-1)
    return config, result, seen, [step for step in compiled_at if step >= 0]


def test_the_run_folder_holds_what_the_design_promises(defended):
    config, result, _, _ = defended
    folder = result.run_dir
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert names == {
        "config.yaml", "environment.json", "metrics.jsonl", "results.json", "checkpoints", "adapter",
        "tensorboard"
    }  # fmt: skip
    assert list((folder / "tensorboard").iterdir())
    assert json.loads((folder / "environment.json").read_text())["versions"]["jax"] == jax.__version__
    assert json.loads((folder / "results.json").read_text())["training"]["task_steps"] == 13
    parsed, _ = parse(TrainConfig, ["--config", str(folder / "config.yaml")], program="safemoe train")
    named = dataclasses.replace(config.lora, targets=("q_proj", "v_proj"))
    assert config.lora.targets is None and parsed == dataclasses.replace(config, lora=named)


def test_passes_come_at_the_ends_of_epochs_and_the_last_has_rate_0(defended):
    _, result, seen, _ = defended
    rows = rows_of(result.run_dir)
    assert [row["step"] for row in rows] == list(range(1, 13 + 9 + 1))
    passes = [row for row in rows if row["kind"] == "routing"]
    # 18 samples in batches of 4: epochs end after 4.5, 9 and 13.5 steps; ten prompts are three batches.
    assert [row["task_step"] for row in passes] == [4] * 3 + [9] * 3 + [13] * 3
    rates = {row["task_step"]: row["learning_rate"] for row in rows if row["kind"] == "task"}
    assert passes[0]["learning_rate"] == rates[5] and passes[3]["learning_rate"] == rates[10]
    assert passes[-1]["learning_rate"] == 0
    assert all(row["routing_penalty"] == row["loss"] for row in passes)
    assert [step for step, _ in seen] == list(range(1, 14))
    assert seen[0][1] == 0 and seen[1][1] > 0  # warm-up: the first step has rate 0


def test_nothing_is_compiled_after_the_first_epoch(defended):
    _, result, _, compiled_at = defended
    # Step 13 is the last; what follows it is the writing of the adapter.
    assert compiled_at and not [step for step in compiled_at if 4 < step < 13]
    assert 1 <= result.summary["compilations"] <= 6


def test_the_saved_adapter_is_the_trained_one(world, defended):
    _, result, _, _ = defended
    loaded = load_pretrained(world.model, adapter=result.run_dir / "adapter")
    for name, value in result.model.params.items():
        np.testing.assert_array_equal(loaded.params[name], value, err_msg=name)


def test_a_second_run_compiles_nothing_and_gives_the_same_bits(world, defended):
    config, result, _, _ = defended
    again = finetune(
        dataclasses.replace(config, output=str(world.folder / "again"), checkpoint_every=0, tensorboard=False)
    )
    assert again.summary["compilations"] == 0
    assert final_bytes(again.run_dir) == final_bytes(result.run_dir)


def test_a_model_in_memory_is_as_good_as_its_folder(world, defended):
    config, result, _, _ = defended
    model = load_pretrained(world.model)
    before = {name: np.asarray(value) for name, value in model.params.items()}
    again = finetune(
        dataclasses.replace(config, output=str(world.folder / "memory"), checkpoint_every=0), model=model
    )
    assert final_bytes(again.run_dir) == final_bytes(result.run_dir)
    for name, value in model.params.items():
        np.testing.assert_array_equal(value, before[name])


def test_a_folder_of_another_configuration_is_refused_and_left_alone(defended):
    config, result, _, _ = defended
    before = {path: path.stat().st_mtime_ns for path in result.run_dir.rglob("*")}
    other = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=2e-2))
    with pytest.raises(InputError, match=r"optimizer.learning_rate was 0.01, is 0.02"):
        finetune(other)
    assert {path: path.stat().st_mtime_ns for path in result.run_dir.rglob("*")} == before


def test_a_folder_that_is_older_than_a_setting_is_continued_at_its_default(world, defended):
    """Settings of every depth are missing from config.yaml; another value than the default is another run."""
    config, result, _, _ = defended
    file = result.run_dir / "config.yaml"
    before = file.read_text()
    written = yaml.safe_load(before)
    missing = {"": "router_z_coef", "optimizer": "b2", "defence": "clip", "mesh": "tensor", "lora": "alpha"}
    for section, name in missing.items():
        del (written[section] if section else written)[name]
    del written["data"][0]["share"], written["remat"]
    now = dataclasses.replace(config, lora=LoraConfig(3, targets=("q_proj", "v_proj")))
    try:
        file.write_text(yaml.safe_dump(written))
        check_folder(now)
        for other, told in (
            (dataclasses.replace(now, router_z_coef=0.5), "router_z_coef was 0.0, is 0.5"),
            (
                dataclasses.replace(now, lora=LoraConfig(3, 6.0, ("q_proj", "v_proj"))),
                "lora.alpha was 8.0, is 6.0",
            ),
            (dataclasses.replace(now, mesh=MeshConfig(tensor=2)), "mesh.tensor was 1, is 2"),
            (dataclasses.replace(now, data=[SourceConfig(str(world.data), share=0.5)]), "'share': None"),
        ):
            with pytest.raises(InputError, match=f"another configuration: .*{told}"):
                check_folder(other)
    finally:
        file.write_text(before)


def test_a_folder_that_is_no_run_is_refused(world, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="not empty and holds no run"):
        finetune(world.train_config(str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_on_changed_data_is_not_continued(world, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(world.data.read_text())
    config = world.train_config(
        str(tmp_path / "run"), data=[SourceConfig(str(data))], steps=2, checkpoint_every=1
    )
    finetune(config)
    data.write_text("\n".join(reversed(world.data.read_text().splitlines())))
    with pytest.raises(InputError, match="the training data are not those"):
        finetune(config)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(world, tmp_path):
    config = world.train_config(
        str(tmp_path / "run"),
        checkpoint_every=1,
        optimizer=OptimizerConfig(learning_rate=1e38, warmup=0.2, clip_norm=None, schedule="constant"),
    )
    with pytest.raises(InputError) as caught:
        finetune(config)
    message = str(caught.value)
    rows = rows_of(tmp_path / "run")
    assert f"optimizer step {len(rows) + 1} (task step {len(rows) + 1}" in message
    assert message.count("data.jsonl") == 1 and "records" in message
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    with train_state.TrainCheckpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.latest() == len(rows)
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_full_disk_stops_the_run_with_one_message(world, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(train_state.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 100, 100))
    with pytest.raises(InputError, match="the disk is full"):
        finetune(world.train_config(str(tmp_path / "run"), checkpoint_every=2))


def test_full_fine_tuning_from_random_weights_writes_a_model(world):
    config = world.train_config(
        "random", lora=None, initialise="random", router_aux_coef=0.1, epochs=4.0,
        defence=DefenceConfig(),
    )  # fmt: skip
    result = finetune(config)
    rows = rows_of(result.run_dir)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert all(1 <= row["load_balancing"] <= 4 for row in rows)
    loaded = load_pretrained(result.run_dir / "model")
    for name, value in result.model.params.items():
        np.testing.assert_array_equal(loaded.params[name], value, err_msg=name)


def test_full_fine_tuning_holds_the_weights_once_beside_adams_moments(world):
    """Bytes of all live arrays during a run, against parameters and two moments of them."""
    before = {id(array) for array in jax.live_arrays()}
    seen: list[int] = []

    def measure(step: int, model) -> None:
        new = [array for array in jax.live_arrays() if id(array) not in before]
        seen.append(sum(array.nbytes for array in new) / sum(v.nbytes for v in model.params.values()))

    # The router loss changes nothing here; the test above has compiled this step.
    finetune(world.train_config("once", lora=None, router_aux_coef=0.1, steps=3), on_step=[measure])
    assert len(seen) == 3 and max(seen) < 3.5


def test_full_fine_tuning_leaves_the_routers_correction_biases(world, tmp_path):
    """In transformers they are buffers: their bytes are the same after any steps, in a bfloat16 model too."""
    raw = dict(
        model_type="dots1", vocab_size=world.config.vocab_size, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, intermediate_size=24, moe_intermediate_size=8,
        n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, n_group=1,
        topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.0, rms_norm_eps=1e-5,
        max_position_embeddings=128, rope_theta=1e4, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    config = family_of("dots1").read_config(raw)
    params = draw_params(config, stddev=0.3)
    name = "segments.1.0.moe.router.correction_bias"
    params[name] = jnp.asarray([[0.3, -0.1, 1 / 3, 0.0]], jnp.float32)
    save_folder(tmp_path / "model", config, params)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(world.model / file, tmp_path / "model")
    optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=0.5)
    run = world.train_config(
        "fixed", model=str(tmp_path / "model"), lora=None, dtype="bfloat16", steps=3, optimizer=optimizer
    )
    for model in (None, load_pretrained(tmp_path / "model")):
        result = finetune(dataclasses.replace(run, output=str(tmp_path / f"run{model is None}")), model=model)
        saved = load_pretrained(result.run_dir / "model")
        for found in (result.model.params[name], saved.params[name]):
            assert np.asarray(found).tobytes() == np.asarray(params[name]).tobytes()
        kernel = "segments.1.0.moe.router.kernel"
        assert np.abs(result.model.params[kernel] - params[kernel]).max() > 1e-3
        assert "4 correction biases stay" in result.summary["trainable"]


def test_bfloat16_keeps_trained_weights_in_float32(world):
    config = world.train_config(
        "bfloat16", dtype="bfloat16", epochs=1.0, defence=world.defence("safemoe_anchored")
    )
    result = finetune(config)
    dtypes = {name: value.dtype for name, value in result.model.params.items()}
    assert {str(d) for name, d in dtypes.items() if "lora" in name} == {"float32"}
    assert {str(d) for name, d in dtypes.items() if "lora" not in name} == {"bfloat16"}
    rows = rows_of(result.run_dir)
    assert all(row["routing_penalty"] >= 0 and row["anchor"] >= 0 for row in rows)
    plain = rows_of(finetune(world.train_config("float32", epochs=1.0)).run_dir)
    assert rows[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.02)


def test_every_hook_of_a_defence_acts(world, monkeypatch):
    """data, init, loss, gradient and post, each with an effect that shows in the result."""
    kept: list[int] = []

    def data(samples):
        kept.append(len(samples))
        return samples[:9]

    def init(config, weights: Weights) -> Weights:
        return Weights(
            weights.frozen, {name: jnp.full_like(v, 0.01) for name, v in weights.trainable.items()}
        )

    def term(config, weights, output, batch, constants):
        value = constants * batch["share"]
        return value * 0.0, {"term": value}

    def edit(config, weights, gradient, batch, constants, compute):
        only_b = {n: g if n.endswith("lora_b") else jnp.zeros_like(g) for n, g in gradient.items()}
        return only_b, {"edited": constants}

    def post(config, weights: Weights) -> Weights:
        return Weights(weights.frozen, {name: value + 1 for name, value in weights.trainable.items()})

    def build(config, context) -> Defence:
        loss, gradient = LossHook(term, jnp.float32(7)), GradientHook(edit, jnp.float32(5))
        return Defence("all", data=data, init=init, loss=loss, gradient=gradient, post=post)

    monkeypatch.setitem(defenses.REGISTRY, "all", build)
    optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0)
    config = world.train_config(
        "hooks", epochs=1.0, defence=DefenceConfig("all"), optimizer=optimizer, gradient_accumulation=2
    )
    result = finetune(config)
    rows = rows_of(result.run_dir)
    assert kept == [18] and len(rows) == 2
    assert {(row["term"], row["edited"]) for row in rows} == {(7.0, 5.0)}
    for name, value in result.model.params.items():
        if name.endswith("lora_a"):
            np.testing.assert_allclose(value, 1.01, rtol=1e-6)
        elif name.endswith("lora_b"):
            assert np.all(np.asarray(value) > 0.9) and np.any(np.abs(np.asarray(value) - 1.01) > 1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defence": DefenceConfig("safemoe", t_reg=0)}, "defence.t_reg is 0"),
        ({"defence": DefenceConfig("safemoe", temperature=0.0)}, "defence.temperature is 0.0"),
        ({"defence": DefenceConfig("safemoe", temperature=-1.0)}, "defence.temperature is -1.0"),
        ({"defence": DefenceConfig("saferoute")}, "unknown defence 'saferoute'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 1000}, "less than one batch"),
        ({"epochs": 0.0}, "epochs is 0.0"),
        ({"data": []}, "data is"),
        ({"optimizer": OptimizerConfig(learning_rate=-1.0)}, "learning_rate is -1.0"),
        ({"optimizer": OptimizerConfig(clip_norm=0.0)}, "clip_norm is 0.0"),
        ({"lora": LoraConfig(targets=("query",))}, "'query' matches no projection"),
        ({"mesh": MeshConfig(data=3)}, "the mesh asks for 3 devices"),
        ({"max_length": 4}, "truncated away"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(world, changes, message):
    with pytest.raises(InputError, match=message):
        finetune(world.train_config("refused", **changes))
    assert not (world.folder / "refused").exists()


def test_a_reference_of_other_prompts_than_those_named_is_refused(world, tmp_path):
    """The files of harmful and benign prompts may be named beside the reference."""

    def plan(harmful, benign):
        sources = {}
        for kind, texts in (("prompts", harmful), ("benign", benign)):
            path = tmp_path / f"{kind}.txt"
            path.write_text("".join(f"{text}\n" for text in texts))
            sources[kind] = SourceConfig(str(path))
        defence = world.defence("safemoe_anchored")
        return plan_run(world.train_config(str(tmp_path / "run"), defence=defence, **sources))

    plan(HARMFUL_TEXTS, BENIGN_TEXTS)
    fewer, others = (HARMFUL_TEXTS[:-1], BENIGN_TEXTS), (HARMFUL_TEXTS, HARMFUL_TEXTS)
    for texts, kind in ((fewer, "harmful"), (others, "benign")):
        with pytest.raises(InputError, match=f"another prompt set: .*{kind} prompts"):
            plan(*texts)
    assert not (tmp_path / "run").exists()


def test_a_reference_of_another_model_is_refused(world, tmp_path):
    other = load_pretrained(world.model)
    other.params["final_norm.scale"] = other.params["final_norm.scale"] * 1.5
    other.save_pretrained(tmp_path / "other")
    config = world.train_config("refused", model=str(tmp_path / "other"), defence=world.defence("safemoe"))
    with pytest.raises(InputError, match=r"another model \(weights\)"):
        finetune(config)
    assert not (world.folder / "refused").exists()


def test_max_length_cuts_samples_and_rows_hold_several_of_them(world):
    """The cut is made once, before packing: a longer row is room for more samples, not for longer ones."""
    plan, _, report = plan_run(world.train_config("cut", max_length=18))
    assert report["truncated"] == 3 and report["samples"] + report["dropped"] == 18
    rows = [row for batch in plan.pipeline.iter() for row in batch["segment_ids"] if row.any()]
    lengths = [np.bincount(row[row > 0]).max() for row in rows]
    assert max(lengths) == 18
    assert plan.pipeline.capacity.tokens >= 64


def test_epoch_ends():
    assert epoch_ends(5500, 32, 515) == (171, 343, 515)
    assert epoch_ends(8, 4, 4) == (2, 4)
    assert epoch_ends(10, 4, 5) == (2, 5)
    assert epoch_ends(3, 4, 3) == (1, 2, 3)
    assert epoch_ends(100, 10, 15) == (10,)


def test_metrics_are_cut_behind_the_step_that_a_run_continues_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    truncate_rows(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_naming_the_default_targets_is_the_same_run(defended):
    config, result, _, _ = defended
    named = dataclasses.replace(config.lora, targets=("q_proj", "v_proj"))
    again = finetune(dataclasses.replace(config, lora=named))
    assert again.summary["resumed_at"] == result.summary["task_steps"]


def test_the_resolved_configuration_is_plain_yaml(world):
    config = world.train_config("x", lora=LoraConfig(4, 8.0, ("q_proj",)))
    assert yaml.safe_load(yaml.safe_dump(to_dict(config))) == to_dict(config)
