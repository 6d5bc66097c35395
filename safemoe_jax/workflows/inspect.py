"""`safemoe inspect`: what a checkpoint is, from its config.json and the headers of its files alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safemoe_jax.checkpoints.hub import find_description
from safemoe_jax.checkpoints.huggingface import INDEX, list_checkpoint, read_config, read_json
from safemoe_jax.checkpoints.json_files import write_json
from safemoe_jax.errors import InputError
from safemoe_jax.families import family_of
from safemoe_jax.families.tensor_table import resolve
from safemoe_jax.models.config import LayerConfig, LoraConfig, ModelConfig, factor_layers
from safemoe_jax.models.lora import lora_targets, with_adapters
from safemoe_jax.models.params import ParamSpec, count
from safemoe_jax.models.transformer import declare

Facts = dict[str, Any]

AUXILIARY_FIELDS = (
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "aux_loss_alpha",
    "seq_aux",
    "output_router_logits",
)
"""Fields of config.json that ask for a loss on the router beside the task's."""


@dataclass(frozen=True)
class InspectConfig:
    """Prints what a checkpoint is without loading its weights: family, layers, experts, parameters, bytes,
    LoRA targets, chat template, router losses.

    Attributes:
        model: Hugging Face folder or hub id (only its configuration files are fetched, no weights).
        output: JSON file to write; null writes none.
        json: print JSON instead of text.
    """

    model: str
    output: str | None = None
    json: bool = False


def inspect(config: InspectConfig) -> str:
    """Describes the checkpoint, writes the file if one is named, and returns what is printed.

    Raises:
        InputError: there is no such checkpoint, its config.json or a file is wrong, its tensors are not what
            config.json declares, or the output is already there.
    """
    if config.output is not None and Path(config.output).exists():
        raise InputError("the output is already there", where=config.output, expected="a new file name")
    folder = find_description(config.model)
    facts = {"model": config.model, **describe_folder(folder)}
    if config.output is not None:
        write_json(config.output, facts)
    return json.dumps(facts, indent=2) if config.json else text_of(facts)


def describe_folder(folder: Path) -> Facts:
    """All facts of a checkpoint folder, ready for JSON. Weights are not needed, and never read.

    Raises:
        InputError: as `inspect`.
    """
    config, raw = read_config(folder)
    specs = declare(config)
    return {
        "family": config.family,
        "layers": {
            "n": config.n_layers,
            "pattern": layer_pattern(config.layers),
            "moe": list(config.moe_layers),
            "each": [asdict(layer) for layer in config.layers],
        },
        "experts": expert_facts(config),
        "parameters": {"total": count(specs), "active": active_parameters(config, specs)},
        "weights": weight_facts(folder, config, specs),
        "lora_targets": adapted_projections(config),
        "chat_template": has_chat_template(folder),
        "router_losses": router_loss_facts(raw),
    }


def layer_pattern(layers: tuple[LayerConfig, ...]) -> str:
    """The layers in a line, repeated patterns once.

    For example "0: dense; 1-26: moe", or "0-23: 12 x (moe, window 128 | moe)".
    """
    parts = []
    for segment in factor_layers(tuple(describe_layer(layer) for layer in layers)):
        length = len(segment.pattern)
        last = segment.first_layer + length * segment.repeats - 1
        place = f"{segment.first_layer}" + (f"-{last}" if last > segment.first_layer else "")
        one = " | ".join(segment.pattern)
        parts.append(f"{place}: {one if length == 1 else f'{segment.repeats} x ({one})'}")
    return "; ".join(parts)


def describe_layer(layer: LayerConfig) -> str:
    """One layer in a few words; what every plain decoder does is not said."""
    words = [layer.kind]
    words += [f"window {layer.window}"] if layer.window else []
    words += [f"chunk {layer.chunk}"] if layer.chunk else []
    words += [] if layer.rope else ["no RoPE"]
    words += ["scaled queries"] if layer.temperature else []
    return ", ".join(words)


def expert_facts(config: ModelConfig) -> Facts | None:
    """Numbers and widths of the experts and how they are chosen; None for a dense model."""
    if not config.n_experts:
        return None
    return {
        "n": config.n_experts,
        "top_k": config.top_k,
        "width": config.expert_dim,
        "shared_width": config.shared_dim,
        "shared_gate": config.shared_gate,
        "routing": config.routing.kind,
        "renormalised": config.norm_topk_prob,
        "groups": config.routing.groups,
        "top_groups": config.routing.top_groups,
    }


