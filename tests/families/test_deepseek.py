"""deepseek_v2, deepseek_v3, dots1, glm4_moe: published configs, both directions, names on disk, refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.families import family_of
from safemoe_jax.families.tensor_table import left_out, published
from safemoe_jax.models import declare
from safemoe_jax.models.config import LayerConfig, MlaConfig, Segment

_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
_COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "moe_layer_freq": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
# The fields of the published deepseek-ai/DeepSeek-V2-Lite config.
V2_LITE = _COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
# The fields of the published deepseek-ai/DeepSeek-V3 config, without its 8-bit weights.
V3 = V2_LITE | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
# rednote-hilab/dots.llm1.inst.
DOTS1 = _COMMON | {
    "architectures": ["Dots1ForCausalLM"],
    "first_k_dense_replace": 1,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 32768,
    "model_type": "dots1",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 62,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "noaux_tc",
    "sliding_window": None,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "vocab_size": 152064,
}
# zai-org/GLM-4.5-Air.
GLM_AIR = _COMMON | {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "use_qk_norm": False,
    "vocab_size": 151552,
}
ALL = (V2_LITE, V3, DOTS1, GLM_AIR)
BY_TYPE = {raw["model_type"]: raw for raw in ALL}


def read(raw):
    return family_of(raw["model_type"]).read_config(raw)


def write(config):
    return family_of(config.family).write_config(config)


def test_deepseek_v2_lite():
    config = read(V2_LITE)
    assert (config.d_model, config.n_layers, config.n_heads, config.vocab_size) == (2048, 27, 16, 102400)
    assert config.mla == MlaConfig(None, 512, 128, 64, 128, norm_eps=1e-6) and config.norm_eps == 1e-6
    assert (config.n_experts, config.top_k, config.expert_dim) == (64, 6, 1408)
    assert (config.shared_dim, config.dense_dim, config.shared_gate) == (2816, 10944, False)
    assert config.segments == (Segment(("dense",), 1, 0), Segment(("moe",), 26, 1))
    assert (config.routing.kind, config.routing.groups, config.routing.scale) == ("softmax", 1, 1.0)
    assert config.routing.float32_logits and config.routing.float32_weights and not config.norm_topk_prob
    rope = config.rope
    assert (rope.kind, rope.theta, rope.factor, rope.interleaved) == ("yarn", 10000.0, 40.0, True)
    assert (rope.mscale, rope.mscale_all_dim, rope.original_max_positions) == (0.707, 0.707, 4096)
    scale = 192**-0.5 * (0.1 * 0.707 * math.log(40) + 1) ** 2
    assert math.isclose(config.attention_scale, scale, rel_tol=1e-12)
    assert config.router_aux_coef == 0.001


def test_deepseek_v3():
    config, routing = read(V3), read(V3).routing
    assert config.mla == MlaConfig(1536, 512, 128, 64, 128)
    assert config.segments == (Segment(("dense",), 3, 0), Segment(("moe",), 58, 3))
    assert (config.n_experts, config.top_k, config.shared_dim) == (256, 8, 2048) and config.norm_topk_prob
    assert (routing.kind, routing.groups, routing.top_groups, routing.group_score) == (
        "sigmoid",
        8,
        4,
        "top2",
    )
    assert (routing.scale, routing.weight_floor, routing.correction_bias) == (2.5, 1e-20, True)
    assert config.rope.interleaved and not read({**V3, "rope_interleave": False}).rope.interleaved


def test_dots1():
    config = read(DOTS1)
    assert (config.head_dim, config.qk_norm, config.rope.theta) == (128, "head", 1e7)
    assert config.layers == (LayerConfig("dense"),) + (LayerConfig("moe"),) * 61
    assert (config.n_experts, config.top_k, config.shared_dim) == (128, 6, 2816)
    assert (config.routing.scale, config.routing.groups) == (2.5, 1) and config.norm_topk_prob
    assert not config.attention_bias and not config.rope.interleaved


def test_dots1_windows():
    """The last layers slide; where the field is absent, transformers' 4096 counts and not a null."""
    sliding = read({**DOTS1, "sliding_window": 512, "max_window_layers": 60})
    assert [layer.window for layer in sliding.layers] == [0] * 60 + [512] * 2
    absent = {k: v for k, v in DOTS1.items() if k != "sliding_window"}
    assert {layer.window for layer in read({**absent, "max_window_layers": 0}).layers} == {4096}
    assert {layer.window for layer in read({**DOTS1, "max_window_layers": 0}).layers} == {0}
    types = ["sliding_attention", "full_attention"] * 31
    listed = read({**DOTS1, "sliding_window": 9, "layer_types": types})
    assert [layer.window for layer in listed.layers] == [9, 0] * 31
    assert all(read(write(config)) == config for config in (sliding, listed))


