"""What `validate` and the planning of a run refuse, in Python as in YAML."""

from __future__ import annotations

import dataclasses
import importlib.util
import math

import numpy as np
import pytest

from safemoe_jax.data.sources import SourceConfig
from safemoe_jax.errors import InputError
from safemoe_jax.models.config import LoraConfig
from safemoe_jax.parallel.mesh import MeshConfig
from safemoe_jax.training.config import DefenceConfig, OptimizerConfig, TrainConfig, validate
from safemoe_jax.training.inputs import check_vocabulary
from safemoe_jax.workflows.train import finetune
from tests.tiny_tokenizer import train_tokenizer
from tests.training.tiny import make_world

PLAIN = TrainConfig("model", "output", [SourceConfig("data.jsonl")])


def test_the_defaults_and_an_infinite_clip_norm_are_accepted():
    validate(PLAIN)
    validate(dataclasses.replace(PLAIN, optimizer=OptimizerConfig(1, clip_norm=math.inf), lora=None))
    validate(dataclasses.replace(PLAIN, defence=DefenceConfig(layers=(0, 1)), quantisation="int8"))


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"lora": 5}, "lora", "a LoraConfig or null"),
        ({"batch_size": "4"}, "batch_size", "a whole number"),
        ({"batch_size": 4.5}, "batch_size", "a whole number"),
        ({"batch_size": True}, "batch_size", "a whole number"),
        ({"max_length": None}, "max_length", "a whole number"),
        ({"data": ["data.jsonl"]}, "data[0]", "a SourceConfig"),
        ({"data": [SourceConfig(path=3)]}, "data[0].path", "text"),
        ({"experts": "foo"}, "experts", "auto, dense, blocks, ragged, megablox"),
        ({"remat": "half"}, "remat", "none, full"),
        ({"dtype": "float16"}, "dtype", "bfloat16, float32"),
        ({"lora": LoraConfig(targets=["q_proj"])}, "lora.targets", "a tuple of text"),
        ({"seed": -1}, "seed", "from 0 to 4294967295"),
        ({"seed": 2**32}, "seed", "from 0 to 4294967295"),
        ({"lora": LoraConfig(alpha=0.0)}, "lora.alpha", "above 0"),
        ({"lora": LoraConfig(alpha=-8.0)}, "lora.alpha", "above 0"),
        ({"lora": LoraConfig(alpha=math.nan)}, "lora.alpha", "a finite number"),
        (
            {"optimizer": OptimizerConfig(learning_rate=math.inf)},
            "optimizer.learning_rate",
            "a finite number",
        ),
        ({"optimizer": OptimizerConfig(weight_decay=math.inf)}, "optimizer.weight_decay", "a finite number"),
        ({"optimizer": OptimizerConfig(warmup=math.nan)}, "optimizer.warmup", "a finite number"),
        ({"optimizer": OptimizerConfig(eps=math.inf)}, "optimizer.eps", "a finite number"),
        ({"optimizer": OptimizerConfig(clip_norm=math.nan)}, "optimizer.clip_norm", "above 0, or null"),
        ({"defence": DefenceConfig(coefficient=math.inf)}, "defence.coefficient", "a finite number"),
        ({"defence": DefenceConfig(temperature=math.inf)}, "defence.temperature", "a finite number"),
        ({"epochs": math.inf}, "epochs", "a finite number"),
        ({"router_z_coef": math.inf}, "router_z_coef", "a finite number"),
        ({"mesh": MeshConfig(fsdp=0)}, "mesh.fsdp", "at least 1"),
    ],
)
def test_a_value_of_a_wrong_type_or_out_of_range_is_refused(changes, field, expected):
    with pytest.raises(InputError) as caught:
        validate(dataclasses.replace(PLAIN, **changes))
    assert caught.value.where == f"the configuration, field {field}"
    assert caught.value.what.startswith(f"{field} is ") and expected in caught.value.expected


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_package_that_is_not_installed_is_refused_before_anything_is_written(
    world, tmp_path, monkeypatch, package
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more)
    )
    with pytest.raises(InputError, match=f"{package} is not installed"):
        finetune(world.train_config(str(tmp_path / "run"), **{package: True}))
    assert not (tmp_path / "run").exists()


def test_tokens_that_the_model_does_not_have_are_named():
    check_vocabulary(8, [np.array([0, 7])], [], where="model")
    with pytest.raises(InputError, match="gives token 8, the model's vocabulary has 8"):
        check_vocabulary(8, [np.array([0, 7]), np.array([8])], [], where="model")


def test_a_run_with_such_a_tokenizer_is_refused_before_anything_is_written(tmp_path):
    small = make_world(tmp_path)
    train_tokenizer(
        ["alder birch cedar " + text for text in map(str, range(2000))], small.model, vocab_size=700
    )
    with pytest.raises(InputError, match=r"gives token \d+, the model's vocabulary has 320"):
        finetune(small.train_config("run"))
    assert not (tmp_path / "run").exists()
