"""`safemoe inspect`: what it says of a folder, of a hub id, of wrong input, and that no weight is read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from safemoe_jax import cli
from safemoe_jax.checkpoints.huggingface import save_folder
from safemoe_jax.checkpoints.safetensors_files import Reader
from safemoe_jax.families import family_of
from safemoe_jax.families.olmoe import read_config
from safemoe_jax.models import LayerConfig, declare, initialise
from safemoe_jax.models.params import count
from safemoe_jax.workflows.inspect import (
    active_parameters,
    adapted_projections,
    layer_pattern,
    router_loss_facts,
)
from tests.evaluation.folders import write_model
from tests.families.test_deepseek import V2_LITE, V3
from tests.families.test_gpt_oss import PUBLISHED as GPT_OSS
from tests.families.test_llama4 import HUB as SCOUT
from tests.families.test_phimoe import PUBLISHED as PHIMOE
from tests.families.test_softmax_and_dense_families import PUBLISHED as OTHERS

PUBLISHED = {  # what decides sizes in the published OLMoE-1B-7B-0125
    "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_attention_heads": 16,
    "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "rms_norm_eps": 1e-5,
    "vocab_size": 50304, "router_aux_loss_coef": 0.01, "output_router_logits": False,
}  # fmt: skip
MOE, DENSE = LayerConfig(), LayerConfig(kind="dense")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random OLMoE of two layers with tokenizer and chat template."""
    return write_model(tmp_path_factory.mktemp("inspect") / "model")


