"""OLMoE's config.json: both spellings, both directions, every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.families import FAMILIES, family_of
from safemoe_jax.families.olmoe import read_config, write_config

# The fields of the published allenai/OLMoE-1B-7B-0125 config.
PUBLISHED = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 50304,
}


def test_published_config():
    config = read_config(PUBLISHED)
    sizes = (config.d_model, config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim)
    assert sizes == (2048, 16, 16, 16, 128)
    assert (config.n_experts, config.top_k, config.expert_dim, config.vocab_size) == (64, 8, 1024, 50304)
    assert config.norm_eps == 1e-5 and config.rope.theta == 10000.0 and config.qk_norm == "full"
    assert config.clip_qkv is None and not config.norm_topk_prob and not config.tie_embeddings
    assert config.router_aux_coef == 0.01 and config.moe_layers == tuple(range(16))


def test_config_goes_out_as_published():
    written = write_config(read_config(PUBLISHED))
    assert written == {key: PUBLISHED[key] for key in written}


@pytest.mark.parametrize("name", ["mha", "gqa_clip", "tied_bias", "fused", "sharded"])
def test_out_and_in_again(name):
    path = Path(__file__).resolve().parent.parent / "references" / name / "config.json"
    config = read_config(json.loads(path.read_text()))
    assert read_config(write_config(config)) == config


def test_both_spellings_of_the_rotary_base():
    plain = read_config({**PUBLISHED, "rope_theta": 500.0})
    nested = {k: v for k, v in PUBLISHED.items() if not k.startswith("rope")}
    nested["rope_parameters"] = {"rope_theta": 500.0, "rope_type": "default"}
    assert read_config(nested) == plain and plain.rope.theta == 500.0


def test_other_names_and_absent_fields():
    renamed = {**PUBLISHED, "num_local_experts": 64}
    del renamed["num_experts"], renamed["num_key_value_heads"]
    assert read_config(renamed) == read_config(PUBLISHED)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", 2047),
        ("hidden_size", "2048"),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", True),
        ("num_key_value_heads", 3),
        ("num_experts_per_tok", 65),
        ("rms_norm_eps", None),
        ("hidden_act", "gelu"),
        ("norm_topk_prob", 1),
        ("clip_qkv", "8"),
    ],
)
def test_wrong_field(field, value):
    with pytest.raises(InputError) as error:
        read_config({**PUBLISHED, field: value})
    assert f"'{field}'" in error.value.what and error.value.expected


def test_rotary_embedding_of_an_unknown_type_is_refused():
    with pytest.raises(InputError, match="'dynamic'"):
        read_config({**PUBLISHED, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}})


@pytest.mark.parametrize("model_type", [None, "bert", 3, ["olmoe"]])
def test_unknown_family(model_type):
    with pytest.raises(InputError, match="unknown model_type"):
        family_of(model_type)


def test_registry_goes_by_model_type():
    assert family_of("olmoe").read_config is read_config
    assert all(family.model_type == name for name, family in FAMILIES.items())
