"""Llama Guard 4's form against transformers: Llama 4 without a layer of experts, in `text_config` beside an
image tower, its tensors under `language_model.`; and the judge on such a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    Llama4VisionConfig,
)

from safemoe_jax.evaluation.generate import generate
from safemoe_jax.evaluation.judges import Finding
from safemoe_jax.evaluation.judges_llama_guard import LlamaGuardJudge, guard_prompts
from safemoe_jax.model import load_pretrained
from tests.evaluation.test_llama_guard import ANSWERS, CORPUS, GUARD_OF_ANY_PARTS, SAMPLES, VOCABULARY
from tests.parity.families.harness import TooClose, batch, build, greedy, their_logits
from tests.parity.families.test_llama4 import BASE, llama3
from tests.tiny_tokenizer import EOS, train_tokenizer

pytestmark = pytest.mark.parity
NO_EXPERTS = {
    "empty list": dict(
        moe_layers=[], interleave_moe_layer_step=0, num_local_experts=0, num_experts_per_tok=0
    ),
    "step beyond the layers": dict(interleave_moe_layer_step=5),
}
"""How a config of four layers says that none of them has experts."""


def text_config(name: str, **other: int) -> Llama4TextConfig:
    """Every part of the published text model: chunks, scaled rotation, tuned temperature, normed q and k."""
    sizes = dict(vocab_size=VOCABULARY, max_position_embeddings=512)
    fields = BASE | sizes | NO_EXPERTS[name] | other
    return Llama4TextConfig(**fields, rope_parameters=llama3(1.0, 1.0))


def write_guard(folder: Path, text: Llama4ForCausalLM) -> Path:
    """The text model beside an image tower as transformers writes them, and a tokenizer of typed content."""
    vision = Llama4VisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=28,
        projector_input_dim=16, projector_output_dim=16, vision_output_dim=16,
    )  # fmt: skip
    config = Llama4Config(text_config=text.config.to_dict(), vision_config=vision)
    whole = Llama4ForConditionalGeneration(config)
    whole.language_model.load_state_dict(text.state_dict())
    whole.save_pretrained(folder)
    return train_tokenizer(CORPUS, folder, vocab_size=VOCABULARY, chat_template=GUARD_OF_ANY_PARTS)


def their_text_model(folder: Path) -> Llama4ForCausalLM:
    """The text model out of the whole; transformers 5.24 cannot call the whole with no layer of experts."""
    whole = Llama4ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    return whole.language_model.eval()


def clear_greedy(make: Callable[[int], Llama4ForCausalLM]) -> tuple[Llama4ForCausalLM, tuple]:
    """The first text model whose greedy tokens rounding cannot swap; its batch and those tokens."""
    for seed in range(20):
        text, (tokens, mask, _) = make(seed), batch(VOCABULARY, seed)
        try:
            return text, (tokens, mask, greedy(text, tokens, mask))
        except TooClose:
            continue
    raise AssertionError("no seed keeps the margins")


@pytest.mark.parametrize("name", NO_EXPERTS)
def test_logits_and_greedy_tokens(tmp_path, name):
    text, (tokens, mask, answers) = clear_greedy(lambda seed: build(text_config(name), seed))
    folder = write_guard(tmp_path, text)
    fields = json.loads((folder / "config.json").read_text())
    assert fields["model_type"] == "llama4" and fields["text_config"]["moe_layers"] == []
    theirs = their_text_model(folder)
    ours = load_pretrained(folder)
    assert ours.config.moe_layers == () and ours.config.n_experts == 0
    want, real = their_logits(theirs, tokens, mask), mask.astype(bool)
    assert np.abs(want[real]).max() > 1
    np.testing.assert_allclose(ours(tokens, mask).logits[real], want[real], atol=1e-4)
    prompts = [row[:n] for row, n in zip(tokens, mask.sum(1), strict=True)]
    got = generate(ours, prompts, max_new_tokens=answers.shape[1], stop_tokens=())
    np.testing.assert_array_equal(got, answers)


def test_judge_writes_what_transformers_writes(tmp_path):
    """The random model's words on the judge's own prompts, token by token; they are no verdict."""
    folder = write_guard(tmp_path, build(text_config("empty list"), 0))
    theirs = their_text_model(folder)
    judge = LlamaGuardJudge(load_pretrained(folder), max_new_tokens=8)
    prompts = guard_prompts(judge.model.tokenizer, SAMPLES, ANSWERS)
    got = generate(judge.model, prompts, max_new_tokens=8, stop_tokens=())
    for prompt, words in zip(prompts, got, strict=True):
        ids = torch.tensor(prompt[None], dtype=torch.long)
        wanted = theirs.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert words == wanted[0, len(prompt) :].tolist()
    assert judge.find(SAMPLES, ANSWERS) == [Finding(None)] * 3


@pytest.mark.parametrize(
    ("words", "finding"), [("safe", Finding(False)), ("unsafe\nS1", Finding(True, "S1"))]
)
def test_judge_reads_a_verdict(tmp_path, words, finding):
    """A text model by hand, whose last token alone decides the next: it writes the words and stops."""
    tokenizer = AutoTokenizer.from_pretrained(
        train_tokenizer(CORPUS, tmp_path / "tokenizer", vocab_size=VOCABULARY)
    )
    first, last = tokenizer.convert_tokens_to_ids(["<|assistant|>", EOS])
    spoken = [first, *tokenizer(words, add_special_tokens=False)["input_ids"], last]
    assert len(set(spoken)) == len(spoken), "a token that comes twice cannot decide what follows it"
    text = build(text_config("empty list", hidden_size=VOCABULARY), 0)
    with torch.no_grad():
        for layer in text.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.feed_forward.down_proj.weight.zero_()
        text.model.norm.weight.fill_(1.0)
        text.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY))
        text.lm_head.weight.zero_()
        text.lm_head.weight[spoken[1:], spoken[:-1]] = 1.0
    judge = LlamaGuardJudge(load_pretrained(write_guard(tmp_path / "guard", text)), batch_size=2)
    assert judge.find(SAMPLES, ANSWERS) == [finding] * 3