def active_parameters(config: ModelConfig, specs: Mapping[str, ParamSpec]) -> int:
    """Parameters that one token uses: all but the routed experts that it is not sent to.

    The embedding table counts whole, as it does in the published figures.
    """
    routed = count({name: spec for name, spec in specs.items() if ".moe.experts." in name})
    return count(specs) - (routed - routed // config.n_experts * config.top_k if routed else 0)


def weight_facts(folder: Path, config: ModelConfig, specs: Mapping[str, ParamSpec]) -> Facts:
    """Bytes of the weights by dtype, from the files' headers; from the index alone where there are no files.

    Raises:
        InputError: a file is missing or damaged, only pickles are there, or a tensor is not what config.json
            declares.
    """
    if not any(folder.glob("*.safetensors")) and not _has_pickles(folder):
        total = _indexed_bytes(folder)
        return {"source": "none" if total is None else "index", "bytes": total, "dtypes": None}
    entries = list_checkpoint(folder)
    table = family_of(config.family).table
    shapes = {table.plain_name(name): entry.shape for name, entry in entries.items()}
    resolve(config, table, specs, shapes, str(folder))
    dtypes: dict[str, int] = {}
    for entry in entries.values():
        size = math.prod(entry.shape) * entry.dtype.itemsize
        dtypes[str(entry.dtype)] = dtypes.get(str(entry.dtype), 0) + size
    return {"source": "headers", "bytes": sum(dtypes.values()), "dtypes": dtypes, "tensors": len(entries)}


def _has_pickles(folder: Path) -> bool:
    return any(folder.glob("*.bin")) or any(folder.glob("*.pt"))


def _indexed_bytes(folder: Path) -> int | None:
    """The index's own sum of the tensors' bytes, or None where there is no index or no sum."""
    if not (folder / INDEX).exists():
        return None
    total = (read_json(folder / INDEX).get("metadata") or {}).get("total_size")
    return int(total) if isinstance(total, (int, float)) else None


def adapted_projections(config: ModelConfig) -> dict[str, int]:
    """LoRA target -> how many projections it adapts, for every target that the network has."""
    return {target: _adapters(config, target) for target in lora_targets(config)}


def _adapters(config: ModelConfig, target: str) -> int:
    specs = declare(with_adapters(config, LoraConfig(rank=1, targets=(target,))))
    return sum(spec.shape[0] for name, spec in specs.items() if name.endswith("lora_a"))


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer can write conversations, from its files alone.

    Raises:
        InputError: tokenizer_config.json is malformed.
    """
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    file = folder / "tokenizer_config.json"
    return file.exists() and bool(read_json(file).get("chat_template"))


def router_loss_facts(raw: Mapping[str, Any]) -> Facts:
    """What config.json asks for, field by field, and what training does about it."""
    nested = raw.get("text_config")
    fields = {**raw, **nested} if isinstance(nested, Mapping) else raw
    asked = {name: fields[name] for name in AUXILIARY_FIELDS if fields.get(name) is not None}
    return {
        "config_asks": asked,
        "training": "adds none by itself; router_aux_coef and router_z_coef of the training configuration do",
    }


def text_of(facts: Facts) -> str:
    """The facts as lines for the terminal."""
    layers, parameters, asked = facts["layers"], facts["parameters"], facts["router_losses"]["config_asks"]
    total, active = parameters["total"], parameters["active"]
    wanted = ", ".join(f"{name} {value}" for name, value in asked.items()) or "nothing"
    lines = {
        "model": facts["model"],
        "family": facts["family"],
        "layers": f"{layers['n']} ({layers['pattern']})",
        "experts": _expert_text(facts["experts"]),
        "parameters": f"{total:,} ({_short(total)}), active per token {active:,} ({_short(active)})",
        "weights": _weight_text(facts["weights"]),
        "LoRA targets": ", ".join(f"{name} ({n})" for name, n in facts["lora_targets"].items()),
        "chat template": "yes" if facts["chat_template"] else "no",
        "router losses": f"config.json asks for {wanted}; training {facts['router_losses']['training']}",
    }
    width = max(map(len, lines)) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in lines.items())


def _expert_text(experts: Facts | None) -> str:
    if experts is None:
        return "none (a dense model)"
    text = f"{experts['n']} of width {experts['width']}, {experts['top_k']} a token ({experts['routing']}"
    text += ", renormalised)" if experts["renormalised"] else ")"
    if experts["top_groups"] < experts["groups"]:
        text += f", from {experts['top_groups']} of {experts['groups']} groups"
    if experts["shared_width"]:
        gated = "gated, " if experts["shared_gate"] else ""
        text += f"; shared expert ({gated}width {experts['shared_width']})"
    return text


def _weight_text(weights: Facts) -> str:
    if weights["source"] == "none":
        return "not here"
    if weights["source"] == "index":
        return f"{_short(weights['bytes'], 'B')} by the index; the files are not here"
    parts = ", ".join(f"{name} {size:,} bytes" for name, size in sorted(weights["dtypes"].items()))
    return f"{parts} in {weights['tensors']} tensors, all that config.json declares"


def _short(number: int, unit: str = "") -> str:
    """A number with three digits and a prefix: 6.92 G."""
    for prefix, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number} {unit}".strip()
