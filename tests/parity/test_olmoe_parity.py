"""OLMoE live against transformers: logits, routers, loss, generation, and folders in both directions."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from transformers import OlmoeForCausalLM

from safemoe_jax.evaluation.generate import generate
from safemoe_jax.model import load_pretrained
from safemoe_jax.models.router import choose_experts
from tests.make_references import VARIANTS, build, compute, run, save

pytestmark = pytest.mark.parity
SEED = 7  # not the seed of the committed files


@pytest.fixture(scope="module", autouse=True)
def _two_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """A variant's folder as transformers writes it, its torch model, and what that computes."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = build(request.param, seed=SEED)
    save(request.param, theirs, folder)
    return folder, theirs, compute(theirs, seed=SEED)


def test_logits_routers_experts_and_loss(pair):
    folder, _, want = pair
    model = load_pretrained(folder)
    out = model(want.tokens, want.attention_mask)
    real = want.attention_mask.astype(bool)
    assert np.abs(want.logits[real]).max() > 1
    np.testing.assert_allclose(out.logits[real], want.logits[real], atol=1e-4)
    np.testing.assert_allclose(out.router_logits[:, real], want.router_logits[:, real], atol=1e-4)
    weights, experts = choose_experts(out.router_logits, model.config)
    np.testing.assert_array_equal(experts[:, real], want.experts[:, real])
    np.testing.assert_allclose(weights[:, real], want.combine_weights[:, real], atol=1e-5)
    log_probs = np.asarray(jax.nn.log_softmax(out.logits[:, :-1], axis=-1))
    chosen = np.take_along_axis(log_probs, want.tokens[:, 1:, None], axis=-1)[..., 0]
    loss = -chosen[want.answer_mask[:, 1:].astype(bool)].mean()
    np.testing.assert_allclose(loss, want.loss[0], atol=1e-5)


def test_32_greedy_tokens(pair):
    folder, _, want = pair
    prompts = [row[:n] for row, n in zip(want.tokens, want.attention_mask.sum(axis=1), strict=True)]
    answers = generate(load_pretrained(folder), prompts, max_new_tokens=32, stop_tokens=())
    np.testing.assert_array_equal(answers, want.greedy)


def test_transformers_loads_what_is_saved_here(pair, tmp_path):
    folder, theirs, want = pair
    load_pretrained(folder).save_pretrained(tmp_path / "saved", max_file_bytes=30_000)
    loaded, info = OlmoeForCausalLM.from_pretrained(
        tmp_path / "saved",
        output_loading_info=True,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    assert not any(info.values()), info
    assert loaded.dtype == torch.float32
    for name in ("clip_qkv", "norm_topk_prob", "tie_word_embeddings", "attention_bias", "rms_norm_eps"):
        assert getattr(loaded.config, name) == getattr(theirs.config, name)
    got = run(loaded.eval(), want.tokens, want.attention_mask)
    np.testing.assert_array_equal(got, want.logits)


def test_bfloat16_folder_in_and_out(tmp_path):
    """A bfloat16 checkpoint of transformers comes back bit for bit through this project."""
    theirs = build("mha", seed=SEED).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    load_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    loaded = OlmoeForCausalLM.from_pretrained(tmp_path / "ours")
    assert loaded.dtype == torch.bfloat16
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
