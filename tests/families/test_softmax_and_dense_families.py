"""Configs of Qwen2-MoE, Qwen3-MoE, Mixtral, Granite MoE, dense Llama and dense Qwen3: in, out, refusals."""

from __future__ import annotations

import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.families import family_of

# Fields of published configs: Qwen/Qwen1.5-MoE-A2.7B, Qwen/Qwen3-30B-A3B, mistralai/Mixtral-8x7B-v0.1,
# ibm-granite/granite-3.0-1b-a400m-base, meta-llama/Llama-Guard-3-8B, Qwen/Qwen3-8B.
PUBLISHED = {
    "qwen2_moe": dict(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        hidden_act="silu",
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_experts=60,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        router_aux_loss_coef=0.001,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        sliding_window=32768,
        use_sliding_window=False,
        max_window_layers=21,
        tie_word_embeddings=False,
        initializer_range=0.02,
        max_position_embeddings=8192,
    ),
    "qwen3_moe": dict(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        hidden_act="silu",
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        router_aux_loss_coef=0.001,
        attention_bias=False,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        rope_scaling=None,
        sliding_window=None,
        use_sliding_window=False,
        max_window_layers=48,
        tie_word_embeddings=False,
        initializer_range=0.02,
        max_position_embeddings=40960,
    ),
    "mixtral": dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        hidden_act="silu",
        num_local_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.02,
        rms_norm_eps=1e-5,
        rope_theta=1000000.0,
        sliding_window=None,
        tie_word_embeddings=False,
        initializer_range=0.02,
        max_position_embeddings=32768,
    ),
    "granitemoe": dict(
        vocab_size=49155,
        hidden_size=1024,
        intermediate_size=512,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
        hidden_act="silu",
        num_local_experts=32,
        num_experts_per_tok=8,
        router_aux_loss_coef=0.001,
        attention_bias=False,
        attention_multiplier=0.015625,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        logits_scaling=6.0,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_word_embeddings=True,
        initializer_range=0.02,
        max_position_embeddings=4096,
    ),
    "llama": dict(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        tie_word_embeddings=False,
        initializer_range=0.02,
        max_position_embeddings=131072,
    ),
    "qwen3": dict(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        hidden_act="silu",
        attention_bias=False,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        rope_scaling=None,
        sliding_window=None,
        use_sliding_window=False,
        max_window_layers=36,
        tie_word_embeddings=False,
        initializer_range=0.02,
        max_position_embeddings=40960,
    ),
}
PUBLISHED = {family: {"model_type": family, **fields} for family, fields in PUBLISHED.items()}
MOE = ("qwen2_moe", "qwen3_moe", "mixtral", "granitemoe")


def read(family, **changed):
    return family_of(family).read_config(PUBLISHED[family] | changed)


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_config_in_and_out(family):
    """What is written says the same in the published words (an idle window is written as null)."""
    config = read(family)
    written = family_of(family).write_config(config)
    shared = (written.keys() & PUBLISHED[family].keys()) - {"sliding_window"}
    assert len(shared) >= 16
    assert {name: written[name] for name in shared} == {name: PUBLISHED[family][name] for name in shared}
    assert family_of(family).read_config(written) == config


def test_published_features():
    qwen2, qwen3, mixtral = read("qwen2_moe"), read("qwen3_moe"), read("mixtral")
    assert (qwen2.attention_bias, qwen2.output_bias, qwen2.shared_dim, qwen2.shared_gate) == (
        True,
        False,
        5632,
        True,
    )
    assert not qwen2.norm_topk_prob and {layer.window for layer in qwen2.layers} == {0}
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.norm_topk_prob, qwen3.expert_dim) == (128, "head", True, 768)
    assert mixtral.norm_topk_prob and mixtral.routing.float32_weights and mixtral.head_dim == 128
    granite = read("granitemoe")
    assert (granite.embedding_scale, granite.residual_scale, granite.logits_divisor) == (12.0, 0.22, 6.0)
    assert granite.attention_scale == 0.015625 and granite.routing.kind == "softmax_chosen"
    for dense in (read("llama"), read("qwen3")):
        assert (dense.n_experts, dense.moe_layers, dense.segments[0].pattern) == (0, (), ("dense",))
    assert read("llama").rope.kind == "llama3" and read("llama").rope.original_max_positions == 8192
    assert read("llama").head_dim == read("qwen3").head_dim == 128


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_both_names_of_the_number_of_experts(family, name):
    fields = {k: v for k, v in PUBLISHED[family].items() if k not in ("num_experts", "num_local_experts")}
    assert family_of(family).read_config({**fields, name: 16}).n_experts == 16


