"""LoRA adapters in PEFT's format (`adapter_config.json`, `adapter_model.safetensors`), in and out.

Names and layouts as PEFT 0.21 writes them, after the modules that transformers 5 has in memory. Projections:
`lora_A.weight` [r, in], `lora_B.weight` [out, r]. Experts and routers are bare parameters there
(`target_parameters`). An expert parameter's factors hold all experts: A is [E * r, in], expert-major, B is
[out, r * E], expert-minor. PEFT nests the wrappers of two parameters of one module: the first one's factors
(gate_up_proj) then go under `base_layer`. gpt_oss interleaves gate and up in B; for llama4 PEFT takes inputs
for outputs, which exchanges the two factors.

vLLM reads the same folder. Its loader (vllm/lora/lora_model.py, peft_helper.py) wants names that begin with
`base_model.model.` and end with `.lora_A.weight` or `.lora_B.weight`, `target_modules` in the config, no
`modules_to_save`, no DoRA, and refuses a module that the model cannot adapt. It takes adapters of attention
projections for qwen2_moe, qwen3_moe, mixtral, deepseek_v2, deepseek_v3, gpt_oss, phimoe, llama4, granitemoe,
glm4_moe, ernie4_5_moe, llama and qwen3 by its table of supported models, and none for olmoe: merge those.
Adapters of experts in the layout above it takes where its model has fused expert weights (gpt_oss); for the
other families, and for adapters of routers, merge too.

Legend: R layers of a segment, E experts, D inputs, O outputs, r rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from safemoe_jax.checkpoints.atomic import new_folder
from safemoe_jax.checkpoints.huggingface import read_json, to_host
from safemoe_jax.checkpoints.safetensors_files import list_tensors, read_arrays, write_arrays
from safemoe_jax.errors import InputError
from safemoe_jax.families import family_of
from safemoe_jax.families.tensor_table import pieces
from safemoe_jax.models.config import LoraConfig, ModelConfig
from safemoe_jax.models.lora import EXPERT_TARGETS, lora_targets
from safemoe_jax.models.params import Params, ParamSpec, is_adapter, shardings
from safemoe_jax.models.transformer import declare

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
_PREFIX = "base_model.model."
# Fields that are read, or that change nothing about what a written adapter computes. PEFT keeps adding
# options, and one that is not known here may change everything: any other field must be off.
_KNOWN_FIELDS = {
    *("r", "lora_alpha", "use_rslora", "bias", "init_lora_weights", "target_modules", "target_parameters"),
    *("peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping"),
    *("inference_mode", "lora_dropout", "exclude_modules", "layers_pattern", "ensure_weight_tying"),
    *("eva_config", "corda_config", "loftq_config", "lora_ga_config", "runtime_config"),
    *("qalora_group_size", "megatron_core"),
}
# PEFT's other ways to initialise (pissa, olora, corda, loftq, lora_ga) change the base weights as well.
_INITIALISED_APART = (None, True, False, "gaussian", "orthogonal", "eva", "mica")


class _Factor(NamedTuple):
    """Where one layer's factor lies: our parameter and index in it, PEFT's tensor name and shape.

    Attributes:
        letter: "a" or "b", which of the two factors it is for PEFT.
        swapped: PEFT takes the inputs for the outputs, so that its A is our B and the other way round.
        interleaved: gate and up alternate in the last axis of our B.
    """

    parameter: str
    at: int
    disk: str
    shape: tuple[int, int]
    letter: str
    swapped: bool
    interleaved: bool


def save_adapter(
    folder: str | Path,
    config: ModelConfig,
    params: Params,
    base_model: str,
    base_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes an adapter folder that PEFT loads onto the base model.

    Args:
        folder: a new or empty folder; it appears whole or not at all.
        config: the network, with its LoRA config.
        params: parameters that include the factors.
        base_model: folder or hub id of the base model, for the adapter's config; a folder of the hub's cache
            is written as the id.
        base_config: the base model's config.json; where it nests the text model, names get its prefix.

    Raises:
        InputError: the model has no adapter, the folder is not empty, or the disk refuses.
    """
    if config.lora is None:
        raise InputError("the model has no adapter", where=str(folder), expected="a model trained with LoRA")
    nested = isinstance((base_config or {}).get("text_config"), Mapping)
    prefix = next(iter(family_of(config.family).table.prefixes), "") if nested else ""
    factors = _factors(config)
    arrays = {
        factor.disk.replace(_PREFIX, _PREFIX + prefix, 1): _to_peft(
            to_host(params[factor.parameter][factor.at]).astype(np.float32), factor
        )
        for factor in factors
    }
    if jax.process_index() != 0:
        return
    with new_folder(folder) as temporary:
        write_arrays(temporary / WEIGHTS, arrays, {"format": "pt"})
        fields = _adapter_config(config, published_name(base_model))
        text = json.dumps(fields, indent=2, sort_keys=True)
        (temporary / CONFIG).write_text(text + "\n", encoding="utf-8")


