"""ERNIE 4.5 (`model_type: ernie4_5_moe`; Baidu 2025, technical report): config.json and tensor names.

The modules that predict further tokens (`mtp`) are left out, as transformers leaves them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safemoe_jax.families import common_rows as rows
from safemoe_jax.families.common_config import read_decoder, write_decoder
from safemoe_jax.families.config_fields import FULL, make_layers, read, read_rope, require, size
from safemoe_jax.families.family import Family
from safemoe_jax.families.tensor_table import Row, Source, TensorTable
from safemoe_jax.models.config import LayerConfig, ModelConfig, RoutingConfig

_MLP = f"{rows.LAYER}.mlp"
_STATICS = "moe_statics.e_score_correction_bias"

TABLE = TensorTable(
    rows=(
        *rows.decoder_rows(),
        *rows.attention_rows(),
        Row("moe.router.kernel", (Source(f"{_MLP}.gate.weight", transpose=True),), float32=True),
        rows.correction_bias_row(f"{_MLP}.{_STATICS}", f"{_MLP}.gate.{_STATICS}", boxed=True),
        *rows.expert_rows(),
        *rows.swiglu_rows("moe.shared", f"{_MLP}.shared_experts"),
        *rows.swiglu_rows("mlp", _MLP),
    ),
    ignored=rows.BUFFERS,
    tied=rows.TIED,
    left_out=(r".*mtp.*",),
)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The network that a config.json describes.

    Raises:
        InputError: a field is missing, malformed, or asks for something that ERNIE 4.5 does not have.
    """
    decoder = read_decoder(raw, max_positions=131072)
    n_experts = size(raw, ("moe_num_experts", "num_experts"))
    top_k = size(raw, ("moe_k", "num_experts_per_tok"))
    require(top_k <= n_experts, "moe_k", top_k, f"at most moe_num_experts ({n_experts})")
    n_shared = read(raw, "moe_num_shared_experts", int, 2)
    require(n_shared >= 0, "moe_num_shared_experts", n_shared, "at least 0")
    bias, expert_dim = read(raw, "use_bias", bool, False), size(raw, "moe_intermediate_size")
    own = {
        "rope": read_rope(raw, 500000.0, interleaved=True),
        "tie_embeddings": read(raw, "tie_word_embeddings", bool, True),
    }
    return ModelConfig(
        family="ernie4_5_moe",
        **(decoder | own),
        n_experts=n_experts,
        top_k=top_k,
        expert_dim=expert_dim,
        shared_dim=expert_dim * n_shared,
        dense_dim=size(raw, "intermediate_size"),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        lm_head_bias=bias,
        norm_topk_prob=True,
        routing=RoutingConfig(
            correction_bias=True,
            smallest_sum=read(raw, "moe_norm_min", float, 1e-12),
            float32_logits=True,
        ),
        router_aux_coef=read(raw, "router_aux_loss_coef", float, 0.001),
        layers=_read_layers(raw, decoder["n_layers"]),
    )


def _read_layers(raw: Mapping[str, Any], n: int) -> tuple[LayerConfig, ...]:
    """Every `moe_layer_interval`th layer from the start index to the end index has experts."""
    interval, start = size(raw, "moe_layer_interval", 1), read(raw, "moe_layer_start_index", int, 1)
    end = read(raw, "moe_layer_end_index", int, -1)
    end = n - 1 if end == -1 else end
    moe = [i for i in range(n) if (i + 1) % interval == 0 and start <= i <= end]
    expected = f"an index that leaves layers with experts (to {end}, every {interval})"
    require(bool(moe), "moe_layer_start_index", start, expected)
    return make_layers(["moe" if i in moe else "dense" for i in range(n)], [FULL] * n)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields of a network, in the layout of the published checkpoints."""
    moe = config.moe_layers
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        **write_decoder(config),
        "intermediate_size": config.dense_dim,
        "moe_intermediate_size": config.expert_dim,
        "moe_num_experts": config.n_experts,
        "moe_num_shared_experts": config.shared_dim // config.expert_dim,
        "moe_k": config.top_k,
        "moe_layer_start_index": moe[0],
        "moe_layer_end_index": moe[-1],
        "moe_layer_interval": moe[1] - moe[0] if len(moe) > 1 else 1,
        "moe_norm_min": config.routing.smallest_sum,
        "use_bias": config.attention_bias,
        "router_aux_loss_coef": config.router_aux_coef,
    }


FAMILY = Family("ernie4_5_moe", read_config, write_config, TABLE)
