"""DeepSeek-V3 and R1 (`model_type: deepseek_v3`; arXiv 2412.19437): config.json and tensor names.

The published weights are in 8 bits with a scale a square of 128 x 128; read, never written. The module that
predicts a second token (the layer after the last) is left out, as transformers leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safemoe_jax.families import common_rows as rows
from safemoe_jax.families import deepseek
from safemoe_jax.families.config_fields import read
from safemoe_jax.families.family import Family
from safemoe_jax.families.tensor_table import TensorTable, linear
from safemoe_jax.models.config import ModelConfig

_MLP = f"{rows.LAYER}.mlp"

TABLE = TensorTable(
    rows=(
        *rows.decoder_rows(),
        *rows.latent_attention_rows(),
        *linear("moe.router", f"{_MLP}.gate"),
        rows.correction_bias_row(f"{_MLP}.gate.e_score_correction_bias"),
        *rows.expert_rows(),
        *rows.swiglu_rows("moe.shared", f"{_MLP}.shared_experts"),
        *rows.swiglu_rows("mlp", _MLP),
    ),
    ignored=rows.BUFFERS,
    tied=rows.TIED,
    left_out=(r"model\.layers\.{n_layers}\..*",),
)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The network that a config.json describes.

    Raises:
        InputError: a field is missing, malformed, or asks for something that DeepSeek-V3 does not have.
    """
    interleaved = read(raw, "rope_interleave", bool, True)
    sizes = deepseek.read_latent(raw, max_positions=4096, interleaved=interleaved)
    return ModelConfig(
        family="deepseek_v3",
        **sizes,
        norm_topk_prob=read(raw, "norm_topk_prob", bool, True),
        routing=deepseek.sigmoid_routing(raw, sizes, 8, 4, scale=2.5),
        router_aux_coef=read(raw, "aux_loss_alpha", float, 0.0),
        layers=deepseek.full_layers(raw, sizes["n_layers"], 3),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields of a network, in the layout of the published checkpoints."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        **deepseek.write_latent(config),
        "rope_interleave": config.rope.interleaved,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "aux_loss_alpha": config.router_aux_coef,
        "num_nextn_predict_layers": 0,
    }


FAMILY = Family("deepseek_v3", read_config, write_config, TABLE)
