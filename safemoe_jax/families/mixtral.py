"""Mixtral (`model_type: mixtral`; Jiang et al. 2024, arXiv 2401.04088): config.json and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safemoe_jax.families.common_config import read_decoder, read_experts, write_decoder
from safemoe_jax.families.common_rows import BUFFERS, LAYER, TIED, attention_rows, decoder_rows, expert_rows
from safemoe_jax.families.config_fields import size
from safemoe_jax.families.family import Family
from safemoe_jax.families.tensor_table import TensorTable, linear
from safemoe_jax.models.config import LayerConfig, ModelConfig, RoutingConfig

_MOE = f"{LAYER}.block_sparse_moe"

TABLE = TensorTable(
    rows=(
        *decoder_rows(),
        *attention_rows(),
        *linear("moe.router", f"{_MOE}.gate", f"{LAYER}.mlp.gate"),
        *expert_rows(f"{_MOE}.experts", ("w1", "w3", "w2")),
    ),
    ignored=BUFFERS,
    tied=TIED,
)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The network that a config.json describes. A window, where there is one, is every layer's.

    Raises:
        InputError: a field is missing, malformed, or asks for something that Mixtral does not have.
    """
    decoder = read_decoder(raw, theta=1e6, max_positions=131072)
    layer = LayerConfig(window=size(raw, "sliding_window", None) or 0)
    return ModelConfig(
        family="mixtral",
        **decoder,
        **read_experts(raw, width="intermediate_size"),
        norm_topk_prob=True,
        routing=RoutingConfig(float32_weights=True),
        layers=(layer,) * decoder["n_layers"],
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields of a network, in the layout of the published checkpoints."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **write_decoder(config),
        "num_local_experts": config.n_experts,
        "num_experts_per_tok": config.top_k,
        "intermediate_size": config.expert_dim,
        "router_aux_loss_coef": config.router_aux_coef,
        "sliding_window": config.layers[0].window or None,
    }


FAMILY = Family("mixtral", read_config, write_config, TABLE)
