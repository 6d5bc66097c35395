"""GLM-4.5 (`model_type: glm4_moe`; arXiv 2508.06471): config.json and tensor names.

The module that predicts a second token (the layer after the last) is left out, as transformers leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safemoe_jax.families import common_rows as rows
from safemoe_jax.families import deepseek
from safemoe_jax.families.config_fields import read, read_rope, require, write_rope
from safemoe_jax.families.family import Family
from safemoe_jax.families.tensor_table import TensorTable, linear
from safemoe_jax.models.config import ModelConfig, RopeConfig

_MLP = f"{rows.LAYER}.mlp"

TABLE = TensorTable(
    rows=(
        *rows.decoder_rows(),
        *rows.attention_rows(),
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
        InputError: a field is missing, malformed, or asks for something that GLM-4.5 does not have.
    """
    sizes = deepseek.read_sizes(raw, max_positions=131072)
    return ModelConfig(
        family="glm4_moe",
        **(sizes | {"rope": _read_rope(raw, sizes["head_dim"])}),
        attention_bias=read(raw, "attention_bias", bool, False),
        qk_norm="head" if read(raw, "use_qk_norm", bool, False) else "none",
        norm_topk_prob=read(raw, "norm_topk_prob", bool, True),
        routing=deepseek.sigmoid_routing(raw, sizes, 1, 1, scale=1.0),
        layers=deepseek.full_layers(raw, sizes["n_layers"], 1),
    )


def _read_rope(raw: Mapping[str, Any], head_dim: int) -> RopeConfig:
    """The rotary embedding of the leading part of a head, half of it unless the config says otherwise."""
    rope = read_rope({"partial_rotary_factor": 0.5, **raw}, head_dim=head_dim)
    dim = head_dim if rope.dim is None else rope.dim
    right = 0 < dim <= head_dim and dim % 2 == 0
    expected = f"a share that rotates an even number of a head's {head_dim} dimensions"
    require(right, "partial_rotary_factor", dim / head_dim, expected)
    return rope


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields of a network, in the layout of the published checkpoints."""
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        **deepseek.write_sizes(config),
        **write_rope(config.rope, head_dim=config.head_dim),
        "use_qk_norm": config.qk_norm == "head",
        "num_nextn_predict_layers": 0,
    }


FAMILY = Family("glm4_moe", read_config, write_config, TABLE)
