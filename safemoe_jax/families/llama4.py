"""Llama 4's text model (`llama4_text`, and within `llama4`; dense in Llama Guard 4): config.json and names.

The hub nests it in `text_config` and prefixes its tensors with `language_model.`, beside a tower for images,
which is left out. What is written is the text model by itself, `llama4_text`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from safemoe_jax.families import common_rows as rows
from safemoe_jax.families import config_fields as fields
from safemoe_jax.families.common_config import read_decoder, read_experts, write_decoder
from safemoe_jax.families.config_fields import read, require, size
from safemoe_jax.families.family import Family
from safemoe_jax.families.tensor_table import TensorTable, linear
from safemoe_jax.models.config import LayerConfig, ModelConfig, RoutingConfig

_FFN = f"{rows.LAYER}.feed_forward"
_EXPERTS = f"{_FFN}.experts"

TABLE = TensorTable(
    rows=(
        *rows.decoder_rows(),
        *rows.attention_rows(),
        *linear("moe.router", f"{_FFN}.router"),
        *rows.fused_expert_rows((f"{_EXPERTS}.gate_up_proj",), (f"{_EXPERTS}.down_proj",), transpose=False),
        *rows.swiglu_rows("moe.shared", f"{_FFN}.shared_expert"),
        *rows.swiglu_rows("mlp", _FFN),
    ),
    ignored=rows.BUFFERS,
    tied=rows.TIED,
    prefixes=("language_model.",),
    left_out=(r"vision_model\..*", r"multi_modal_projector\..*"),
)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The network that a config.json describes, itself or in the `text_config` within it.

    Raises:
        InputError: a field is missing, malformed, or asks for something that Llama 4 does not have.
    """
    raw = fields.text_fields(raw)
    decoder = read_decoder(raw, theta=500000.0, head_dim=128, max_positions=131072)
    decoder["rope"] = replace(decoder["rope"], interleaved=True)
    layers = _read_layers(raw, decoder["n_layers"])
    # A model without MoE layers may still name experts, or none at all: they are not there.
    experts = {"n_experts": 0, "top_k": 0, "expert_dim": 0}
    if any(layer.kind == "moe" for layer in layers):
        experts = read_experts(raw, width="intermediate_size")
    scale, floor = read(raw, "attn_scale", float, 0.1), read(raw, "floor_scale", float, 8192.0)
    require(floor >= 1 and floor % 1 == 0, "floor_scale", floor, "1 or more")
    return ModelConfig(
        family="llama4_text",
        **decoder,
        **experts,
        shared_dim=experts["expert_dim"],
        dense_dim=size(raw, "intermediate_size_mlp"),
        attention_bias=read(raw, "attention_bias", bool, False),
        output_bias=read(raw, "attention_bias", bool, False),
        qk_norm="l2_after_rope" if read(raw, "use_qk_norm", bool, True) else "none",
        query_temperature=(scale, floor),
        routing=RoutingConfig(kind="sigmoid_input"),
        layers=layers,
    )


def _read_layers(raw: Mapping[str, Any], n: int) -> tuple[LayerConfig, ...]:
    """What each layer is. In `no_rope_layers` a 1 means that a layer rotates; empty, it says nothing."""
    interval, step = size(raw, "no_rope_layer_interval", 4), read(raw, "interleave_moe_layer_step", int, 1)
    require(step >= 0, "interleave_moe_layer_step", step, "at least 0")
    rotated = raw.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(n)]
    _require_list("no_rope_layers", rotated, (0, 1), least=n)
    types = fields.layer_types(raw, n, [fields.CHUNKED if rope else fields.FULL for rope in rotated[:n]])
    _require_list("layer_types", list(types), (fields.CHUNKED, fields.FULL), least=n)
    every_step = list(range(step - 1, n, step)) if step else []
    moe = every_step if raw.get("moe_layers") is None else raw["moe_layers"]
    _require_list("moe_layers", moe, range(n), least=0)
    chunk = size(raw, "attention_chunk_size", 8192)
    tuned = raw.get("attn_temperature_tuning", True)  # early exports say 4 where later ones say true
    require(isinstance(tuned, int), "attn_temperature_tuning", tuned, "true or false")
    return tuple(
        LayerConfig(
            kind="moe" if i in moe else "dense",
            chunk=chunk if types[i] == fields.CHUNKED else 0,
            rope=bool(rotated[i]),
            temperature=bool(tuned) and not rotated[i],
        )
        for i in range(n)
    )


def _require_list(field: str, values: object, allowed: Collection, least: int) -> None:
    right = isinstance(values, list) and len(values) >= least and all(value in allowed for value in values)
    require(right, field, values, f"a list of {least} or more of {', '.join(map(str, allowed))}")


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json fields of the text model."""
    return {
        **write_decoder(config),
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "head_dim": config.head_dim,
        "intermediate_size": config.expert_dim or config.dense_dim,
        "intermediate_size_mlp": config.dense_dim,
        "num_local_experts": config.n_experts,
        "num_experts_per_tok": config.top_k,
        "moe_layers": list(config.moe_layers),
        "interleave_moe_layer_step": config.moe_layers[0] + 1 if config.moe_layers else 0,
        "no_rope_layers": [int(layer.rope) for layer in config.layers],
        "layer_types": fields.write_layer_types(config),
        "attention_chunk_size": max(layer.chunk for layer in config.layers) or 8192,
        "attn_temperature_tuning": any(layer.temperature for layer in config.layers),
        "attn_scale": config.query_temperature[0],
        "floor_scale": int(config.query_temperature[1]),
        "use_qk_norm": config.qk_norm != "none",
        "attention_bias": config.attention_bias,
        "router_aux_loss_coef": config.router_aux_coef,
    }


FAMILY = Family("llama4_text", read_config, write_config, TABLE)
HUB_FAMILY = FAMILY._replace(model_type="llama4")