def inspected(capsys, *arguments: object) -> dict:
    """The command's JSON."""
    assert cli.main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments: object) -> str:
    """The command's one message, exit status 2."""
    assert cli.main(["inspect", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


def test_a_folder_is_described_without_reading_a_weight(folder, capsys, monkeypatch):
    monkeypatch.setattr(Reader, "read", lambda *_: pytest.fail("a weight was read"))
    facts = inspected(capsys, folder)
    # vocabulary 320, width 16, 2 layers of 4 experts of width 8: counted by hand
    attention, norms, router, expert = 4 * 16 * 16, 4 * 16, 16 * 4, 3 * 16 * 8
    total = 2 * 320 * 16 + 16 + 2 * (attention + norms + router + 4 * expert)
    assert facts["parameters"] == {"total": total, "active": total - 2 * 2 * expert}
    assert facts["family"] == "olmoe" and facts["chat_template"] is True
    assert facts["layers"]["pattern"] == "0-1: moe" and facts["layers"]["moe"] == [0, 1]
    assert (facts["experts"]["n"], facts["experts"]["top_k"], facts["experts"]["width"]) == (4, 2, 8)
    tensors = 3 + 2 * (4 + 4 + 1 + 4 * 3)
    assert facts["weights"] == {
        "source": "headers", "bytes": 4 * total, "dtypes": {"float32": 4 * total}, "tensors": tensors,
    }  # fmt: skip
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate"} <= set(facts["lora_targets"])
    assert facts["lora_targets"]["mlp.experts.down_proj"] == 2
    assert facts["router_losses"]["config_asks"] == {"router_aux_loss_coef": 0.0}


def test_the_text_has_a_line_for_everything(folder, capsys):
    assert cli.main(["inspect", "--model", str(folder)]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.strip().splitlines())
    assert lines["layers"].strip() == "2 (0-1: moe)"
    assert lines["experts"].strip() == "4 of width 8, 2 a token (softmax)"
    assert lines["chat template"].strip() == "yes"
    assert "float32" in lines["weights"] and "q_proj (2)" in lines["LoRA targets"]
    assert "router_aux_loss_coef 0.0" in lines["router losses"] and "router_z_coef" in lines["router losses"]


def test_a_file_is_written_and_never_overwritten(folder, tmp_path, capsys):
    file = tmp_path / "facts.json"
    facts = inspected(capsys, folder, "--output", file)
    assert json.loads(file.read_text()) == facts
    before = file.read_bytes()
    assert "already there" in refused(capsys, folder, "--output", file)
    assert file.read_bytes() == before


def test_of_a_hub_id_only_descriptions_are_fetched(folder, tmp_path, capsys, monkeypatch):
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    index = {"metadata": {"total_size": 13_838_323_712}, "weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    fetched = []

    def snapshot_download(name, *, allow_patterns):
        fetched.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    facts = inspected(capsys, "somebody/model")
    assert fetched == [("somebody/model", ["*.json", "*.jinja"])]
    assert facts["weights"] == {"source": "index", "bytes": 13_838_323_712, "dtypes": None}
    assert facts["model"] == "somebody/model" and facts["chat_template"] is False
    assert cli.main(["inspect", "somebody/model"]) == 0
    assert "13.8 GB by the index" in capsys.readouterr().out


def test_the_published_sizes_come_from_the_config_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    facts = inspected(capsys, tmp_path)
    assert facts["parameters"] == {"total": 6_919_161_856, "active": 1_282_017_280}
    assert facts["weights"]["source"] == "none"
    assert facts["router_losses"]["config_asks"] == {
        "router_aux_loss_coef": 0.01,
        "output_router_logits": False,
    }


@pytest.mark.parametrize(
    ("raw", "total", "active", "layers"),
    [
        # Totals as the hub counts them; active ones as the models' papers and cards round them.
        (OTHERS["qwen2_moe"] | {"model_type": "qwen2_moe"}, 14_315_784_192, 2.7, "0-23: moe"),
        (OTHERS["qwen3_moe"] | {"model_type": "qwen3_moe"}, 30_532_122_624, 3.4, "0-47: moe"),
        (OTHERS["mixtral"] | {"model_type": "mixtral"}, 46_702_792_704, 12.9, "0-31: moe"),
        (OTHERS["llama"] | {"model_type": "llama"}, 8_030_261_248, 8.0, "0-31: dense"),
        (GPT_OSS, 20_914_757_184, 4.2, "0-23: 12 x (moe, window 128 | moe)"),
        (PHIMOE, 41_873_153_344, 6.6, "0-31: moe, window 131072"),
        (V2_LITE, 15_706_484_224, 2.7, "0: dense; 1-26: moe"),
        (V3, 671_026_419_200, 37.6, "0-2: dense; 3-60: moe"),
        (
            SCOUT,
            107_769_861_120,  # the text alone
            17.2,
            "0-47: 12 x (moe, chunk 8192 | moe, chunk 8192 | moe, chunk 8192 | moe, no RoPE, scaled queries)",
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_published_sizes_of_the_families(raw, total, active, layers):
    config = family_of(raw["model_type"]).read_config(raw)
    specs = declare(config)
    assert count(specs) == total
    assert round(active_parameters(config, specs) / 1e9, 1) == active
    assert layer_pattern(config.layers) == layers


def test_what_the_published_configs_ask_of_the_router():
    def asked(raw):
        return router_loss_facts(raw)["config_asks"]

    assert asked(GPT_OSS) == {"router_aux_loss_coef": 0.9, "output_router_logits": False}
    assert asked(V2_LITE) == {"aux_loss_alpha": 0.001, "seq_aux": True}
    assert asked(SCOUT) == {"router_aux_loss_coef": 0.001, "output_router_logits": False}
    assert asked(OTHERS["llama"]) == {}


def test_a_dense_model_has_no_experts(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(OTHERS["llama"] | {"model_type": "llama"}))
    facts = inspected(capsys, tmp_path)
    assert facts["experts"] is None and facts["layers"]["moe"] == []
    assert facts["parameters"]["active"] == facts["parameters"]["total"]
    assert set(facts["lora_targets"]) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


def test_names_with_a_prefix_and_other_towers_are_understood(tmp_path, capsys):
    """Llama 4 as the hub has it: the text model nested, its names prefixed, images beside it."""
    small = dict(hidden_size=32, intermediate_size=16, intermediate_size_mlp=48, num_hidden_layers=2)
    small |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=4)
    small |= dict(vocab_size=24, no_rope_layers=[1, 0], interleave_moe_layer_step=2, moe_layers=[1])
    raw = SCOUT | {"text_config": SCOUT["text_config"] | small}
    config = family_of("llama4").read_config(raw)
    save_folder(tmp_path / "plain", config, initialise(declare(config), jax.random.key(0)))
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    text = {f"language_model.{n.removeprefix('language_model.')}": tensor for n, tensor in tensors.items()}
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text(json.dumps(raw))
    save_file(text | {"vision_model.x": np.zeros(5, np.float16)}, tmp_path / "hub" / "model.safetensors")
    facts = inspected(capsys, tmp_path / "hub")
    assert facts["layers"]["pattern"] == "0: dense, chunk 8192; 1: moe, no RoPE, scaled queries"
    total = facts["parameters"]["total"]
    assert facts["weights"]["dtypes"] == {"float32": 4 * total, "float16": 10}


def test_wrong_input_is_one_message(folder, tmp_path, capsys):
    assert "no such folder" in refused(capsys, tmp_path / "none")
    assert "config.json is missing" in refused(capsys, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | {"model_type": "unheard"}))
    assert "unknown model_type 'unheard'" in refused(capsys, tmp_path)
    assert "required but not given: model" in refused(capsys)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pickle" in refused(capsys, tmp_path)


def test_weights_that_are_not_what_the_config_declares(folder, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "model.layers.2" in refused(capsys, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-8])
    assert "truncated" in refused(capsys, tmp_path)


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ((MOE,) * 4, "0-3: moe"),
        ((DENSE,) + (MOE,) * 26, "0: dense; 1-26: moe"),
        ((LayerConfig(window=128), MOE) * 12, "0-23: 12 x (moe, window 128 | moe)"),
        (
            ((LayerConfig(chunk=8192),) * 3 + (LayerConfig(rope=False, temperature=True),)) * 2,
            "0-7: 2 x (moe, chunk 8192 | moe, chunk 8192 | moe, chunk 8192 | moe, no RoPE, scaled queries)",
        ),
        ((DENSE, MOE) * 3 + (DENSE,), "0-5: 3 x (dense | moe); 6: dense"),
    ],
)
def test_layers_in_a_line(layers, text):
    assert layer_pattern(layers) == text


def test_a_token_uses_all_parameters_where_it_is_sent_to_all_experts():
    config = read_config(PUBLISHED)
    specs = declare(config)
    assert active_parameters(replace(config, top_k=64), specs) == count(specs)


def test_targets_are_those_that_training_takes():
    """Every target named is accepted and adapts as many projections as is said."""
    config = read_config(PUBLISHED | {"num_hidden_layers": 3})
    targets = adapted_projections(config)
    assert targets["q_proj"] == targets["gate"] == targets["mlp.experts.gate_up_proj"] == 3
    assert not {"kv_a_proj_with_mqa", "lm_head", "up", "input_norm"} & set(targets)


def test_a_yes_or_no_flag_may_stand_alone_before_another(folder, tmp_path, capsys):
    assert cli.main(["inspect", str(folder), "--json", "--output", str(tmp_path / "a.json")]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "olmoe"
    assert cli.main(["inspect", str(folder), "--json", "false"]) == 0
    assert capsys.readouterr().out.startswith("model")
