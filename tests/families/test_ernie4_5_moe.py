"""ERNIE 4.5's config.json: the published fields, both directions, names on disk, every refusal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.families.ernie4_5_moe import TABLE, read_config, write_config
from safemoe_jax.families.tensor_table import left_out, published, resolve
from safemoe_jax.models import declare
from safemoe_jax.models.config import Segment

# The fields of the published baidu/ERNIE-4.5-21B-A3B-PT config.
PUBLISHED = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "model_type": "ernie4_5_moe",
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_layer_end_index": 27,
    "moe_layer_interval": 1,
    "moe_layer_start_index": 1,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "num_attention_heads": 20,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": True,
    "vocab_size": 103424,
}


def test_published_config():
    config, routing = read_config(PUBLISHED), read_config(PUBLISHED).routing
    sizes = (config.d_model, config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim)
    assert sizes == (2560, 28, 20, 4, 128)
    assert (config.n_experts, config.top_k, config.expert_dim, config.dense_dim) == (64, 6, 1536, 12288)
    assert config.shared_dim == 3072 and not config.shared_gate and config.tie_embeddings
    assert config.segments == (Segment(("dense",), 1, 0), Segment(("moe",), 27, 1))
    assert config.rope.interleaved and config.rope.theta == 500000.0
    assert (routing.kind, routing.correction_bias, routing.smallest_sum) == ("softmax", True, 1e-12)
    assert routing.float32_logits and not routing.float32_weights and config.norm_topk_prob
    assert not (config.attention_bias or config.output_bias or config.mlp_bias or config.lm_head_bias)


def test_config_goes_out_as_published():
    written = write_config(read_config(PUBLISHED))
    own = ("initializer_range", "moe_norm_min", "router_aux_loss_coef")
    assert {k: v for k, v in written.items() if k not in own} == {
        k: PUBLISHED[k] for k in written if k not in own
    }
    assert read_config(written) == read_config(PUBLISHED)


def test_what_is_absent_is_as_in_transformers():
    absent = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "moe_num_shared_experts")
    absent += ("tie_word_embeddings", "use_bias", "rope_theta")
    assert read_config({k: v for k, v in PUBLISHED.items() if k not in absent}) == read_config(PUBLISHED)


def test_layers_from_start_end_and_interval():
    raw = {**PUBLISHED, "num_hidden_layers": 9, "moe_layer_interval": 2, "moe_layer_start_index": 2}
    config = read_config({**raw, "moe_layer_end_index": 6})
    assert config.moe_layers == (3, 5) and read_config(write_config(config)) == config
    to_the_end = read_config({**raw, "moe_layer_end_index": -1})
    assert to_the_end.moe_layers == (3, 5, 7) and read_config(write_config(to_the_end)) == to_the_end
    one = read_config({**raw, "moe_layer_end_index": 3})
    assert one.moe_layers == (3,) and read_config(write_config(one)) == one


def test_switches():
    changed = {
        "use_bias": True,
        "moe_num_shared_experts": 0,
        "moe_norm_min": 0.5,
        "tie_word_embeddings": False,
    }
    config = read_config({**PUBLISHED, **changed, "head_dim": 64})
    assert config.attention_bias and config.output_bias and config.mlp_bias and config.lm_head_bias
    assert (config.shared_dim, config.routing.smallest_sum, config.head_dim) == (0, 0.5, 64)
    assert read_config(write_config(config)) == config


def _shapes(config):
    plan = published(config, TABLE, declare(config))
    return {piece.name: piece.shape for places in plan.values() for piece in places}


def test_names_on_disk():
    """The correction bias is boxed and lies beside the router; transformers' own name is read too."""
    config = replace(read_config({**PUBLISHED, "use_bias": True, "num_hidden_layers": 2}), n_experts=2)
    found = _shapes(config)
    assert found["model.layers.1.mlp.gate.weight"] == (2, 2560) and found["lm_head.bias"] == (103424,)
    assert found["model.layers.1.mlp.moe_statics.e_score_correction_bias"] == (1, 2)
    assert found["model.layers.1.mlp.shared_experts.down_proj.bias"] == (2560,)
    assert found["model.layers.0.mlp.up_proj.bias"] == (12288,) and "lm_head.weight" not in found
    renamed = {
        name.replace("mlp.moe_statics", "mlp.gate.moe_statics"): shape for name, shape in found.items()
    }
    assert renamed.keys() != found.keys()
    resolve(config, TABLE, declare(config), renamed, "here")


def test_routers_stay_float32():
    assert TABLE.row("segments.1.0.moe.router.kernel").float32
    assert TABLE.row("segments.1.0.moe.router.correction_bias").float32


def test_further_tokens_are_left_out():
    names = ["model.mtp_block.0.mlp.up_proj.weight", "model.layers.3.mlp.gate.weight"]
    assert sum(left_out(read_config(PUBLISHED), TABLE, names).values()) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", 2561),
        ("num_hidden_layers", 0),
        ("num_key_value_heads", 3),
        ("moe_num_experts", None),
        ("moe_k", 65),
        ("moe_num_shared_experts", -1),
        ("moe_layer_interval", 0),
        ("moe_layer_start_index", 28),
        ("rms_norm_eps", None),
        ("hidden_act", "gelu"),
        ("use_bias", 1),
        ("moe_norm_min", "0"),
    ],
)
def test_wrong_field(field, value):
    with pytest.raises(InputError) as error:
        read_config({**PUBLISHED, field: value})
    assert f"'{field}'" in error.value.what and error.value.expected
