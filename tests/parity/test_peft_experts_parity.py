"""Adapters on experts and routers against PEFT, both directions, for every family with experts.

Attention is adapted beside them; `families/facts.py` has the attention projections of every variant alone.
"""

from __future__ import annotations

import importlib

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model

from safemoe_jax.model import load_pretrained
from safemoe_jax.models import LoraConfig
from safemoe_jax.models.lora import add_adapters
from tests.parity.families.harness import build, copied, their_logits

pytestmark = pytest.mark.parity
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
# What PEFT calls the experts' parameters and the router's, written out from transformers' modules.
MODULES = {
    "olmoe": ("mlp.experts", "mlp.gate.weight"),
    "qwen2_moe": ("mlp.experts", "mlp.gate.weight"),
    "qwen3_moe": ("mlp.experts", "mlp.gate.weight"),
    "mixtral": ("mlp.experts", "mlp.gate.weight"),
    "phimoe": ("mlp.experts", "mlp.router.weight"),
    "granitemoe": ("block_sparse_moe.experts", "block_sparse_moe.router.weight"),
    "deepseek_v2": ("mlp.experts", "mlp.gate.weight"),
    "deepseek_v3": ("mlp.experts", "mlp.gate.weight"),
    "dots1": ("mlp.experts", "mlp.gate.weight"),
    "glm4_moe": ("mlp.experts", "mlp.gate.weight"),
    "ernie4_5_moe": ("mlp.experts", "mlp.gate.weight"),
    "gpt_oss": ("mlp.experts", "mlp.router.weight"),
    "llama4": ("feed_forward.experts", "feed_forward.router.weight"),
}
TARGETS = {
    "experts": EXPERTS,
    "gate_up": EXPERTS[:1],
    "down": EXPERTS[1:],
    "router": ("gate",),
}


@pytest.fixture(scope="module", params=MODULES)
def base(request, tmp_path_factory):
    """A family's tiny model with the published features, and its folder."""
    torch.set_num_threads(2)
    tests = importlib.import_module(f"tests.parity.families.test_{request.param}")
    theirs = build(tests.VARIANTS[0].config(), seed=3)
    folder = tmp_path_factory.mktemp(request.param) / "base"
    theirs.save_pretrained(folder)
    return request.param, theirs, folder


def batch():
    tokens = np.random.default_rng(5).integers(1, 64, (3, 14)).astype(np.int32)
    mask = (np.arange(14) < np.array([[14], [9], [3]])).astype(np.int32)
    return tokens * mask, mask


def attention_targets(model):
    """Two attention projections that the network has (latent attention has other names)."""
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return tuple(t for t in ("q_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj") if t in leaves)


def close(got, want, mask):
    real = mask.astype(bool)
    scale = np.abs(np.asarray(want)[real]).max()
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=3e-4 * max(1, scale / 10))


@pytest.mark.parametrize("name", TARGETS)
def test_peft_loads_what_is_written_here(base, name, tmp_path):
    _, theirs, folder = base
    tokens, mask = batch()
    model = load_pretrained(folder)
    before = np.asarray(model(tokens, mask).logits)
    lora = LoraConfig(rank=3, alpha=5.0, targets=(*attention_targets(theirs), *TARGETS[name]))
    model.config, model.params = add_adapters(model.config, model.params, lora, jax.random.key(1))
    for i, key in enumerate(sorted(k for k in model.params if k.endswith("lora_b"))):
        model.params[key] = 0.1 * jax.random.normal(jax.random.key(i), model.params[key].shape)
    want = np.asarray(model(tokens, mask).logits)
    assert np.abs(want - before)[mask.astype(bool)].max() > 0.05
    model.save_adapter(tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(copied(theirs), tmp_path / "adapter").eval()
    close(their_logits(adapted, tokens, mask), want, mask)


@pytest.mark.parametrize("name", TARGETS)
def test_loads_what_peft_writes(base, name, tmp_path):
    family, theirs, folder = base
    experts, router = MODULES[family]
    names = {
        EXPERTS[0]: f"{experts}.gate_up_proj",
        EXPERTS[1]: f"{experts}.down_proj",
        "gate": router,
    }
    modules = attention_targets(theirs)
    peft = PeftConfig(
        r=3,
        lora_alpha=5.0,
        target_modules=list(modules),
        target_parameters=[names[target] for target in TARGETS[name]],
    )
    torch.manual_seed(1)
    adapted = get_peft_model(copied(theirs), peft).eval()
    with torch.no_grad():
        for key, value in adapted.named_parameters():
            if "lora_" in key:
                value.normal_(0.0, 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    tokens, mask = batch()
    model = load_pretrained(folder, adapter=tmp_path / "adapter")
    assert set(model.config.lora.targets) == {*modules, *TARGETS[name]}
    want = their_logits(adapted, tokens, mask)
    plain = their_logits(theirs, tokens, mask)
    assert np.abs(want - plain)[mask.astype(bool)].max() > 0.05
    close(model(tokens, mask).logits, want, mask)
