"""Llama 4's config.json: the published fields, the nested layout, both directions, every refusal."""

from __future__ import annotations

import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.families import family_of
from safemoe_jax.families.llama4 import read_config, write_config
from safemoe_jax.models.config import LayerConfig, Segment

# The text model's fields of the published meta-llama/Llama-4-Scout-17B-16E config.
SCOUT = {
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attention_dropout": 0.0,
    "attn_scale": 0.1,
    "attn_temperature_tuning": True,
    "bos_token_id": 200000,
    "floor_scale": 8192,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 10485760,
    "model_type": "llama4_text",
    "moe_layers": list(range(48)),
    "no_rope_layers": [1, 1, 1, 0] * 12,
    "num_attention_heads": 40,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 16.0,
        "high_freq_factor": 1.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "tie_word_embeddings": False,
    "use_qk_norm": True,
    "vocab_size": 202048,
}
HUB = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "model_type": "llama4",
    "text_config": SCOUT,
    "vision_config": {"hidden_size": 1408, "model_type": "llama4_vision_model"},
}


def test_published_config():
    config = read_config(HUB)
    sizes = (config.d_model, config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim)
    assert sizes == (5120, 48, 40, 8, 128)
    assert (config.n_experts, config.top_k, config.expert_dim, config.vocab_size) == (16, 1, 8192, 202048)
    assert config.shared_dim == 8192 and not config.shared_gate and config.routing.kind == "sigmoid_input"
    rotated, nope = LayerConfig(chunk=8192), LayerConfig(rope=False, temperature=True)
    assert config.layers == (rotated, rotated, rotated, nope) * 12
    assert config.qk_norm == "l2_after_rope" and config.query_temperature == (0.1, 8192.0)
    assert not config.attention_bias and not config.output_bias and not config.tie_embeddings
    rope = config.rope
    assert (rope.kind, rope.theta, rope.factor, rope.interleaved) == ("llama3", 500000.0, 16.0, True)
    assert (rope.low_freq_factor, rope.high_freq_factor, rope.original_max_positions) == (1.0, 1.0, 8192)


def test_out_and_in_again():
    config = read_config(HUB)
    written = write_config(config)
    assert read_config(written) == config == read_config(SCOUT) and config.family == "llama4_text"
    same = {k: v for k, v in written.items() if k not in ("architectures", "layer_types")}
    assert same == {k: SCOUT[k] for k in same}


def test_both_names_are_one_family():
    assert family_of("llama4").read_config is family_of("llama4_text").read_config is read_config
    assert family_of("llama4").table is family_of("llama4_text").table


def test_layers_from_the_intervals():
    """Maverick: every second layer has experts, from the second one on."""
    silent = {k: v for k, v in SCOUT.items() if k != "moe_layers"}
    config = read_config({**silent, "no_rope_layers": [], "interleave_moe_layer_step": 2})
    assert config.segments == (Segment(("dense", "moe"), 24, 0),) and config.moe_layers[:2] == (1, 3)
    assert config.layers[3] == LayerConfig(rope=False, temperature=True) and config.dense_dim == 16384
    written = write_config(config)
    assert read_config(written) == config and written["interleave_moe_layer_step"] == 2


@pytest.mark.parametrize("experts", [0, 16, None])
def test_dense_model(experts):
    """Llama Guard 4: no layer has experts, whatever the fields about experts say."""
    raw = {**SCOUT, "moe_layers": [], "num_local_experts": experts, "num_experts_per_tok": 1}
    config = read_config({**HUB, "text_config": raw})
    assert (config.n_experts, config.top_k, config.expert_dim, config.shared_dim) == (0, 0, 0, 0)
    assert config.segments == (Segment(("dense",), 48, 0),) and config.dense_dim == 16384
    assert read_config(write_config(config)) == config


def test_switches():
    """Layer kinds of their own, no tuning (and an early export's number for it), no norm of q and k."""
    other = {"layer_types": ["full_attention", "chunked_attention"] * 24, "attn_temperature_tuning": False}
    config = read_config({**SCOUT, **other, "use_qk_norm": False, "attention_bias": True})
    assert config.layers[:4] == (
        LayerConfig(), LayerConfig(chunk=8192), LayerConfig(), LayerConfig(chunk=8192, rope=False),
    )  # fmt: skip
    assert config.qk_norm == "none" and config.attention_bias and config.output_bias
    assert read_config(write_config(config)) == config
    assert read_config({**SCOUT, "attn_temperature_tuning": 4}) == read_config(SCOUT)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", None),
        ("num_hidden_layers", 0),
        ("num_key_value_heads", 7),
        ("num_experts_per_tok", 17),
        ("num_local_experts", 0),
        ("intermediate_size_mlp", None),
        ("rms_norm_eps", None),
        ("hidden_act", "gelu"),
        ("attention_chunk_size", 0),
        ("floor_scale", 0),
        ("moe_layers", [48]),
        ("moe_layers", 3),
        ("no_rope_layers", [1, 1, 1, 0]),
        ("no_rope_layers", [2] * 48),
        ("layer_types", ["sliding_attention"] * 48),
        ("attn_temperature_tuning", "yes"),
    ],
)
def test_wrong_field(field, value):
    with pytest.raises(InputError) as error:
        read_config({**HUB, "text_config": {**SCOUT, field: value}})
    assert f"'{field}'" in error.value.what and error.value.expected


def test_negative_step_and_wrong_nesting():
    with pytest.raises(InputError, match="'interleave_moe_layer_step'"):
        read_config({**SCOUT, "moe_layers": None, "interleave_moe_layer_step": -1})
    with pytest.raises(InputError, match="'text_config'"):
        read_config({**HUB, "text_config": "nested"})
