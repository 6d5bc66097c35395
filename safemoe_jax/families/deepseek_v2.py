"""DeepSeek-V2 (`model_type: deepseek_v2`; arXiv 2405.04434): config.json and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safemoe_jax.families import common_rows as rows
from safemoe_jax.families import deepseek
from safemoe_jax.families.config_fields import read, require
from safemoe_jax.families.family import Family
from safemoe_jax.families.tensor_table import Row, Source, TensorTable
from safemoe_jax.models.config import ModelConfig, RoutingConfig

_MLP = f"{rows.LAYER}.mlp"
_LIMITED = "group_limited_greedy"

TABLE = TensorTable(
    rows=(
        *rows.decoder_rows(),
        *rows.latent_attention_rows(),
        Row("moe.router.kernel", (Source(f"{_MLP}.gate.weight", transpose=True),), float32=True),
        *rows.expert_rows(),
        *rows.swiglu_rows("moe.shared", f"{_MLP}.shared_experts"),
        *rows.swiglu_rows("mlp", _MLP),
    ),
    ignored=rows.BUFFERS,
    tied=rows.TIED,
)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The network that a config.json describes.

    `norm_topk_prob` has no effect in this family, as in transformers; the published checkpoints have it off.

    Raises:
        InputError: a field is missing, malformed, or asks for something that DeepSeek-V2 does not have.
    """
    sizes = deepseek.read_latent(raw, max_positions=2048, interleaved=True)
    d_model, n_heads = sizes["d_model"], sizes["n_heads"]
    require(d_model % n_heads == 0, "hidden_size", d_model, f"a multiple of num_attention_heads ({n_heads})")
    return ModelConfig(
        family="deepseek_v2",
        **sizes,
        routing=_read_routing(raw, sizes),
        mlp_bias=read(raw, "mlp_bias", bool, False),
        router_aux_coef=read(raw, "aux_loss_alpha", float, 0.0),
        layers=deepseek.full_layers(raw, sizes["n_layers"], 0),
    )


def _read_routing(raw: Mapping[str, Any], sizes: Mapping[str, Any]) -> RoutingConfig:
    method, scoring = read(raw, "topk_method", str, "greedy"), read(raw, "scoring_func", str, "softmax")
    require(method in ("greedy", _LIMITED), "topk_method", method, f"greedy or {_LIMITED}")
    require(scoring == "softmax", "scoring_func", scoring, "softmax")
    limits = deepseek.read_groups(raw, sizes) if method == _LIMITED else {}
    return RoutingConfig(
        **limits,
        scale=read(raw, "routed_scaling_factor", float, 1.0),
        float32_logits=True,
        float32_weights=True,
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields of a network, in the layout of the published checkpoints."""
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        **deepseek.write_latent(config),
        "topk_method": _LIMITED if config.routing.groups > 1 else "greedy",
        "scoring_func": "softmax",
        "mlp_bias": config.mlp_bias,
        "aux_loss_alpha": config.router_aux_coef,
    }


FAMILY = Family("deepseek_v2", read_config, write_config, TABLE)
