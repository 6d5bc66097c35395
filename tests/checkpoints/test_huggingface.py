"""Checkpoint folders against files that transformers wrote (tests/make_references.py), and wrong ones."""

from __future__ import annotations

import json
import resource
import shutil
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

from safemoe_jax.checkpoints.huggingface import list_checkpoint, load_params, read_config
from safemoe_jax.errors import InputError
from safemoe_jax.evaluation.generate import generate
from safemoe_jax.model import Model, load_pretrained
from safemoe_jax.models import ModelConfig, declare, initialise
from safemoe_jax.models.router import choose_experts
from tests.tiny_tokenizer import train_tokenizer

VARIANTS = ("mha", "gqa_clip", "tied_bias", "fused", "sharded")
EXPERT = "model.layers.1.mlp.experts.4.up_proj.weight"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
QUERY = "model.layers.0.self_attn.q_proj.weight"


def answer_loss(logits, tokens, answer_mask):
    """Mean cross-entropy of the answer tokens, each predicted from the position before it."""
    log_probs = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    chosen = np.take_along_axis(np.asarray(log_probs), tokens[:, 1:, None], axis=-1)[..., 0]
    return -(chosen * answer_mask[:, 1:]).sum() / answer_mask[:, 1:].sum()


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_as_transformers(references, variant):
    want = load_file(references / variant / "expected.safetensors")
    model = load_pretrained(references / variant)
    out = model(want["tokens"], want["attention_mask"])
    real = want["attention_mask"].astype(bool)
    np.testing.assert_allclose(out.logits[real], want["logits"][real], atol=1e-4)
    np.testing.assert_allclose(out.router_logits[:, real], want["router_logits"][:, real], atol=1e-4)
    weights, experts = choose_experts(out.router_logits, model.config)
    np.testing.assert_array_equal(experts[:, real], want["experts"][:, real])
    np.testing.assert_allclose(weights[:, real], want["combine_weights"][:, real], atol=1e-5)
    loss = answer_loss(out.logits, want["tokens"], want["answer_mask"])
    np.testing.assert_allclose(loss, want["loss"][0], atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_greedy_tokens(references, variant):
    want = load_file(references / variant / "expected.safetensors")
    lengths = want["attention_mask"].sum(axis=1)
    prompts = [row[:length] for row, length in zip(want["tokens"], lengths, strict=True)]
    answers = generate(load_pretrained(references / variant), prompts, max_new_tokens=32, stop_tokens=())
    np.testing.assert_array_equal(answers, want["greedy"])


@pytest.mark.parametrize("variant", ["mha", "tied_bias"])
def test_saved_tensors_are_those_that_transformers_wrote(references, tmp_path, variant):
    load_pretrained(references / variant).save_pretrained(tmp_path / "saved")
    want, got = (load_file(f / "model.safetensors") for f in (references / variant, tmp_path / "saved"))
    assert set(got) == set(want)
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array)


def test_saving_the_fused_layout_writes_the_published_one(references, tmp_path):
    load_pretrained(references / "fused").save_pretrained(tmp_path / "saved")
    fused = load_file(references / "fused" / "model.safetensors")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    gate_up = fused["model.layers.1.mlp.experts.gate_up_proj"][3]
    stem = "model.layers.1.mlp.experts.3"
    np.testing.assert_array_equal(saved[f"{stem}.gate_proj.weight"], gate_up[:12])
    np.testing.assert_array_equal(saved[f"{stem}.up_proj.weight"], gate_up[12:])
    down = fused["model.layers.1.mlp.experts.down_proj"][3]
    np.testing.assert_array_equal(saved[f"{stem}.down_proj.weight"], down)