@pytest.mark.parametrize("family", PUBLISHED)
def test_both_spellings_of_the_rotary_embedding(family):
    fields = {k: v for k, v in PUBLISHED[family].items() if not k.startswith("rope")}
    scaling = PUBLISHED[family].get("rope_scaling") or {"rope_type": "default"}
    nested = {"rope_theta": PUBLISHED[family]["rope_theta"], **scaling}
    assert family_of(family).read_config({**fields, "rope_parameters": nested}) == read(family)


@pytest.mark.parametrize(
    ("family", "changed", "windows"),
    [
        ("qwen2_moe", dict(max_window_layers=3), [5, 0, 5, 0, 0, 0]),
        ("qwen3_moe", dict(), [5] * 6),
        ("qwen3", dict(max_window_layers=4), [0, 0, 0, 0, 5, 5]),
    ],
)
def test_which_layers_slide(family, changed, windows):
    config = read(family, num_hidden_layers=6, use_sliding_window=True, sliding_window=5, **changed)
    assert [layer.window for layer in config.layers] == windows
    assert family_of(family).read_config(family_of(family).write_config(config)) == config


def test_mixtral_slides_everywhere_or_nowhere():
    assert {layer.window for layer in read("mixtral", sliding_window=7).layers} == {7}
    assert {layer.window for layer in read("mixtral").layers} == {0}


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3"])
def test_layer_types_decide(family):
    types = ["full_attention", "sliding_attention", "full_attention"]
    fields = dict(num_hidden_layers=3, use_sliding_window=True, sliding_window=5, layer_types=types)
    config = read(family, **fields)
    assert [layer.window for layer in config.layers] == [0, 5, 0]
    assert family_of(family).write_config(config)["layer_types"] == types
    with pytest.raises(InputError, match="use_sliding_window"):
        read(family, **fields | dict(use_sliding_window=False))


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_which_layers_are_dense(family):
    config = read(family, num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert config.moe_layers == (1, 5)
    assert family_of(family).read_config(family_of(family).write_config(config)) == config


@pytest.mark.parametrize("family", PUBLISHED)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", None),
        ("num_hidden_layers", True),
        ("num_key_value_heads", 7),
        ("hidden_act", "gelu"),
        ("rms_norm_eps", None),
        ("intermediate_size", -1),
        ("head_dim", 3),
        ("tie_word_embeddings", 1),
    ],
)
def test_a_wrong_field_names_itself(family, field, value):
    with pytest.raises(InputError) as caught:
        read(family, **{field: value})
    assert f"'{field}'" in caught.value.what and caught.value.expected


@pytest.mark.parametrize("family", MOE)
def test_more_experts_a_token_than_there_are(family):
    with pytest.raises(InputError, match="num_experts_per_tok"):
        read(family, num_experts_per_tok=1000)


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("qwen2_moe", "shared_expert_intermediate_size", None),
        ("qwen2_moe", "decoder_sparse_step", 0),
        ("qwen3_moe", "mlp_only_layers", ["0"]),
        ("qwen3_moe", "moe_intermediate_size", None),
        ("mixtral", "sliding_window", 0),
        ("granitemoe", "logits_scaling", 0),
        ("llama", "mlp_bias", "no"),
        ("qwen3", "layer_types", ["full_attention"]),
    ],
)
def test_fields_of_one_family(family, field, value):
    with pytest.raises(InputError) as caught:
        read(family, **{field: value})
    assert f"'{field}'" in caught.value.what
