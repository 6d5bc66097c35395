"""Adapters against folders that PEFT wrote and the logits it computes with them."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from safemoe_jax.checkpoints.peft import load_adapter, published_name, save_adapter
from safemoe_jax.errors import InputError
from safemoe_jax.model import load_pretrained
from safemoe_jax.models import LoraConfig, ModelConfig
from safemoe_jax.models.lora import add_adapters

ADAPTERS = {
    "projections": ("gqa_clip", ("q_proj", "k_proj", "v_proj", "o_proj")),
    "router": ("mha", ("q_proj", "gate")),
    "experts": ("mha", ("v_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
    "down": ("mha", ("mlp.experts.down_proj",)),
    "gate_up": ("mha", ("mlp.experts.gate_up_proj",)),
}


def load(references, adapter):
    return load_pretrained(references / ADAPTERS[adapter][0], adapter=references / f"adapter_{adapter}")


def batch(references, adapter):
    folder = references / ADAPTERS[adapter][0]
    arrays = load_file(folder / "expected.safetensors")
    return arrays["tokens"], arrays["attention_mask"]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_same_logits_as_peft(references, adapter):
    tokens, mask = batch(references, adapter)
    want = load_file(references / f"adapter_{adapter}" / "expected.safetensors")["logits"]
    model = load(references, adapter)
    assert model.config.lora.targets == ADAPTERS[adapter][1]
    got = np.asarray(model(tokens, mask).logits)
    real = mask.astype(bool)
    np.testing.assert_allclose(got[real], want[real], atol=1e-4)
    base = load_pretrained(references / ADAPTERS[adapter][0])(tokens, mask).logits
    assert np.abs(np.asarray(base)[real] - want[real]).max() > 0.1


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_merged_export_has_the_same_logits(references, tmp_path, adapter):
    tokens, mask = batch(references, adapter)
    want = load_file(references / f"adapter_{adapter}" / "expected.safetensors")["logits"]
    load(references, adapter).save_pretrained(tmp_path / "merged")
    merged = load_pretrained(tmp_path / "merged")
    assert merged.config.lora is None
    real = mask.astype(bool)
    got = np.asarray(merged(tokens, mask).logits)
    np.testing.assert_allclose(got[real], want[real], atol=1e-4)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_written_files_are_those_that_peft_wrote(references, tmp_path, adapter):
    load(references, adapter).save_adapter(tmp_path / "adapter")
    theirs = references / f"adapter_{adapter}"
    want, got = (load_file(f / "adapter_model.safetensors") for f in (theirs, tmp_path / "adapter"))
    assert set(got) == set(want)
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array)
    want, got = (json.loads((f / "adapter_config.json").read_text()) for f in (theirs, tmp_path / "adapter"))
    for field in ("target_modules", "target_parameters"):
        assert sorted(got.get(field) or []) == sorted(want[field] or [])
    assert got["r"] == want["r"] and got["peft_type"] == want["peft_type"]
    scale = want["lora_alpha"] / (want["r"] ** 0.5 if want["use_rslora"] else want["r"])
    assert got["use_rslora"] is False and np.isclose(got["lora_alpha"] / got["r"], scale)
    assert got["base_model_name_or_path"] == str(references / ADAPTERS[adapter][0])


def test_fresh_adapters_round_trip(references, tmp_path):
    model = load_pretrained(references / "mha")
    lora = LoraConfig(rank=3, alpha=9.0, targets=("q_proj", "gate", "mlp.experts.gate_up_proj"))
    model.config, model.params = add_adapters(model.config, model.params, lora, jax.random.key(0))
    model.save_adapter(tmp_path / "adapter")
    config, factors = load_adapter(tmp_path / "adapter", load_pretrained(references / "mha").config)
    assert config == model.config
    assert set(factors) == {name for name in model.params if "lora" in name}
    for name, value in factors.items():
        np.testing.assert_array_equal(value, model.params[name])


@pytest.fixture
def adapter(references, tmp_path):
    """A copy of an adapter folder, free to change."""
    return shutil.copytree(references / "adapter_projections", tmp_path / "adapter")


def refused(references, adapter, *words, base="gqa_clip"):
    config = load_pretrained(references / base).config
    with pytest.raises(InputError) as error:
        load_adapter(adapter, config)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"),
        ("use_dora", True),
        ("bias", "all"),
        ("rank_pattern", {"q_proj": 2}),
        ("modules_to_save", ["lm_head"]),
        ("layers_to_transform", [0]),
        ("alora_invocation_tokens", [5, 6]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("an_option_of_tomorrow", {"x": 1}),
        ("r", 0),
        ("r", "8"),
        ("lora_alpha", None),
    ],
)
def test_unsupported_option(references, adapter, field, value):
    fields = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**fields, field: value}))
    refused(references, adapter, str(adapter / "adapter_config.json"), repr(value))


@pytest.mark.parametrize("how", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_the_start_of_training_does_not_matter_where_it_leaves_the_base_alone(references, adapter, how):
    fields = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**fields, "init_lora_weights": how}))
    load_adapter(adapter, load_pretrained(references / "gqa_clip").config)


def test_a_pickled_adapter_is_refused_by_name(references, adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(
        references, adapter, "is a pickle", str(adapter / "adapter_model.bin"), "adapter_model.safetensors"
    )


def test_tensors_that_do_not_fit(references, adapter, rewrite):
    path = adapter / "adapter_model.safetensors"
    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    original = path.read_bytes()
    rewrite(path, lambda a: a.pop(name))
    refused(references, adapter, f"'{name}' is missing")
    path.write_bytes(original)
    rewrite(path, lambda a: a.update({name: a[name].T.copy()}))
    refused(references, adapter, f"'{name}' has shape [3, 8]", "shape [8, 3]")
    path.write_bytes(original)
    rewrite(path, lambda a: a[name].__setitem__((0, 0), np.nan))
    refused(references, adapter, f"'{name}' holds NaN")
    path.write_bytes(original)
    stray = "base_model.model.model.layers.0.mlp.shared.lora_A.weight"
    rewrite(path, lambda a: a.update({stray: np.zeros(2, np.float32)}))
    refused(references, adapter, f"'{stray}' maps to no adapter")
    path.write_bytes(original[:-8])
    refused(references, adapter, "truncated")
    path.unlink()
    refused(references, adapter, "file not found")


def test_adapter_of_another_model(references, adapter):
    refused(references, adapter, "has shape", "adapter of this base model", base="mha")


def test_missing_folder_and_missing_adapter(references, tmp_path):
    refused(references, tmp_path / "none", "no such adapter folder")
    with pytest.raises(InputError, match="has no adapter"):
        load_pretrained(references / "mha").save_adapter(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("owner/model", "owner/model"),
        ("/home/me/model", "/home/me/model"),
        ("/cache/hub/models--owner--a-model/snapshots/0123abc", "owner/a-model"),
    ],
)
def test_the_config_names_the_published_model(name, want):
    assert published_name(name) == want


def test_adapters_of_a_nested_text_model_carry_its_prefix(tmp_path):
    """On the hub Llama 4's text model is a part of a larger one, whose modules the names then follow."""
    config = ModelConfig(
        family="llama4_text", vocab_size=8, d_model=8, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4,
        norm_eps=1e-5, n_experts=2, top_k=1, expert_dim=4, shared_dim=4,
    )  # fmt: skip
    adapted, params = add_adapters(config, {}, LoraConfig(rank=2), jax.random.key(0))
    for folder, raw, prefix in (("own", {}, ""), ("nested", {"text_config": {}}, "language_model.")):
        save_adapter(tmp_path / folder, adapted, params, "owner/model", raw)
        names = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert f"base_model.model.{prefix}model.layers.1.self_attn.v_proj.lora_B.weight" in names
        again, factors = load_adapter(tmp_path / folder, config)
        assert again == adapted
        for name, value in factors.items():
            np.testing.assert_array_equal(value, params[name])