def test_saving_in_shards(references, tmp_path):
    model = load_pretrained(references / "sharded")
    model.save_pretrained(tmp_path / "saved", max_file_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert all((tmp_path / "saved" / name).stat().st_size < 25_000 for name in files) and len(files) > 3
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    want = json.loads((references / "sharded" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(want["weight_map"])
    assert index["metadata"]["total_size"] == want["metadata"]["total_size"]
    again = load_pretrained(tmp_path / "saved")
    for name, value in model.params.items():
        np.testing.assert_array_equal(again.params[name], value)


def test_config_json_keeps_what_the_network_does_not_need(mha, tmp_path):
    fields = json.loads((mha / "config.json").read_text())
    (mha / "config.json").write_text(json.dumps({**fields, "bos_token_id": 7, "use_cache": False}))
    load_pretrained(mha).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["bos_token_id"] == 7 and saved["use_cache"] is False and saved["torch_dtype"] == "float32"
    assert read_config(tmp_path / "saved")[0] == read_config(mha)[0]


def test_bfloat16_stays_and_is_rounded_as_numpy_rounds(mha, tmp_path, rewrite):
    exact = load_pretrained(mha)

    def round_all(arrays):
        arrays.update({name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()})

    rewrite(mha / "model.safetensors", round_all)
    model = load_pretrained(mha)
    assert model.compute.dtype == "bfloat16"
    assert {str(value.dtype) for value in model.params.values()} == {"bfloat16"}
    for name, value in model.params.items():
        want = np.asarray(exact.params[name]).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(np.asarray(value), want)
    model.save_pretrained(tmp_path / "saved")
    got, want = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", mha))
    assert all(got[name].dtype == ml_dtypes.bfloat16 and (got[name] == want[name]).all() for name in want)
    assert load_pretrained(mha, dtype="float32").params["embed.embedding"].dtype == jnp.float32


def test_a_model_made_here_loads_again(tmp_path):
    config = ModelConfig(
        family="olmoe", vocab_size=20, d_model=8, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4,
        norm_eps=1e-5, n_experts=3, top_k=2, expert_dim=4, qk_norm="full", tie_embeddings=True, clip_qkv=3.0,
    )  # fmt: skip
    params = initialise(declare(config), jax.random.key(0))
    train_tokenizer(["some text", "more text"], tmp_path / "tokenizer", vocab_size=300)
    model = Model(config, params, path=tmp_path / "tokenizer")
    model.save_pretrained(tmp_path / "saved")
    again = load_pretrained(tmp_path / "saved")
    assert again.config == config
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert again.tokenizer.chat_template == model.tokenizer.chat_template
    for name, value in params.items():
        np.testing.assert_array_equal(again.params[name], value)


@pytest.mark.parametrize("tokenizer", [False, True])
def test_a_model_made_here_has_its_own_special_tokens_or_none(tmp_path, tokenizer, caplog):
    """An absent field would be the family's default: OLMoE's end token is 50279."""
    config = ModelConfig(
        family="olmoe", vocab_size=300, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4,
        norm_eps=1e-5, n_experts=3, top_k=2, expert_dim=4, qk_norm="full",
    )  # fmt: skip
    model = Model(config, initialise(declare(config), jax.random.key(0)))
    if tokenizer:
        train_tokenizer(["some text", "more text"], tmp_path / "tokenizer", vocab_size=300)
        model.path = tmp_path / "tokenizer"
    model.save_pretrained(tmp_path / "saved")
    want = {name: getattr(model.tokenizer, name) if tokenizer else None for name in SPECIAL_IDS}
    assert not tokenizer or want["eos_token_id"] is not None
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {name: fields[name] for name in SPECIAL_IDS} == want
    with caplog.at_level("WARNING", logger="transformers"):
        theirs = AutoConfig.from_pretrained(tmp_path / "saved")
    assert {name: getattr(theirs, name) for name in SPECIAL_IDS} == want
    assert "token_id" not in caplog.text


def test_tokenizer_is_read_on_first_use(mha):
    model = load_pretrained(mha)
    with pytest.raises(InputError, match="no tokenizer"):
        _ = model.tokenizer
    (mha / "tokenizer.json").write_text("{ broken")
    with pytest.raises(InputError, match="tokenizer cannot be read"):
        _ = load_pretrained(mha).tokenizer


def test_hub_id_is_fetched_only_where_no_folder_is(mha, monkeypatch):
    fetched = []

    def snapshot_download(name, **options):
        fetched.append((name, options["allow_patterns"]))
        return str(mha)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_pretrained("somebody/model").name == "somebody/model"
    load_pretrained(mha)
    assert [name for name, _ in fetched] == ["somebody/model"]
    assert not any("bin" in pattern or pattern == "*" for pattern in fetched[0][1])


def test_hub_id_that_cannot_be_reached():
    with pytest.raises(InputError) as error:
        load_pretrained("nobody-at-all/no-such-model")
    assert error.value.where == "nobody-at-all/no-such-model"


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "nothing", "a/b/c"])
def test_missing_folder(name):
    with pytest.raises(InputError, match="no such folder"):
        load_pretrained(name)


def refused(folder, *words):
    """Asserts that loading names each of the words and leaves the folder as it is."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError) as error:
        load_pretrained(folder)
    for word in words:
        assert word in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_unmapped_tensor(mha, rewrite):
    rewrite(mha / "model.safetensors", lambda a: a.update({"model.layers.9.x": np.zeros(3, np.float32)}))
    refused(mha, "'model.layers.9.x' maps to no parameter")


def test_expert_beyond_the_config(mha, rewrite):
    name = "model.layers.0.mlp.experts.6.up_proj.weight"
    rewrite(mha / "model.safetensors", lambda a: a.update({name: np.zeros((12, 16), np.float32)}))
    refused(mha, name, "maps to no parameter")


def test_old_rotary_buffers_are_ignored(mha, rewrite):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(mha / "model.safetensors", lambda a: a.update({name: np.zeros(2, np.float32)}))
    assert load_pretrained(mha).config.n_layers == 2


@pytest.mark.parametrize("name", [EXPERT, QUERY, "lm_head.weight", "model.norm.weight"])
def test_missing_tensor(mha, rewrite, name):
    rewrite(mha / "model.safetensors", lambda a: a.pop(name))
    refused(mha, f"'{name}' is missing")


@pytest.mark.parametrize("name", [EXPERT, QUERY])
def test_wrong_shape(mha, rewrite, name):
    rewrite(mha / "model.safetensors", lambda a: a.update({name: a[name][:-1].copy()}))
    refused(mha, f"'{name}' has shape", "expected: shape [")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", [EXPERT, QUERY, "model.embed_tokens.weight"])
def test_not_finite(mha, rewrite, name, value):
    rewrite(mha / "model.safetensors", lambda a: a[name].__setitem__((-1, -1), value))
    refused(mha, f"'{name}' holds NaN or infinite values")


def test_two_layouts_of_one_parameter(mha, rewrite):
    fused = np.zeros((6, 16, 12), np.float32)
    name = "model.layers.0.mlp.experts.down_proj"
    rewrite(mha / "model.safetensors", lambda a: a.update({name: fused}))
    refused(mha, "duplicate", f"'{name}'", "'model.layers.0.mlp.experts.0.down_proj.weight'")


def test_one_tensor_in_two_files(references, tmp_path, rewrite):
    folder = shutil.copytree(references / "sharded", tmp_path / "model")
    files = sorted(folder.glob("model-*.safetensors"))
    name = next(iter(load_file(files[0])))
    rewrite(files[-2], lambda a: a.update({name: load_file(files[0])[name]}))
    refused(folder, "duplicate", name, files[0].name, files[-2].name)


def test_missing_shard(references, tmp_path):
    folder = shutil.copytree(
        references / "sharded", tmp_path / "model", ignore=lambda *_: ["expected.safetensors"]
    )
    lost = sorted(folder.glob("model-*.safetensors"))[2]
    lost.unlink()
    refused(folder, "file not found", lost.name)


@pytest.mark.parametrize("file", [3, None, ["a"], "", ".", "..", "../a.safetensors", "/a.safetensors", "b/a"])
def test_an_index_names_files_of_its_folder(references, tmp_path, file):
    folder = shutil.copytree(
        references / "sharded", tmp_path / "model", ignore=lambda *_: ["expected.safetensors"]
    )
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][QUERY] = file
    path.write_text(json.dumps(index))
    refused(folder, f"'{QUERY}' is in {file!r}", str(path), "the name of a file in this folder")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(mha, keep):
    path = mha / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(mha, "not a whole safetensors file", str(path), "truncated")


def test_pickles_are_refused(mha):
    (mha / "model.safetensors").unlink()
    (mha / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(mha, "pickle", "safetensors")


def test_no_weights(mha):
    (mha / "model.safetensors").unlink()
    refused(mha, "no weights", str(mha))


DEEP, DIGITS = "[" * 100_000, '{"model_type": ' + "1" * 4301 + "}"


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", DEEP, DIGITS], ids=["empty", "cut", "list", "deep", "digits"]
)
def test_malformed_config(mha, text):
    (mha / "config.json").write_text(text)
    refused(mha, "config.json")


def test_no_config(mha):
    (mha / "config.json").unlink()
    refused(mha, "config.json is missing")


def test_unknown_family(mha):
    (mha / "config.json").write_text('{"model_type": "bert"}')
    refused(mha, "unknown model_type 'bert'", "olmoe", str(mha / "config.json"))


def test_adapter_folder_as_model(references):
    refused(references / "adapter_projections", "adapter, not a model")


def test_unsupported_dtype(mha):
    header = {"x": {"dtype": "F8_E5M2", "shape": [4], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    (mha / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    refused(mha, "'x' has dtype F8_E5M2")
    with pytest.raises(InputError, match="float16"):
        load_pretrained(mha, dtype="float16")


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint8])
@pytest.mark.parametrize("name", [EXPERT, "lm_head.weight"])
def test_integers_are_no_weights(mha, rewrite, name, dtype):
    """Codes of some quantisation, whose scales and order nothing here tells."""
    rewrite(mha / "model.safetensors", lambda a: a.update({name: a[name].astype(dtype)}))
    refused(mha, f"'{name}' holds integers ({np.dtype(dtype)})", "model.safetensors", "floats", "MXFP4")


@pytest.mark.parametrize(
    ("quantised", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "by a method without a name"),
        ("mxfp4", "by a method without a name"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_quantisation_that_is_not_read(mha, quantised, said, nested):
    fields = json.loads((mha / "config.json").read_text())
    described = {"quantization_config": quantised}
    fields |= {"text_config": described} if nested else described
    (mha / "config.json").write_text(json.dumps(fields))
    refused(
        mha, "weights are quantised by", said, str(mha / "config.json"), "quantization_config", "fp8", "mxfp4"
    )


@pytest.mark.parametrize("quantised", [None, {}, {"quant_method": "fp8", "weight_block_size": [128, 128]}])
def test_a_config_may_name_a_quantisation_that_is_read(mha, quantised):
    fields = json.loads((mha / "config.json").read_text())
    (mha / "config.json").write_text(json.dumps({**fields, "quantization_config": quantised}))
    assert load_pretrained(mha).config.n_layers == 2


def test_tied_model_with_its_own_output_projection(references, tmp_path, rewrite):
    folder = shutil.copytree(references / "tied_bias", tmp_path / "model")
    path = folder / "model.safetensors"
    rewrite(path, lambda a: a.update({"lm_head.weight": a["model.embed_tokens.weight"].copy()}))
    assert "lm_head.kernel" not in load_pretrained(folder).params
    rewrite(path, lambda a: a["lm_head.weight"].__setitem__((3, 4), 9.0))
    refused(folder, "lm_head.weight", "model.embed_tokens.weight")


def test_nothing_that_is_there_is_overwritten(mha, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious.txt").write_text("keep")
    with pytest.raises(InputError, match="already there"):
        load_pretrained(mha).save_pretrained(tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["precious.txt"]
    (tmp_path / "empty").mkdir()
    load_pretrained(mha).save_pretrained(tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_a_disk_that_refuses_leaves_nothing(mha, tmp_path):
    """The file size limit of the process stands for a full disk: a write fails in the middle of a file."""
    model = load_pretrained(mha)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(InputError, match="cannot write: File too large"):
            model.save_pretrained(tmp_path / "out" / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "out").iterdir()) == []


def test_large_tensors_are_read_in_blocks(mha, monkeypatch):
    """Blocks far smaller than a tensor give the same arrays."""
    config, _ = read_config(mha)
    whole = load_params(mha, config)
    monkeypatch.setattr("safemoe_jax.checkpoints.reading.BLOCK_BYTES", 200)
    monkeypatch.setattr("safemoe_jax.checkpoints.safetensors_files._PAGE", 8)
    for name, value in load_params(mha, config).items():
        np.testing.assert_array_equal(value, whole[name])


def test_loading_imports_no_torch_and_no_hub_client(mha, repository):
    program = (
        "import sys; from safemoe_jax.model import load_pretrained; load_pretrained(sys.argv[1]);"
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    arguments = [sys.executable, "-c", program, str(mha)]
    run = subprocess.run(arguments, cwd=repository, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "[]", run.stderr


def test_headers_alone_list_a_checkpoint(references):
    entries = list_checkpoint(references / "sharded")
    index = json.loads((references / "sharded" / "model.safetensors.index.json").read_text())
    assert {name: entry.path.name for name, entry in entries.items()} == index["weight_map"]


def test_half_precision_becomes_float32(mha):
    arrays = load_file(mha / "model.safetensors")
    save_file({k: v.astype(np.float16) for k, v in arrays.items()}, mha / "model.safetensors")
    model = load_pretrained(mha)
    assert model.compute.dtype == "float32"
    want = arrays["model.embed_tokens.weight"].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(model.params["embed.embedding"], want)