def published_name(base_model: str) -> str:
    """The hub id of a snapshot in the hub's cache; any other name as it is."""
    cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/", base_model.replace("\\", "/"))
    return f"{cached[1]}/{cached[2]}" if cached else base_model


def _adapter_config(config: ModelConfig, base_model: str) -> dict[str, Any]:
    lora = config.lora
    names = _peft_names(config)
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "target_modules": [t for t in lora.targets if t not in names],
    }
    parameters = [names[target] for target in lora.targets if target in names]
    return {**fields, "target_parameters": parameters} if parameters else fields


def _peft_names(config: ModelConfig) -> dict[str, str]:
    """Target -> what PEFT calls it, for those that transformers 5 keeps as bare parameters of a module."""
    table = family_of(config.family).table
    rows = {"mlp.experts.gate_up_proj": "moe.experts.gate", "mlp.experts.down_proj": "moe.experts.down"}
    rows["gate"] = "moe.router.kernel"
    known = {row.name for row in table.rows}
    in_memory = {t: table.row(row).in_memory.name for t, row in rows.items() if row in known}
    return {target: name.partition("{layer}.")[2] for target, name in in_memory.items()}


def load_adapter(
    folder: str | Path, config: ModelConfig, *, mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """Reads an adapter folder that PEFT (or this project) wrote.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        config: the base network, without adapters.
        mesh: where to put the factors.

    Returns:
        The config with its LoRA config, and the factors, float32 (to be added to the base's parameters).

    Raises:
        InputError: a file is missing or truncated, the adapter uses an option that is not supported, a tensor
            is missing, unmapped, of a wrong shape or not finite.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("no such adapter folder", where=str(folder), expected=f"a folder with {CONFIG}")
    raw = read_json(folder / CONFIG)
    if not (folder / WEIGHTS).exists() and (folder / PICKLED).exists():
        raise InputError(
            "the adapter is a pickle, which can run code when it is read",
            where=str(folder / PICKLED),
            expected=f"{WEIGHTS}: save the adapter with safe_serialization=True",
        )
    prefixes = family_of(config.family).table.prefixes
    found = {_plain(name, prefixes): e.shape for name, e in list_tensors(folder / WEIGHTS).items()}
    config = replace(config, lora=_read_lora(raw, config, found, str(folder / CONFIG)))
    factors = _factors(config)
    _check(factors, found, str(folder / WEIGHTS))
    finite = _finite(read_arrays(folder / WEIGHTS), folder / WEIGHTS)
    arrays = {_plain(name, prefixes): array for name, array in finite}
    specs = {name: spec for name, spec in declare(config).items() if is_adapter(name)}
    placed = shardings(specs, mesh) if mesh is not None else {}
    return config, {
        name: _stack(name, spec, factors, arrays, placed.get(name)) for name, spec in specs.items()
    }


def _plain(name: str, prefixes: Sequence[str]) -> str:
    """A tensor's name as of the text model by itself."""
    for prefix in prefixes:
        name = name.replace(_PREFIX + prefix, _PREFIX, 1)
    return name


def _stack(
    name: str,
    spec: ParamSpec,
    factors: Sequence[_Factor],
    arrays: Mapping[str, np.ndarray],
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    own = sorted((factor for factor in factors if factor.parameter == name), key=lambda factor: factor.at)
    stacked = np.stack([_from_peft(arrays[factor.disk], spec.shape[1:], factor) for factor in own])
    if sharding is None:
        return jnp.asarray(stacked)
    return jax.make_array_from_callback(spec.shape, sharding, lambda index: stacked[index])


def _read_lora(
    raw: Mapping[str, Any], config: ModelConfig, found: Mapping[str, tuple[int, ...]], where: str
) -> LoraConfig:
    if raw.get("peft_type") != "LORA":
        raise InputError(f"adapter of type {raw.get('peft_type')!r}", where=where, expected="peft_type LORA")
    for field, value in raw.items():
        if field not in _KNOWN_FIELDS and value:
            raise InputError(
                f"field '{field}' is {value!r}", where=where, expected="an adapter without this option"
            )
    if raw.get("bias", "none") != "none":
        raise InputError(f"field 'bias' is {raw['bias']!r}", where=where, expected="'none'")
    if raw.get("init_lora_weights") not in _INITIALISED_APART:
        raise InputError(
            f"field 'init_lora_weights' is {raw['init_lora_weights']!r}, which changes the base too",
            where=where,
            expected="an adapter of the unchanged base (PEFT's path_initial_model_for_weight_conversion)",
        )
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise InputError(
            f"r is {rank!r} and lora_alpha {alpha!r}", where=where, expected="two positive numbers"
        )
    # Rank-stabilised LoRA scales by alpha / sqrt(r).
    alpha = alpha * math.sqrt(rank) if raw.get("use_rslora") else float(alpha)
    return LoraConfig(rank=rank, alpha=alpha, targets=_targets(raw, config, found, where))


def _targets(
    raw: Mapping[str, Any], config: ModelConfig, found: Mapping[str, tuple[int, ...]], where: str
) -> tuple[str, ...]:
    """The adapted projections, read from the tensors: `target_modules` may be a pattern, names are names."""
    config = replace(config, lora=None)
    known = lora_targets(config)
    every = replace(config, lora=LoraConfig(rank=1, targets=known))
    # Two parameters of one module differ by their nesting only, so that the config must say which one it is.
    named = {name.rpartition(".")[2] for name in raw.get("target_parameters") or []}
    adapted = {_module(name) for name in found}
    present = {target for target, module in _target_modules(every) if module in adapted}
    targets = tuple(
        t for t in known if t in present and (t not in EXPERT_TARGETS or t.rpartition(".")[2] in named)
    )
    if not targets:
        raise InputError(
            "the adapter adapts no known projection", where=where, expected=f"some of {', '.join(known)}"
        )
    return targets


def _module(tensor: str) -> str:
    return tensor.rpartition(".lora_")[0].removesuffix(".base_layer")


def _target_modules(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(target, adapted module) of all adapters."""
    for factor in _factors(config):
        module = _module(factor.disk)
        if ".experts." in factor.parameter:
            part = "gate_up" if "gate_up" in factor.parameter else "down"
            yield f"mlp.experts.{part}_proj", module
        elif ".router." in factor.parameter:
            yield "gate", module
        else:
            yield module.rpartition(".")[2], module


def _factors(config: ModelConfig) -> list[_Factor]:
    """Every factor of every layer, from the family's tensor table."""
    return [
        factor
        for name, spec in declare(config).items()
        if is_adapter(name)
        for factor in _factors_of(config, name, spec)
    ]


def _factors_of(config: ModelConfig, name: str, spec: ParamSpec) -> Iterator[_Factor]:
    stem, letter = name.rpartition("lora_")[::2]
    is_expert = ".experts." in name
    if is_expert:
        adapted = stem.removesuffix("gate_up_") + "gate" if "gate_up" in name else stem.removesuffix("_")
    else:
        adapted = stem + "kernel"
    source = family_of(config.family).table.row(adapted).in_memory
    # PEFT takes an expert parameter for [E, out, in] unless its module says otherwise: gpt_oss's does, which
    # also interleaves; llama4's is [E, in, out] and does not say so.
    swapped = is_expert and not source.transpose and not source.interleaved
    disk_letter = {"a": "b", "b": "a"}[letter] if swapped else letter
    shape = (*spec.shape[1:-2], spec.shape[-1], spec.shape[-2]) if swapped else spec.shape[1:]
    base = declare(replace(config, lora=None, quantisation=None))[adapted]
    for piece in pieces(config, adapted, base.shape, source):
        module = piece.name.rpartition(".")[0]
        # PEFT wraps gate_up_proj first, so that down_proj's wrapper lies round it.
        inner = "gate_up" in name and "mlp.experts.down_proj" in config.lora.targets
        disk = f"{_PREFIX}{module}{'.base_layer' if inner else ''}.lora_{disk_letter.upper()}.weight"
        mixed = source.interleaved and name.endswith("gate_up_lora_b")
        yield _Factor(name, piece.at[0], disk, _peft_shape(shape, disk_letter), disk_letter, swapped, mixed)


def _peft_shape(shape: Sequence[int], letter: str) -> tuple[int, int]:
    """[in, r] -> A [r, in]; [r, out] -> B [out, r]; with experts in front, E * r in the place of r."""
    *experts, rows, columns = shape
    count = math.prod(experts)
    return (count * columns, rows) if letter == "a" else (columns, count * rows)


def _to_peft(factor: np.ndarray, place: _Factor) -> np.ndarray:
    if factor.ndim == 2:
        return np.ascontiguousarray(factor.T)
    if place.interleaved:
        gate_up = np.split(factor, 2, axis=-1)
        factor = np.stack(gate_up, axis=-1).reshape(factor.shape)
    if place.swapped:
        factor = factor.swapaxes(1, 2)
    axes = (0, 2, 1) if place.letter == "a" else (2, 1, 0)
    return np.ascontiguousarray(factor.transpose(axes).reshape(place.shape))


def _from_peft(array: np.ndarray, shape: Sequence[int], place: _Factor) -> np.ndarray:
    array = array.astype(np.float32)
    if len(shape) == 2:
        return array.T
    experts, rows, columns = (shape[0], shape[2], shape[1]) if place.swapped else shape
    if place.letter == "a":
        factor = array.reshape(experts, columns, rows).transpose(0, 2, 1)
    else:
        factor = array.reshape(columns, rows, experts).transpose(2, 1, 0)
    if place.swapped:
        factor = factor.swapaxes(1, 2)
    if place.interleaved:
        factor = np.concatenate([factor[..., 0::2], factor[..., 1::2]], axis=-1)
    return factor


def _check(factors: Sequence[_Factor], found: Mapping[str, tuple[int, ...]], where: str) -> None:
    for factor in factors:
        if factor.disk not in found:
            raise InputError(
                f"tensor '{factor.disk}' is missing",
                where=where,
                expected=f"a tensor of shape {list(factor.shape)}",
            )
        if tuple(found[factor.disk]) != factor.shape:
            raise InputError(
                f"tensor '{factor.disk}' has shape {list(found[factor.disk])}",
                where=where,
                expected=f"shape {list(factor.shape)} (is it an adapter of this base model?)",
            )
    for name in sorted(set(found) - {factor.disk for factor in factors}):
        raise InputError(
            f"tensor '{name}' maps to no adapter",
            where=where,
            expected="adapters on the same projections in all layers",
        )


def _finite(arrays: Iterator[tuple[str, np.ndarray]], where: Path) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in arrays:
        if not np.isfinite(array.astype(np.float32)).all():
            raise InputError(
                f"tensor '{name}' holds NaN or infinite values", where=str(where), expected="finite values"
            )
        yield name, array