def test_glm_4_5_air():
    config = read(GLM_AIR)
    assert (config.n_heads, config.n_kv_heads, config.head_dim, config.rope.dim) == (96, 8, 128, 64)
    assert config.attention_bias and not config.output_bias and config.qk_norm == "none"
    assert (config.n_experts, config.top_k, config.shared_dim, config.rope.theta) == (128, 8, 1408, 1e6)
    assert config.segments == (Segment(("dense",), 1, 0), Segment(("moe",), 45, 1))


def test_glm_partial_rotation():
    """Half where nothing is said; nested it comes first; all of it is no part."""
    silent = {k: v for k, v in GLM_AIR.items() if k != "partial_rotary_factor"}
    assert read(silent).rope.dim == 64 and read({**GLM_AIR, "partial_rotary_factor": 1.0}).rope.dim is None
    nested = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    assert read({**silent, "rope_scaling": None, "rope_parameters": nested}).rope.dim == 32
    whole = read({**GLM_AIR, "partial_rotary_factor": 1.0})
    assert read(write(whole)) == whole


@pytest.mark.parametrize("raw", ALL, ids=BY_TYPE)
def test_config_goes_out_as_published(raw):
    config = read(raw)
    written = write(config)
    assert read(written) == config
    # The kind of scaling goes by its newer name; the module for a second token is not written.
    own = ("rope_scaling", "num_nextn_predict_layers", "layer_types", "mlp_bias", "rope_interleave")
    own += () if "scoring_func" in raw else ("scoring_func", "topk_method")
    assert {k: v for k, v in written.items() if k not in own} == {k: raw[k] for k in written if k not in own}
    assert not written.get("num_nextn_predict_layers")


@pytest.mark.parametrize(
    "changed",
    [
        {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0},
        {"q_lora_rank": 1536, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"rope_scaling": None, "first_k_dense_replace": 0},
    ],
)
def test_other_deepseek_v2_out_and_in_again(changed):
    config = read({**V2_LITE, **changed})
    assert config != read(V2_LITE) and read(write(config)) == config


def test_no_scaling_no_temperature():
    assert read({**V2_LITE, "rope_scaling": None}).attention_scale is None


def test_rope_parameters_of_transformers_5():
    nested = {k: v for k, v in V3.items() if not k.startswith("rope")}
    scaling = {k: v for k, v in V3["rope_scaling"].items() if k != "type"}
    nested["rope_parameters"] = {**scaling, "rope_type": "yarn", "rope_theta": 10000.0}
    assert read({**nested, "head_dim": 64, "qk_head_dim": 192}) == read(V3)


def _names(raw, layer):
    """Name -> shape of one layer's tensors in the published layout, of a model of two layers."""
    config = replace(read({**raw, "num_hidden_layers": 2, "first_k_dense_replace": 1}), n_experts=2)
    plan = published(config, family_of(raw["model_type"]).table, declare(config))
    shapes = {piece.name: piece.shape for places in plan.values() for piece in places}
    prefix = f"model.layers.{layer}."
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _ffn(name, inner, width):
    shapes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    return {f"mlp.{name}{p}.weight": shape for p, shape in shapes.items()}


def test_names_of_deepseek_v2():
    attention = {
        "input_layernorm.weight": (2048,),
        "post_attention_layernorm.weight": (2048,),
        "self_attn.q_proj.weight": (16 * 192, 2048),
        "self_attn.kv_a_proj_with_mqa.weight": (576, 2048),
        "self_attn.kv_a_layernorm.weight": (512,),
        "self_attn.kv_b_proj.weight": (16 * 256, 512),
        "self_attn.o_proj.weight": (2048, 2048),
    }
    assert _names(V2_LITE, 0) == attention | _ffn("", 10944, 2048)
    experts = _ffn("experts.0.", 1408, 2048) | _ffn("experts.1.", 1408, 2048)
    moe = {"mlp.gate.weight": (2, 2048)} | experts | _ffn("shared_experts.", 2816, 2048)
    assert _names(V2_LITE, 1) == attention | moe


