"""Llama 4's text model (`llama4_text`, and within `llama4`; dense in Llama Guard 4): config.json and names.

The hub nests it in `text_config` and prefixes its tensors with `language_model.`, beside a tower for images,
which is left out. What is written is the text model by itself, `llama4_text`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from safemoe_jax.families import common_rows as rows
from safemoe_jax.families import config_fields as fields
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
    n_heads, layers = size(raw, "num_attention_heads"), _read_layers(raw, size(raw, "num_hidden_layers"))
    n_kv_heads = size(raw, "num_key_value_heads", n_heads)
    require(n_heads % n_kv_heads == 0, "num_key_value_heads", n_kv_heads, f"a divisor of {n_heads}")
    require(read(raw, "hidden_act", str, "silu") == "silu", "hidden_act", raw.get("hidden_act"), "silu")
    # A model without MoE layers may still name experts, or none at all: they are not there.
    names = ("num_local_experts", "num_experts_per_tok", "intermediate_size")
    kinds = {layer.kind for layer in layers}
    n_experts, top_k, width = (size(raw, name) if "moe" in kinds else 0 for name in names)
    require(top_k <= n_experts, "num_experts_per_tok", top_k, f"at most num_local_experts ({n_experts})")
    temperature = (read(raw, "attn_scale", float, 0.1), read(raw, "floor_scale", float, 8192.0))
    require(temperature[1] >= 1 and temperature[1] % 1 == 0, "floor_scale", temperature[1], "1 or more")
    return ModelConfig(
        family="llama4_text",
        vocab_size=size(raw, "vocab_size"),
        d_model=size(raw, "hidden_size"),
        n_layers=len(layers),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=size(raw, "head_dim", 128),
        norm_eps=read(raw, "rms_norm_eps", float),
        n_experts=n_experts,
        top_k=top_k,
        expert_dim=width,
        shared_dim=width,
        dense_dim=size(raw, "intermediate_size_mlp"),
        rope=fields.read_rope(raw, 500000.0, interleaved=True),
        attention_bias=read(raw, "attention_bias", bool, False),
        output_bias=read(raw, "attention_bias", bool, False),
        qk_norm="l2_after_rope" if read(raw, "use_qk_norm", bool, True) else "none",
        query_temperature=temperature,
        routing=RoutingConfig(kind="sigmoid_input"),
        tie_embeddings=read(raw, "tie_word_embeddings", bool, False),
        initializer_range=read(raw, "initializer_range", float, 0.02),
        router_aux_coef=read(raw, "router_aux_loss_coef", float, 0.001),
        max_positions=size(raw, "max_position_embeddings", 131072),
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
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
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
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        **fields.write_rope(config.rope),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "router_aux_loss_coef": config.router_aux_coef,
        "max_position_embeddings": config.max_positions,
    }


FAMILY = Family("llama4_text", read_config, write_config, TABLE)
HUB_FAMILY = FAMILY._replace(model_type="llama4")
