"""`safemoe export`: what is written computes what model and adapter computed together."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from safemoe_jax import cli
from safemoe_jax.model import Model, load_pretrained
from safemoe_jax.models.config import LoraConfig, ModelConfig
from safemoe_jax.models.lora import add_adapters
from safemoe_jax.models.params import initialise, is_adapter
from safemoe_jax.models.transformer import declare

CONFIG = ModelConfig(
    family="olmoe", vocab_size=24, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4,
    norm_eps=1e-5, n_experts=4, top_k=2, expert_dim=8, qk_norm="full",
)  # fmt: skip
LORA = LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "v_proj", "mlp.experts.down_proj"))
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, np.ndarray]:
    """A base model, an adapter whose update is not zero, and the logits of both together."""
    params = initialise(declare(CONFIG), jax.random.key(0), stddev=0.5)
    Model(CONFIG, params).save_pretrained(tmp_path / "base")
    config, params = add_adapters(CONFIG, params, LORA, jax.random.key(1))
    noise = np.random.default_rng(0)
    params = {
        name: value + 0.3 * noise.standard_normal(value.shape).astype(np.float32)
        if is_adapter(name)
        else value
        for name, value in params.items()
    }
    adapted = Model(config, params)
    adapted.save_adapter(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", np.asarray(adapted(TOKENS).logits)


def test_the_merged_folder_computes_the_same(folders, tmp_path: Path) -> None:
    base, adapter, logits = folders
    merged = tmp_path / "merged"
    arguments = ["export", "--model", str(base), "--adapter", str(adapter), "--output", str(merged)]
    assert cli.main([*arguments, "--xla_cache", "off"]) == 0
    loaded = load_pretrained(merged)
    assert loaded.config.lora is None
    np.testing.assert_allclose(loaded(TOKENS).logits, logits, atol=1e-4)
    assert np.abs(np.asarray(load_pretrained(base)(TOKENS).logits) - logits).max() > 0.1


def test_the_copied_adapter_computes_the_same(folders, tmp_path: Path) -> None:
    base, adapter, logits = folders
    copy = tmp_path / "copy"
    arguments = ["export", "--model", str(base), "--adapter", str(adapter), "--output", str(copy)]
    assert cli.main([*arguments, "--format", "adapter", "--xla_cache", "off"]) == 0
    loaded = load_pretrained(base, adapter=copy)
    assert loaded.config.lora == LORA
    np.testing.assert_allclose(loaded(TOKENS).logits, logits, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--adapter": None, "--format": "adapter"}, "no adapter"),
        ({"--model": "nowhere"}, "nowhere"),
        ({"--adapter": "nowhere"}, "nowhere"),
        ({"--output": "base"}, "already there"),
    ],
)
def test_wrong_input_writes_nothing(folders, tmp_path: Path, monkeypatch, capsys, changes, words) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    given = {"--model": "base", "--adapter": "adapter", "--output": "out"} | changes
    arguments = [part for flag, value in given.items() if value is not None for part in (flag, value)]
    assert cli.main(["export", *arguments, "--xla_cache", "off"]) == 2
    assert words in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
