"""Adapters live against PEFT, both directions, and the merged export."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import OlmoeForCausalLM

from safemoe_jax.model import load_pretrained
from safemoe_jax.models import LoraConfig
from safemoe_jax.models.lora import add_adapters
from tests.make_references import ADAPTERS, adapt, batch, build, run

pytestmark = pytest.mark.parity
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
TARGETS = {
    "default": ("mha", ("q_proj", "v_proj")),
    "all-attention": ("gqa_clip", ("q_proj", "k_proj", "v_proj", "o_proj")),
    "biased": ("tied_bias", ("q_proj", "o_proj")),
    "router": ("mha", ("q_proj", "gate")),
    "experts": ("mha", ("v_proj", *EXPERTS)),
    "gate_up": ("gqa_clip", EXPERTS[:1]),
    "down": ("mha", EXPERTS[1:]),
    "everything": ("gqa_clip", ("q_proj", "k_proj", "v_proj", "o_proj", "gate", *EXPERTS)),
}


@pytest.fixture(scope="module", autouse=True)
def _two_threads():
    torch.set_num_threads(2)


def close(got, want, mask):
    real = mask.astype(bool)
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=1e-4)


@pytest.mark.parametrize("name", TARGETS)
def test_peft_loads_what_is_written_here(name, tmp_path):
    variant, targets = TARGETS[name]
    base = build(variant, seed=11)
    base.save_pretrained(tmp_path / "base")
    model = load_pretrained(tmp_path / "base")
    tokens, mask, _ = batch(seed=12)
    before = np.asarray(model(tokens, mask).logits)
    lora = LoraConfig(rank=3, alpha=5.0, targets=targets)
    model.config, model.params = add_adapters(model.config, model.params, lora, jax.random.key(1))
    for i, key in enumerate(sorted(k for k in model.params if k.endswith("lora_b"))):
        noise = jax.random.normal(jax.random.key(i), model.params[key].shape)
        model.params[key] = 0.3 * noise
    want = np.asarray(model(tokens, mask).logits)
    assert np.abs(want - before)[mask.astype(bool)].max() > 0.05
    model.save_adapter(tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    close(want, run(adapted, tokens, mask), mask)
    # The merged export is the same function in transformers, and PEFT's own merge agrees.
    model.save_pretrained(tmp_path / "merged")
    merged, info = OlmoeForCausalLM.from_pretrained(
        tmp_path / "merged",
        output_loading_info=True,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    assert not any(info.values()), info
    close(want, run(merged.eval(), tokens, mask), mask)
    close(want, run(adapted.merge_and_unload(), tokens, mask), mask)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_loads_what_peft_writes(adapter, tmp_path):
    base = build(ADAPTERS[adapter][0], seed=13)
    base.save_pretrained(tmp_path / "base")
    adapted = adapt(base, adapter, seed=14)
    adapted.save_pretrained(tmp_path / "adapter")
    tokens, mask, _ = batch(seed=15)
    model = load_pretrained(tmp_path / "base", adapter=tmp_path / "adapter")
    close(model(tokens, mask).logits, run(adapted, tokens, mask), mask)
    close(model.merged()(tokens, mask).logits, run(adapted, tokens, mask), mask)