def test_names_of_deepseek_v3():
    names = _names(V3, 1)
    assert names["self_attn.q_a_proj.weight"] == (1536, 7168)
    assert names["self_attn.q_a_layernorm.weight"] == (1536,)
    assert names["self_attn.q_b_proj.weight"] == (128 * 192, 1536)
    assert names["mlp.gate.e_score_correction_bias"] == (2,) and "self_attn.q_proj.weight" not in names


def test_names_of_glm():
    names = _names({**GLM_AIR, "use_qk_norm": True}, 1)
    attention = {name for name in names if name.startswith("self_attn.")}
    biases = {f"self_attn.{p}_proj.bias" for p in "qkv"}
    norms = {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    assert attention == {f"self_attn.{p}_proj.weight" for p in "qkvo"} | biases | norms
    assert names["self_attn.q_norm.weight"] == (128,)


@pytest.mark.parametrize("raw", [V3, GLM_AIR], ids=["deepseek_v3", "glm4_moe"])
def test_second_token_module_is_left_out(raw):
    """It is published as one more layer."""
    n = raw["num_hidden_layers"]
    names = [f"model.layers.{n}.eh_proj.weight", f"model.layers.{n - 1}.mlp.gate.weight"]
    assert sum(left_out(read(raw), family_of(raw["model_type"]).table, names).values()) == 1


@pytest.mark.parametrize("model_type", BY_TYPE)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", None),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 7),
        ("n_routed_experts", None),
        ("n_shared_experts", 0),
        ("num_experts_per_tok", 257),
        ("moe_intermediate_size", "1408"),
        ("first_k_dense_replace", -1),
        ("first_k_dense_replace", 62),
        ("moe_layer_freq", 2),
        ("rms_norm_eps", None),
        ("hidden_act", "gelu"),
        ("topk_method", "random"),
        ("scoring_func", "tanh"),
        ("quantization_config", {"quant_method": "fp8"}),
    ],
)
def test_wrong_field(model_type, field, value):
    with pytest.raises(InputError) as error:
        read({**BY_TYPE[model_type], field: value})
    assert f"'{field}'" in error.value.what and error.value.expected


@pytest.mark.parametrize(
    ("raw", "field", "changed"),
    [
        (V2_LITE, "hidden_size", {"hidden_size": 2056}),
        (V2_LITE, "num_key_value_heads", {"num_key_value_heads": 8}),
        (V2_LITE, "qk_rope_head_dim", {"qk_rope_head_dim": 63}),
        (V2_LITE, "n_group", {"topk_method": "group_limited_greedy", "n_group": None}),
        (V2_LITE, "topk_group", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 5}),
        (V3, "n_group", {"n_group": 7}),
        (V3, "n_group", {"n_group": 256, "topk_group": 8}),
        (V3, "num_experts_per_tok", {"n_group": 128, "topk_group": 3}),
        (V3, "rope_interleave", {"rope_interleave": 1}),
        (DOTS1, "layer_types", {"layer_types": ["full_attention"] * 61}),
        (DOTS1, "layer_types", {"layer_types": ["chunked_attention"] * 62}),
        (DOTS1, "sliding_window", {"layer_types": ["sliding_attention"] * 62}),
        (DOTS1, "sliding_window", {"sliding_window": 0}),
        (GLM_AIR, "partial_rotary_factor", {"partial_rotary_factor": 1.5}),
        (GLM_AIR, "partial_rotary_factor", {"partial_rotary_factor": 0.01}),
        (GLM_AIR, "use_qk_norm", {"use_qk_norm": 1}),
    ],
)
def test_wrong_field_of_one_family(raw, field, changed):
    with pytest.raises(InputError) as error:
        read({**raw, **changed})
    assert f"'{field}'" in error.value.what and error.value.expected
