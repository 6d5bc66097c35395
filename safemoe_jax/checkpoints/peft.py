"""LoRA adapters in PEFT's format (`adapter_config.json`, `adapter_model.safetensors`), in and out.

Names and layouts as PEFT 0.21 writes them. Projections: `lora_A.weight` [r, in], `lora_B.weight` [out, r].
Expert matrices are adapted as parameters (`target_parameters`), whose factors hold all experts: A is
[E * r, in], expert-major, B is [out, r * E], expert-minor. PEFT nests the wrappers of two parameters of one
module: the first one's factors (gate_up_proj) then go under `base_layer`.

Legend: R layers of a segment, E experts, D inputs, O outputs, r rank.
"""

from __future__ import annotations

import json
import math
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
from safemoe_jax.models.lora import EXPERT_TARGETS
from safemoe_jax.models.params import Params, ParamSpec, is_adapter, shardings
from safemoe_jax.models.transformer import declare

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ROUTER_PARAMETER = "mlp.gate.weight"
_PREFIX = "base_model.model."
# Options of PEFT that this project does not compute, with the value that changes nothing.
_UNSUPPORTED = {
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layers_to_transform": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "use_qalora": False,
}


class _Factor(NamedTuple):
    """Where one layer's factor lies: our parameter and index in it, PEFT's tensor name and shape."""

    parameter: str
    at: int
    disk: str
    shape: tuple[int, int]


def save_adapter(folder: str | Path, config: ModelConfig, params: Params, base_model: str) -> None:
    """Writes an adapter folder that PEFT loads onto the base model.

    Args:
        folder: a new or empty folder; it appears whole or not at all.
        config: the network, with its LoRA config.
        params: parameters that include the factors.
        base_model: folder or hub id of the base model, for the adapter's config.

    Raises:
        InputError: the model has no adapter, the folder is not empty, or the disk refuses.
    """
    if config.lora is None:
        raise InputError("the model has no adapter", where=str(folder), expected="a model trained with LoRA")
    arrays = {
        factor.disk: _to_peft(to_host(params[factor.parameter][factor.at]).astype(np.float32), factor)
        for factor in _factors(config)
    }
    if jax.process_index() != 0:
        return
    with new_folder(folder) as temporary:
        write_arrays(temporary / WEIGHTS, arrays, {"format": "pt"})
        text = json.dumps(_adapter_config(config.lora, base_model), indent=2, sort_keys=True)
        (temporary / CONFIG).write_text(text + "\n", encoding="utf-8")


def _adapter_config(lora: LoraConfig, base_model: str) -> dict[str, Any]:
    parameters = [target for target in lora.targets if target in EXPERT_TARGETS]
    if "gate" in lora.targets:
        # transformers 5 keeps the router's weight as a bare parameter, not in a linear module.
        parameters.append(ROUTER_PARAMETER)
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
        "target_modules": [t for t in lora.targets if t.endswith("_proj") and t not in EXPERT_TARGETS],
    }
    return {**fields, "target_parameters": parameters} if parameters else fields


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
    found = {name: entry.shape for name, entry in list_tensors(folder / WEIGHTS).items()}
    config = replace(config, lora=_read_lora(raw, found, str(folder / CONFIG)))
    factors = _factors(config)
    _check(factors, found, str(folder / WEIGHTS))
    arrays = dict(_finite(read_arrays(folder / WEIGHTS), folder / WEIGHTS))
    specs = {name: spec for name, spec in declare(config).items() if is_adapter(name)}
    placed = shardings(specs, mesh) if mesh is not None else {}
    return config, {
        name: _stack(name, spec, factors, arrays, placed.get(name)) for name, spec in specs.items()
    }


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


def _read_lora(raw: Mapping[str, Any], found: Mapping[str, tuple[int, ...]], where: str) -> LoraConfig:
    if raw.get("peft_type") != "LORA":
        raise InputError(f"adapter of type {raw.get('peft_type')!r}", where=where, expected="peft_type LORA")
    for field, harmless in _UNSUPPORTED.items():
        if raw.get(field) and raw[field] != harmless:
            raise InputError(f"field '{field}' is {raw[field]!r}", where=where, expected=f"{harmless!r}")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise InputError(
            f"r is {rank!r} and lora_alpha {alpha!r}", where=where, expected="two positive numbers"
        )
    # Rank-stabilised LoRA scales by alpha / sqrt(r).
    alpha = alpha * math.sqrt(rank) if raw.get("use_rslora") else float(alpha)
    return LoraConfig(rank=rank, alpha=alpha, targets=_targets(raw, found, where))


def _targets(raw: Mapping[str, Any], found: Mapping[str, tuple[int, ...]], where: str) -> tuple[str, ...]:
    """The adapted projections, read from the tensors: `target_modules` may be a pattern, names are names."""
    modules = {name.rpartition(".lora_")[0].removeprefix(_PREFIX) for name in found}
    parts = {module.removesuffix(".base_layer").rpartition(".")[2] for module in modules}
    targets = [part for part in ("q_proj", "k_proj", "v_proj", "o_proj", "gate") if part in parts]
    if "experts" in parts:
        named = raw.get("target_parameters") or []
        targets += [
            t for t in EXPERT_TARGETS if any(t == n or t.endswith(f".{n}") or n.endswith(t) for n in named)
        ]
    if not targets:
        raise InputError(
            "the adapter adapts no known projection", where=where, expected="q_proj, v_proj, ..."
        )
    return tuple(targets)


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
    if name.endswith(("gate_up_lora_a", "gate_up_lora_b")):
        adapted, fused = stem.removesuffix("gate_up_") + "gate", True
    elif ".experts." in name:
        adapted, fused = stem.removesuffix("_"), True
    else:
        adapted, fused = stem + "kernel", False
    source = family_of(config.family).table.row(adapted).sources[1 if fused else 0]
    base = declare(replace(config, lora=None))[adapted]
    for piece in pieces(config, adapted, base.shape, source):
        module = piece.name.rpartition(".")[0]
        # PEFT wraps gate_up_proj first, so that down_proj's wrapper lies round it.
        inner = "gate_up" in name and "mlp.experts.down_proj" in config.lora.targets
        disk = f"{_PREFIX}{module}{'.base_layer' if inner else ''}.lora_{letter.upper()}.weight"
        yield _Factor(name, piece.at[0], disk, _peft_shape(spec.shape[1:], letter))


def _peft_shape(shape: Sequence[int], letter: str) -> tuple[int, int]:
    """[in, r] -> A [r, in]; [r, out] -> B [out, r]; with experts in front, E * r in the place of r."""
    *experts, rows, columns = shape
    count = math.prod(experts)
    return (count * columns, rows) if letter == "a" else (columns, count * rows)


def _to_peft(factor: np.ndarray, place: _Factor) -> np.ndarray:
    if factor.ndim == 2:
        return np.ascontiguousarray(factor.T)
    axes = (0, 2, 1) if place.parameter.endswith("lora_a") else (2, 1, 0)
    return np.ascontiguousarray(factor.transpose(axes).reshape(place.shape))


def _from_peft(array: np.ndarray, shape: Sequence[int], place: _Factor) -> np.ndarray:
    array = array.astype(np.float32)
    if len(shape) == 2:
        return array.T
    experts, rows, columns = shape
    if place.parameter.endswith("lora_a"):
        return array.reshape(experts, columns, rows).transpose(0, 2, 1)
    return array.reshape(columns, rows, experts).transpose(2, 1, 0)


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
