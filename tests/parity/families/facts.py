"""What must be true of every family; a family's test file imports these and names its VARIANTS.

from tests.parity.families.facts import *  # noqa: F403 - every fact is a test of this file
VARIANTS = (Variant("published", ...), Variant("everything", ...))
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model

from safemoe_jax.evaluation.generate import generate
from safemoe_jax.model import load_pretrained
from safemoe_jax.models import LoraConfig
from safemoe_jax.models.lora import add_adapters
from safemoe_jax.models.transformer import chosen_experts
from tests.parity.families.harness import (
    agreement,
    by_expert,
    copied,
    decided,
    loss_and_gradients,
    our_choice,
    our_layer_outputs,
    reload,
    their_logits,
)

RANK, ALPHA = 3, 6.0

__all__ = [
    "test_logits",
    "test_router_logits",
    "test_chosen_experts_and_combine_weights",
    "test_output_of_every_layer",
    "test_loss_and_gradients",
    "test_32_greedy_tokens",
    "test_fused_layout_gives_the_same_parameters",
    "test_transformers_loads_what_is_written_here",
    "test_adapters_of_peft_load_here",
    "test_peft_loads_adapters_written_here",
    "test_bfloat16_agrees",
]


def close(got, want, mask, atol=1e-4):
    """Real tokens agree."""
    real = np.asarray(mask, bool)
    np.testing.assert_allclose(
        np.asarray(got)[..., real, :], np.asarray(want)[..., real, :], atol=atol, rtol=1e-5
    )


def test_logits(pair):
    out = pair.ours(pair.want.tokens, pair.want.attention_mask)
    real = pair.want.attention_mask.astype(bool)
    assert np.abs(pair.want.logits[real]).max() > 1
    close(out.logits, pair.want.logits, real)


def test_router_logits(pair):
    got = np.asarray(pair.ours(pair.want.tokens, pair.want.attention_mask).router_logits)
    assert got.shape == pair.want.router_logits.shape
    assert len(got) == pair.ours.config.n_moe_layers
    close(got, pair.want.router_logits, pair.want.attention_mask)


def test_chosen_experts_and_combine_weights(pair):
    """The rule alone: chosen from transformers' own router logits."""
    real = pair.want.attention_mask.astype(bool)
    weights, experts = by_expert(*our_choice(pair.ours, pair.want.router_logits))
    want_weights, want_experts = by_expert(pair.want.combine_weights, pair.want.experts)
    np.testing.assert_array_equal(experts[:, real], want_experts[:, real])
    close(weights, want_weights, real, atol=1e-5)
    if pair.ours.config.n_moe_layers:
        stacked = chosen_experts(pair.ours.config, pair.ours.weights, pair.want.router_logits)
        np.testing.assert_array_equal(np.sort(stacked)[:, real], want_experts[:, real])


def test_output_of_every_layer(pair, monkeypatch):
    got = our_layer_outputs(pair.ours, pair.want.tokens, pair.want.attention_mask, monkeypatch)
    assert got.shape == pair.want.layers.shape
    close(got, pair.want.layers, pair.want.attention_mask)


def test_loss_and_gradients(pair):
    loss, query, router = loss_and_gradients(pair.ours, pair.want)
    np.testing.assert_allclose(loss, pair.want.loss, atol=1e-5)
    for got, want in ((query, pair.want.query_gradient), (router, pair.want.router_gradient)):
        assert (got is None) == (want is None)
        if want is not None:
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())
            assert np.abs(want).max() > 1e-6


def test_32_greedy_tokens(pair):
    lengths = pair.want.attention_mask.sum(axis=1)
    prompts = [row[:n] for row, n in zip(pair.want.tokens, lengths, strict=True)]
    answers = generate(pair.ours, prompts, max_new_tokens=32, stop_tokens=())
    np.testing.assert_array_equal(answers, pair.want.greedy)


def test_fused_layout_gives_the_same_parameters(pair):
    fused = load_pretrained(pair.fused_folder)
    assert fused.config == pair.ours.config and fused.params.keys() == pair.ours.params.keys()
    for name, value in pair.ours.params.items():
        np.testing.assert_array_equal(fused.params[name], value, err_msg=name)


def test_transformers_loads_what_is_written_here(pair, tmp_path):
    pair.ours.save_pretrained(tmp_path / "saved", max_file_bytes=40_000)
    loaded, info = reload(tmp_path / "saved")
    assert not any(info.values()), info
    assert loaded.dtype == torch.float32 and type(loaded) is type(pair.theirs)
    got = their_logits(loaded, pair.want.tokens, pair.want.attention_mask)
    np.testing.assert_array_equal(got, pair.want.logits)


def test_adapters_of_peft_load_here(pair, tmp_path):
    targets = list(pair.variant.adapter_targets)
    torch.manual_seed(1)
    adapted = get_peft_model(
        copied(pair.theirs), PeftConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
    ).eval()
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.normal_(0.0, 0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    model = load_pretrained(pair.folder, adapter=tmp_path / "adapter")
    want = their_logits(adapted, pair.want.tokens, pair.want.attention_mask)
    assert np.abs(want - pair.want.logits)[pair.want.attention_mask.astype(bool)].max() > 0.05
    got = model(pair.want.tokens, pair.want.attention_mask).logits
    close(got, want, pair.want.attention_mask, atol=2e-4)


def test_peft_loads_adapters_written_here(pair, tmp_path):
    peft_round_trip(pair, pair.variant.adapter_targets, tmp_path / "adapter")


def peft_round_trip(pair, targets, folder) -> PeftModel:
    """Writes adapters on these targets (None: the default ones); what PEFT makes of them has their logits."""
    model = load_pretrained(pair.folder)
    lora = LoraConfig(rank=RANK, alpha=ALPHA, targets=targets)
    model.config, model.params = add_adapters(model.config, model.params, lora, jax.random.key(1))
    for i, name in enumerate(sorted(name for name in model.params if name.endswith("lora_b"))):
        model.params[name] = 0.3 * jax.random.normal(jax.random.key(i), model.params[name].shape)
    want = model(pair.want.tokens, pair.want.attention_mask).logits
    real = pair.want.attention_mask.astype(bool)
    assert np.abs(want - pair.want.logits)[real].max() > 0.05
    model.save_adapter(folder)
    adapted = PeftModel.from_pretrained(copied(pair.theirs), folder).eval()
    close(their_logits(adapted, pair.want.tokens, pair.want.attention_mask), want, real, atol=2e-4)
    return adapted


def test_bfloat16_agrees(pair, tmp_path):
    """Rounding differs between two programs; what is chosen must not, nor may ours be the coarser one."""
    exact = decided(pair.theirs)
    exact.save_pretrained(tmp_path / "decided")
    ours = load_pretrained(tmp_path / "decided", dtype="bfloat16")
    theirs, _ = reload(tmp_path / "decided", torch.bfloat16)
    assert theirs.dtype == torch.bfloat16
    assert ours.params["segments.0.0.attention.o_proj.kernel"].dtype == jnp.bfloat16
    found = agreement(ours, theirs, exact)
    assert found.tokens >= 0.99 and found.experts >= 0.97, found
    assert found.our_error <= 1.25 * found.their_error, found
