"""Phi-3.5-MoE's config.json: the published fields, both directions, every refusal."""

from __future__ import annotations

import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.families.phimoe import read_config, write_config
from safemoe_jax.models.config import LayerConfig

# The fields of the published microsoft/Phi-3.5-MoE-instruct config; the factors stand for its 64 each.
PUBLISHED = {
    "architectures": ["PhimoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "input_jitter_noise": 0.01,
    "intermediate_size": 6400,
    "lm_head_bias": True,
    "max_position_embeddings": 131072,
    "model_type": "phimoe",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "original_max_position_embeddings": 4096,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": [1.0 + i / 2 for i in range(64)],
        "long_mscale": 1.243163121016122,
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0 + i / 64 for i in range(64)],
        "short_mscale": 1.243163121016122,
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.0,
    "router_jitter_noise": 0.01,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32064,
}


def test_published_config():
    config = read_config(PUBLISHED)
    sizes = (config.d_model, config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim)
    assert sizes == (4096, 32, 32, 8, 128)
    assert (config.n_experts, config.top_k, config.expert_dim, config.vocab_size) == (16, 2, 6400, 32064)
    assert config.norm == "layer" and config.norm_eps == 1e-5
    assert config.attention_bias and config.output_bias and config.lm_head_bias
    assert config.routing.kind == "sparsemixer" and config.routing.jitter == 0.01
    assert config.layers == (LayerConfig(window=131072),) * 32
    rope = config.rope
    assert (rope.kind, rope.theta, rope.original_max_positions) == ("longrope", 10000.0, 4096)
    assert rope.short_mscale == rope.long_mscale == 1.243163121016122
    assert rope.short_factor[1] == 1 + 1 / 64 and rope.long_factor[1] == 1.5 and len(rope.long_factor) == 64


def test_out_and_in_again():
    config = read_config(PUBLISHED)
    written = write_config(config)
    assert read_config(written) == config
    same = {k: v for k, v in written.items() if k != "rope_scaling"}
    assert same == {k: PUBLISHED[k] for k in same}
    scaling = {k: v for k, v in written["rope_scaling"].items() if k not in ("rope_type", "factor")}
    assert scaling == {k: PUBLISHED["rope_scaling"][k] for k in scaling} and len(scaling) == 5
    assert written["rope_scaling"]["factor"] == 32


def test_plain_rotary_embedding_and_no_window():
    plain = read_config({**PUBLISHED, "rope_scaling": None, "sliding_window": None})
    assert plain.rope.kind == "default" and plain.layers[0].window == 0
    assert read_config(write_config(plain)) == plain


def test_rope_parameters_of_transformers_5():
    nested = {k: v for k, v in PUBLISHED.items() if not k.startswith("rope")}
    nested["rope_parameters"] = {**PUBLISHED["rope_scaling"], "rope_theta": 10000.0, "rope_type": "longrope"}
    assert read_config(nested) == read_config(PUBLISHED)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", 4095),
        ("num_hidden_layers", 0),
        ("num_key_value_heads", 7),
        ("num_experts_per_tok", 3),
        ("num_local_experts", 0),
        ("rms_norm_eps", None),
        ("hidden_act", "gelu"),
        ("sliding_window", 0),
        ("router_jitter_noise", -0.01),
        ("lm_head_bias", 1),
    ],
)
def test_wrong_field(field, value):
    with pytest.raises(InputError) as error:
        read_config({**PUBLISHED, field: value})
    assert f"'{field}'" in error.value.what and error.value.expected


@pytest.mark.parametrize("field", ["short_mscale", "long_mscale", "short_factor"])
def test_scaling_without_its_fields(field):
    scaling = {k: v for k, v in PUBLISHED["rope_scaling"].items() if k != field}
    with pytest.raises(InputError, match=f"'.*{field}'"):
        read_config({**PUBLISHED, "rope_scaling": scaling})
