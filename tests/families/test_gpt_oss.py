"""gpt-oss's config.json: the published fields, both directions, every refusal."""

from __future__ import annotations

import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.families.gpt_oss import read_config, write_config
from safemoe_jax.models.config import LayerConfig

# The fields of the published openai/gpt-oss-20b config.
PUBLISHED = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201088,
}


def test_published_config():
    config = read_config(PUBLISHED)
    sizes = (config.d_model, config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim)
    assert sizes == (2880, 24, 64, 8, 64)
    assert (config.n_experts, config.top_k, config.expert_dim, config.vocab_size) == (32, 4, 2880, 201088)
    assert config.layers == (LayerConfig(window=128), LayerConfig(window=0)) * 12
    assert config.norm == "rms_float32" and config.norm_eps == 1e-5 and config.router_aux_coef == 0.9
    assert config.sinks and config.attention_bias and config.output_bias and config.expert_bias
    assert config.routing.kind == "softmax_chosen" and config.routing.bias and config.activation == "clamped"
    rope = config.rope
    assert (rope.kind, rope.theta, rope.factor, rope.original_max_positions) == ("yarn", 150000.0, 32.0, 4096)
    assert not rope.truncate and not rope.interleaved and rope.attention_factor is None


def test_out_and_in_again():
    """Without the quantisation: what is written is bfloat16 or float32."""
    config = read_config(PUBLISHED)
    written = write_config(config)
    assert read_config(written) == config and "quantization_config" not in written
    assert {k: v for k, v in written.items() if k != "swiglu_alpha"} == {
        k: PUBLISHED[k] for k in written if k != "swiglu_alpha"
    }


def test_layers_alternate_where_the_config_does_not_say():
    silent = {k: v for k, v in PUBLISHED.items() if k != "layer_types"}
    assert read_config(silent) == read_config(PUBLISHED)
    full = read_config({**PUBLISHED, "layer_types": ["full_attention"] * 24})
    assert full.layers == (LayerConfig(),) * 24 and read_config(write_config(full)) == full


def test_rope_parameters_of_transformers_5():
    nested = {k: v for k, v in PUBLISHED.items() if not k.startswith("rope")}
    nested["rope_parameters"] = {**PUBLISHED["rope_scaling"], "rope_theta": 150000}
    assert read_config(nested) == read_config(PUBLISHED)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", None),
        ("num_hidden_layers", 0),
        ("num_key_value_heads", 7),
        ("num_experts_per_tok", 33),
        ("rms_norm_eps", None),
        ("hidden_act", "gelu"),
        ("swiglu_limit", 0.0),
        ("swiglu_alpha", "1.702"),
        ("sliding_window", 0),
        ("layer_types", ["sliding_attention"] * 23),
        ("layer_types", ["chunked_attention"] * 24),
        ("layer_types", "full_attention"),
        ("attention_bias", "yes"),
        ("quantization_config", {"quant_method": "gptq"}),
    ],
)
def test_wrong_field(field, value):
    with pytest.raises(InputError) as error:
        read_config({**PUBLISHED, field: value})
    assert f"'{field}'" in error.value.what and error.value.expected
