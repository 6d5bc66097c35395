"""Fields of config.json that families share: rotary embeddings of every kind, kinds of layer, windows."""

from __future__ import annotations

import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.families.config_fields import (
    first_dense_kinds,
    layer_types,
    make_layers,
    read_rope,
    sparse_step_kinds,
    text_fields,
    write_rope,
)
from safemoe_jax.models import LayerConfig
from safemoe_jax.models.config import RopeConfig

YARN = {"factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"short_factor": [1.0, 1.5], "long_factor": [2, 3.5], "short_mscale": 1.24, "long_mscale": 1.3}
ORIGINAL = {"original_max_position_embeddings": 4096}
KINDS = {
    "linear": ({"factor": 2.0}, RopeConfig(5e5, kind="linear", factor=2.0)),
    "yarn": (
        YARN | ORIGINAL | {"truncate": False},
        RopeConfig(5e5, kind="yarn", factor=40.0, original_max_positions=4096, mscale=0.707,
                   mscale_all_dim=0.707, truncate=False),
    ),
    "llama3": (
        LLAMA3 | ORIGINAL,
        RopeConfig(5e5, kind="llama3", factor=8.0, original_max_positions=4096, low_freq_factor=1.0,
                   high_freq_factor=4.0),
    ),
    "longrope": (
        LONG | ORIGINAL,
        RopeConfig(5e5, kind="longrope", factor=32.0, original_max_positions=4096, short_factor=(1.0, 1.5),
                   long_factor=(2.0, 3.5), short_mscale=1.24, long_mscale=1.3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", ["hub", "hub_old", "transformers"])
def test_rotary_embedding_of_every_kind(kind, spelling):
    fields, want = KINDS[kind]
    raw = {"max_position_embeddings": 131072}
    if spelling == "transformers":
        raw["rope_parameters"] = {**fields, "rope_type": kind, "rope_theta": 500000}
    else:
        type_ = {"rope_type": kind} if spelling == "hub" else {"type": "su" if kind == "longrope" else kind}
        raw |= {"rope_theta": 500000, "rope_scaling": {**fields, **type_}}
    rope = read_rope(raw)
    assert rope == want
    assert read_rope(write_rope(rope) | {"max_position_embeddings": 1}) == rope


def test_the_longest_sequence_before_the_extension():
    """A number beside the nested ones wins (phimoe), the model's longest sequence stands in for none."""
    raw = {"max_position_embeddings": 100, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    assert read_rope(raw).original_max_positions == 100
    assert read_rope({**raw, **ORIGINAL}).original_max_positions == 4096
    nested = {**raw, "rope_scaling": {**raw["rope_scaling"], "original_max_position_embeddings": 50}}
    assert read_rope(nested).original_max_positions == 50


def test_share_of_a_head_that_is_rotated():
    raw = {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    rope = read_rope(raw, head_dim=16, interleaved=True)
    assert rope == RopeConfig(1e4, dim=8, interleaved=True)
    assert write_rope(rope, head_dim=16)["partial_rotary_factor"] == 0.5
    nested = {"rope_parameters": {**raw, "rope_type": "default"}}
    assert read_rope(nested, head_dim=16, interleaved=True) == rope
    assert read_rope({}, 77.0) == RopeConfig(77.0)


@pytest.mark.parametrize(
    ("scaling", "word"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic'"),
        ({"rope_type": "linear"}, "'factor'"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}, "'high_freq_factor'"),
        ({"rope_type": "longrope", "factor": 2.0}, "'short_factor'"),
        ({"rope_type": "longrope", "factor": 2.0, "short_factor": ["1"]}, "'short_factor'"),
        ({"rope_type": "yarn", "factor": "2"}, "'factor'"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "'truncate'"),
        (["yarn"], "'rope_scaling'"),
    ],
)
def test_wrong_scaling(scaling, word):
    with pytest.raises(InputError) as error:
        read_rope({"rope_theta": 1e4, "rope_scaling": scaling, "max_position_embeddings": 64})
    assert word in error.value.what and error.value.where == "config.json"


def test_kinds_of_layer():
    raw = {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert sparse_step_kinds(raw, 6) == ("dense", "moe", "dense", "dense", "dense", "moe")
    assert sparse_step_kinds({}, 2) == ("moe", "moe")
    assert first_dense_kinds({"first_k_dense_replace": 1}, 3) == ("dense", "moe", "moe")
    for wrong in ({"mlp_only_layers": ["1"]}, {"mlp_only_layers": 3}, {"decoder_sparse_step": 0}):
        with pytest.raises(InputError):
            sparse_step_kinds(wrong, 2)
    with pytest.raises(InputError, match="'first_k_dense_replace' is -1"):
        first_dense_kinds({"first_k_dense_replace": -1}, 2)


def test_windows_and_chunks():
    types = layer_types({"layer_types": ["sliding_attention", "full_attention", "chunked_attention"]}, 3, ())
    layers = make_layers(("moe", "dense", "moe"), types, window=4, chunk=8)
    assert layers == (LayerConfig(window=4), LayerConfig("dense"), LayerConfig(chunk=8))
    assert layer_types({}, 1, ["full_attention"]) == ("full_attention",)
    for wrong in (["full_attention"], ["full_attention", "linear_attention"], "full_attention"):
        with pytest.raises(InputError, match="'layer_types'"):
            layer_types({"layer_types": wrong}, 2, ())


def test_nested_text_model():
    assert text_fields({"text_config": {"a": 1}}) == {"a": 1} and text_fields({"a": 1}) == {"a": 1}
    with pytest.raises(InputError, match="'text_config'"):
        text_fields({"text_config": "llama"})
