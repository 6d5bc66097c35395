"""Dense Llama 3 (`model_type: llama`; Grattafiori et al. 2024, arXiv 2407.21783), Llama Guard 3 too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safemoe_jax.families.common_config import read_decoder, write_decoder
from safemoe_jax.families.common_rows import BUFFERS, LAYER, TIED, attention_rows, decoder_rows, swiglu_rows
from safemoe_jax.families.config_fields import read, size
from safemoe_jax.families.family import Family
from safemoe_jax.families.tensor_table import TensorTable
from safemoe_jax.models.config import LayerConfig, ModelConfig

TABLE = TensorTable(
    rows=(*decoder_rows(), *attention_rows(), *swiglu_rows("mlp", f"{LAYER}.mlp")),
    ignored=BUFFERS,
    tied=TIED,
)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The network that a config.json describes: every layer dense, no router.

    Raises:
        InputError: a field is missing, malformed, or asks for something that Llama does not have.
    """
    decoder, bias = read_decoder(raw, max_positions=2048), read(raw, "attention_bias", bool, False)
    return ModelConfig(
        family="llama",
        **decoder,
        n_experts=0,
        top_k=0,
        expert_dim=0,
        attention_bias=bias,
        output_bias=bias,
        dense_dim=size(raw, "intermediate_size"),
        mlp_bias=read(raw, "mlp_bias", bool, False),
        layers=(LayerConfig(kind="dense"),) * decoder["n_layers"],
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields of a network, in the layout of the published checkpoints."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **write_decoder(config),
        "head_dim": config.head_dim,
        "intermediate_size": config.dense_dim,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


FAMILY = Family("llama", read_config, write_config, TABLE)
