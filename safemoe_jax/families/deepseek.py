"""Fields of config.json that deepseek_v2 and the families built like it (deepseek_v3, dots1, glm4_moe) share.

Sources: DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3 (arXiv 2412.19437) and transformers' models of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safemoe_jax.families.common_config import read_decoder, write_decoder
from safemoe_jax.families.config_fields import (
    FULL,
    first_dense_kinds,
    make_layers,
    read,
    read_rope,
    require,
    size,
)
from safemoe_jax.families.tensor_table import SCALED
from safemoe_jax.models.config import LayerConfig, MlaConfig, ModelConfig, RopeConfig, RoutingConfig
from safemoe_jax.models.rope import yarn_mscale

Fields = dict[str, Any]


def read_sizes(raw: Mapping[str, Any], *, max_positions: int, head_dim: int | None = None) -> Fields:
    """The fields of `ModelConfig` that these families name alike: the decoder's, experts, dense layers.

    Args:
        raw: the parsed config.json.
        max_positions, head_dim: as of `common_config.read_decoder`.

    Raises:
        InputError: a field is missing, malformed, or asks for something that no such family has.
    """
    n_experts, top_k = size(raw, ("n_routed_experts", "num_local_experts")), size(raw, "num_experts_per_tok")
    require(top_k <= n_experts, "num_experts_per_tok", top_k, f"at most n_routed_experts ({n_experts})")
    quantised, expert_dim = raw.get("quantization_config"), size(raw, "moe_intermediate_size")
    fp8 = {"quant_method": "fp8", "weight_block_size": [SCALED, SCALED]}
    readable = quantised is None or (isinstance(quantised, Mapping) and {**quantised, **fp8} == quantised)
    require(readable, "quantization_config", quantised, f"{fp8}, or no quantisation")
    return {
        **read_decoder(raw, head_dim=head_dim, max_positions=max_positions),
        "n_experts": n_experts,
        "top_k": top_k,
        "expert_dim": expert_dim,
        "shared_dim": expert_dim * size(raw, "n_shared_experts"),
        "dense_dim": size(raw, "intermediate_size"),
    }


def write_sizes(config: ModelConfig) -> Fields:
    """The same fields, and those of routing, biases and dense layers."""
    return {
        "model_type": config.family,
        **write_decoder(config),
        "intermediate_size": config.dense_dim,
        "moe_intermediate_size": config.expert_dim,
        "n_routed_experts": config.n_experts,
        "n_shared_experts": config.shared_dim // config.expert_dim,
        "num_experts_per_tok": config.top_k,
        "n_group": config.routing.groups,
        "topk_group": config.routing.top_groups,
        "norm_topk_prob": config.norm_topk_prob,
        "routed_scaling_factor": config.routing.scale,
        "first_k_dense_replace": config.moe_layers[0],
        "moe_layer_freq": 1,
        "attention_bias": config.attention_bias,
    }


def layer_kinds(raw: Mapping[str, Any], n_layers: int, default: int) -> tuple[str, ...]:
    """Kinds of layer: the first `first_k_dense_replace` are dense, the rest have experts."""
    kinds, frequency = first_dense_kinds(raw, n_layers, default), read(raw, "moe_layer_freq", int, 1)
    n_dense, expected = kinds.count("dense"), f"below num_hidden_layers ({n_layers})"
    require(n_dense < n_layers, "first_k_dense_replace", n_dense, expected)
    # The first published code knows other frequencies, transformers does not; no checkpoint has one.
    require(frequency == 1, "moe_layer_freq", frequency, "1")
    return kinds


def full_layers(raw: Mapping[str, Any], n_layers: int, default: int) -> tuple[LayerConfig, ...]:
    """The layers where every one of them sees all keys; arguments as of `layer_kinds`."""
    return make_layers(layer_kinds(raw, n_layers, default), (FULL,) * n_layers)


def read_groups(raw: Mapping[str, Any], sizes: Fields, *default: int) -> Fields:
    """The groups that a choice of experts is limited to.

    Args:
        raw: the parsed config.json.
        sizes: what `read_sizes` gives.
        default: `n_group` and `topk_group` where the config names none; without them they are required.
    """
    groups, best = size(raw, "n_group", *default[:1]), size(raw, "topk_group", *default[1:])
    n_experts, top_k = sizes["n_experts"], sizes["top_k"]
    require(n_experts % groups == 0, "n_group", groups, f"a divisor of n_routed_experts ({n_experts})")
    require(best <= groups, "topk_group", best, f"at most n_group ({groups})")
    reach = best * n_experts // groups
    require(top_k <= reach, "num_experts_per_tok", top_k, f"at most the {reach} experts of topk_group groups")
    return {"groups": groups, "top_groups": best}


def sigmoid_routing(raw: Mapping[str, Any], sizes: Fields, *default: int, scale: float) -> RoutingConfig:
    """DeepSeek-V3's router: sigmoid scores, chosen with a bias that balances the load without a loss.

    Args:
        raw, sizes, default: as of `read_groups`.
        scale: `routed_scaling_factor` where the config names none.
    """
    method, scoring = read(raw, "topk_method", str, "noaux_tc"), read(raw, "scoring_func", str, "sigmoid")
    require(method == "noaux_tc", "topk_method", method, "noaux_tc")
    # dots.llm1 gives the method's name here.
    require(scoring in ("sigmoid", "noaux_tc"), "scoring_func", scoring, "sigmoid")
    limits, most = read_groups(raw, sizes, *default), sizes["n_experts"] // 2
    expected = f"at most {most}, for a group is scored by its best two experts"
    require(limits["groups"] <= most, "n_group", limits["groups"], expected)
    return RoutingConfig(
        kind="sigmoid",
        correction_bias=True,
        **limits,
        group_score="top2",
        scale=read(raw, "routed_scaling_factor", float, scale),
        weight_floor=1e-20,
        float32_logits=True,
        float32_weights=True,
    )


def read_latent(raw: Mapping[str, Any], *, max_positions: int, interleaved: bool) -> Fields:
    """`read_sizes`, and what latent attention is, its rotary part and scale included."""
    mla = MlaConfig(
        q_rank=size(raw, "q_lora_rank", None),
        kv_rank=size(raw, "kv_lora_rank"),
        nope_dim=size(raw, "qk_nope_head_dim"),
        rope_dim=size(raw, "qk_rope_head_dim"),
        v_dim=size(raw, "v_head_dim"),
    )
    require(mla.rope_dim % 2 == 0, "qk_rope_head_dim", mla.rope_dim, "an even number")
    # transformers calls the rotated part head_dim, and saves it under that name.
    sizes = read_sizes(raw, max_positions=max_positions, head_dim=mla.rope_dim)
    n_heads, n_kv_heads = sizes["n_heads"], sizes["n_kv_heads"]
    require(n_kv_heads == n_heads, "num_key_value_heads", n_kv_heads, f"num_attention_heads ({n_heads})")
    rope, bias = read_rope(raw, interleaved=interleaved), read(raw, "attention_bias", bool, False)
    head_dim = mla.nope_dim + mla.rope_dim
    return {
        **sizes,
        "head_dim": head_dim,
        "mla": mla,
        "rope": rope,
        "attention_scale": _attention_scale(rope, head_dim),
        "attention_bias": bias,
        "output_bias": bias,
    }


def write_latent(config: ModelConfig) -> Fields:
    """What `read_latent` reads."""
    mla = config.mla
    return {
        **{name: value for name, value in write_sizes(config).items() if name != "head_dim"},
        "q_lora_rank": mla.q_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_nope_head_dim": mla.nope_dim,
        "qk_rope_head_dim": mla.rope_dim,
        "v_head_dim": mla.v_dim,
    }


def _attention_scale(rope: RopeConfig, head_dim: int) -> float | None:
    """YaRN's temperature on the scores too, once for queries and once for keys; None where it has none."""
    if rope.kind == "default" or not rope.mscale_all_dim:
        return None
    return head_dim**-0.5 * yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
