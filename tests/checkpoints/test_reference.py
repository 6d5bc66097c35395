"""The reference file: round trip, precision and size against exact log-probabilities, refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from scipy.special import logsumexp

from safemoe_jax.checkpoints.reference import (
    CompactLogProbs,
    Reference,
    check_matches,
    fingerprint,
    hash_prompts,
    read_reference,
    tokenizer_fingerprint,
    write_reference,
)
from safemoe_jax.data.chat import load_tokenizer
from safemoe_jax.errors import InputError
from safemoe_jax.model import load_pretrained
from safemoe_jax.models import LoraConfig
from safemoe_jax.models.lora import add_adapters
from safemoe_jax.parallel.mesh import MeshConfig, make_mesh
from tests.tiny_tokenizer import train_tokenizer

PROMPTS = (np.array([4, 5, 6], np.int32), np.array([7], np.int32), np.array([8, 9], np.int32))


class Words:
    """What `tokenizer_fingerprint` asks a tokenizer for."""

    def __init__(self, words="abc", template="x"):
        self.vocabulary, self.chat_template = {word: i for i, word in enumerate(words)}, template
        self.special_tokens_map = {"eos_token": words[0]}

    def get_vocab(self):
        return self.vocabulary


def log_probs(rows, words, deviation=3.0, seed=0):
    logits = np.random.default_rng(seed).normal(0, deviation, (rows, words)).astype(np.float32)
    return (logits - logsumexp(logits.astype(np.float64), axis=1, keepdims=True)).astype(np.float32)


def reference(**changes):
    logits = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)
    return Reference(logits, PROMPTS, "model-hash", **changes)


def test_round_trip(tmp_path):
    written = reference(
        tokenizer_fingerprint="t",
        group=np.array([0, 1, 0], np.int8),
        model="some/model",
        chat_template="{{ messages }}",
        system_prompt="Be kind.",
        log_probs=CompactLogProbs.encode(log_probs(3, 50)),
    )
    write_reference(tmp_path / "r.safetensors", written)
    read = read_reference(tmp_path / "r.safetensors")
    np.testing.assert_array_equal(read.router_logits, written.router_logits)
    assert read.router_logits.dtype == np.float32
    for a, b in zip(read.prompts, PROMPTS, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(read.group, [0, 1, 0])
    for field in ("model_fingerprint", "tokenizer_fingerprint", "model", "chat_template", "system_prompt"):
        assert getattr(read, field) == getattr(written, field)
    np.testing.assert_array_equal(read.log_probs_SV(), written.log_probs_SV())


def test_without_log_probs(tmp_path):
    write_reference(tmp_path / "r.safetensors", reference())
    read = read_reference(tmp_path / "r.safetensors")
    np.testing.assert_array_equal(read.group, [0, 0, 0])
    with pytest.raises(InputError, match="no next-token log-probabilities"):
        read.log_probs_SV()


@pytest.mark.parametrize("deviation", [0.5, 3.0, 6.0])
def test_precision(deviation):
    """One step of the code, as the docstring states it, and a negligible divergence."""
    exact = log_probs(4, 20_000, deviation)
    stored = CompactLogProbs.encode(exact).decode()
    span = np.maximum(exact, -64.0)
    bound = np.ptp(span, axis=1, keepdims=True) / 65535
    assert (np.abs(stored - span) <= bound + 1e-5).all()
    divergence = (np.exp(exact.astype(np.float64)) * (exact.astype(np.float64) - stored)).sum(axis=1)
    assert np.abs(divergence).max() < 1e-6
    np.testing.assert_allclose(np.exp(stored.astype(np.float64)).sum(axis=1), 1, atol=2e-6)


def test_impossible_words_and_certainty():
    exact = np.array([[-np.inf, 0.0, -np.inf], [-200.0, -0.69314718, -0.69314718]], np.float32)
    stored = CompactLogProbs.encode(exact).decode()
    np.testing.assert_allclose(np.exp(stored), np.exp(exact), atol=1e-6)
    flat = CompactLogProbs.encode(np.full((1, 8), -np.log(8.0), np.float32)).decode()
    np.testing.assert_allclose(flat, -np.log(8.0), atol=1e-6)


def test_size_of_a_full_file(tmp_path):
    """150,000 words x 200 prompts, 16 layers of 64 experts: under 64 MB."""
    encoded = CompactLogProbs(
        np.zeros((200, 150_000), np.uint16), np.zeros(200, np.float32), np.ones(200, np.float32)
    )
    prompts = tuple(np.arange(60, dtype=np.int32) for _ in range(200))
    full = Reference(np.zeros((16, 200, 64), np.float32), prompts, "m" * 64, log_probs=encoded)
    write_reference(tmp_path / "r.safetensors", full)
    assert (tmp_path / "r.safetensors").stat().st_size < 64e6
    assert CompactLogProbs.encode(log_probs(2, 150_000)).codes_SV.dtype == np.uint16


def test_hash_tells_prompts_apart():
    same = hash_prompts([p.astype(np.int64) for p in PROMPTS])
    assert hash_prompts(PROMPTS) == same
    others = (PROMPTS[::-1], PROMPTS[:2], (np.array([4, 5]), np.array([6, 7]), np.array([8, 9])))
    assert len({same, *(hash_prompts(other) for other in others)}) == 4


def test_tokenizer_fingerprint():
    base = tokenizer_fingerprint(Words())
    assert tokenizer_fingerprint(Words()) == base
    assert base not in (tokenizer_fingerprint(Words("abd")), tokenizer_fingerprint(Words(template="y")))


def test_fingerprint_sees_every_element(references):
    model = load_pretrained(references / "mha")
    base = fingerprint(model.config, model.params)
    assert fingerprint(model.config, dict(reversed(model.params.items()))) == base
    for name, value in model.params.items():
        changed = np.array(value)
        changed.flat[-1] += 0.1
        assert fingerprint(model.config, {**model.params, name: jnp.asarray(changed)}) != base, name
    swapped = np.array(model.params["embed.embedding"])
    swapped[[3, 4]] = swapped[[4, 3]]
    assert fingerprint(model.config, {**model.params, "embed.embedding": jnp.asarray(swapped)}) != base
    assert fingerprint(replace(model.config, top_k=3), model.params) != base
    assert fingerprint(load_pretrained(references / "gqa_clip").config, model.params) != base


def test_fingerprint_is_the_same_in_another_type_on_a_mesh_and_under_a_fresh_adapter(references):
    model = load_pretrained(references / "mha")
    rounded = {k: jnp.asarray(np.asarray(v).astype(ml_dtypes.bfloat16)) for k, v in model.params.items()}
    widened = {k: v.astype(jnp.float32) for k, v in rounded.items()}
    base = fingerprint(model.config, model.params)
    assert fingerprint(model.config, rounded) == fingerprint(model.config, widened) == base
    meshed = load_pretrained(references / "mha", mesh=make_mesh(MeshConfig()))
    assert fingerprint(meshed.config, meshed.params) == base
    config, params = add_adapters(model.config, model.params, LoraConfig(rank=2), jax.random.key(0))
    assert fingerprint(config, params) == base
    name = next(name for name in params if name.endswith("lora_b"))
    assert fingerprint(config, {**params, name: params[name] + 0.1}) != base


def test_refuses_what_it_was_not_made_for(references):
    model = load_pretrained(references / "mha")
    made = reference(tokenizer_fingerprint=tokenizer_fingerprint(Words()))
    check_matches(made, config=model.config, model_fingerprint="model-hash", tokenizer=Words())
    wrong = [
        ("another model", dict(config=replace(model.config, n_experts=7))),
        ("another model", dict(config=load_pretrained(references / "sharded").config)),
        ("another model", dict(config=model.config, model_fingerprint="other")),
        ("another tokenizer", dict(config=model.config, tokenizer=Words("xyz"))),
    ]
    for words, arguments in wrong:
        with pytest.raises(InputError, match=words):
            check_matches(made, **arguments)


@pytest.mark.parametrize("change", ["lowercase", "merges", "eos"])
def test_every_part_of_a_tokenizer_counts(tmp_path, change):
    """Not only its vocabulary: what it makes of a text may change without it."""
    train_tokenizer(["Say one and two", "three or four"], tmp_path, vocab_size=300)
    whole = tokenizer_fingerprint(load_tokenizer(str(tmp_path)))
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) == whole
    name = "tokenizer_config.json" if change == "eos" else "tokenizer.json"
    fields = json.loads((tmp_path / name).read_text())
    if change == "lowercase":
        fields["normalizer"] = {"type": "Lowercase"}
    elif change == "merges":
        fields["model"]["merges"] = []
    else:
        fields["eos_token"] = "a"
    (tmp_path / name).write_text(json.dumps(fields))
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) != whole


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a, m: a.pop("group"), "without group"),
        (lambda a, m: m.pop("model"), "without model"),
        (lambda a, m: a.update(group=a["group"][:2]), "router_logits of 3 prompts"),
        (lambda a, m: a.update(router_logits=a["router_logits"][:, :2].copy()), "router_logits of 2 prompts"),
        (lambda a, m: a["router_logits"].__setitem__((0, 0, 0), np.nan), "NaN or infinite values"),
        (lambda a, m: a.pop("log_prob_step"), "only a part of the log-probabilities"),
        (lambda a, m: m.update(format="safemoe-reference-1"), "of another version"),
    ],
)
def test_files_that_somebody_changed(tmp_path, change, words):
    path = tmp_path / "r.safetensors"
    write_reference(path, reference(log_probs=CompactLogProbs.encode(log_probs(3, 50))))
    with safe_open(path, "numpy") as file:
        arrays, metadata = load_file(path), file.metadata()
    change(arrays, metadata)
    save_file(arrays, path, metadata)
    with pytest.raises(InputError, match=words):
        read_reference(path)


def test_unreadable_files(tmp_path, references):
    path = tmp_path / "r.safetensors"
    with pytest.raises(InputError, match="file not found"):
        read_reference(path)
    with pytest.raises(InputError, match="not a reference file"):
        read_reference(references / "mha" / "model.safetensors")
    write_reference(path, reference())
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(InputError, match="truncated"):
        read_reference(path)
    path.write_bytes(whole)
    arrays = load_file(path)
    arrays["prompt_tokens"] = arrays["prompt_tokens"] + 1
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    save_file(arrays, path, metadata)
    with pytest.raises(InputError, match="do not match their hash"):
        read_reference(path)
