"""Hugging Face checkpoint folders, in and out, tensor by tensor. Only safetensors: a pickle runs code.

Reading holds at most one stacked parameter on the host beside the parameters themselves (`reading`). With a
mesh each process reads only the slices that its devices hold; of weights that it rounds, all inputs of them.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from safemoe_jax.checkpoints.atomic import new_folder
from safemoe_jax.checkpoints.reading import Loader, check_scales, check_tied, stored_dtype, target_dtype
from safemoe_jax.checkpoints.safetensors_files import Entry, Planned, list_tensors, write
from safemoe_jax.errors import InputError
from safemoe_jax.families import family_of
from safemoe_jax.families.tensor_table import Piece, Row, TensorTable, by_tensor, left_out, published, resolve
from safemoe_jax.models.config import ModelConfig, check_mesh
from safemoe_jax.models.params import Params, ParamSpec, shardings
from safemoe_jax.models.quantisation import quantised_weights
from safemoe_jax.models.quantised import PARTS, Quantisation, part_specs
from safemoe_jax.models.transformer import declare
from safemoe_jax.parallel.mesh import named_sharding

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What travels with the weights: tokenizer, chat template, generation defaults.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
)
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token")
# The methods of a config.json's `quantization_config` whose tensors are read (`reading`).
_QUANTISATIONS = ("fp8", "mxfp4")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Fields that another spelling replaces, or that describe how the weights were stored.
_SUPERSEDED = {
    "dtype",
    "num_local_experts",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "quantization_config",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "transformers_version",
}
_WORTH_TELLING_GB = 0.1
Tensors = Mapping[str, Sequence[tuple[str, Piece]]]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: the file is missing, malformed or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path.name} is missing", where=str(path.parent), expected=f"a folder with {path.name}"
        ) from error
    except (ValueError, RecursionError, OSError) as error:  # a number of too many digits is a ValueError
        raise InputError(
            f"{path.name} cannot be read: {error}", where=str(path), expected="valid JSON"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path.name} is no object", where=str(path), expected="a JSON object")
    return value


def read_config(folder: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The network that a folder holds, and its config.json as it is.

    Raises:
        InputError: config.json is missing or malformed, its model_type is unknown, a field is wrong, or the
            weights are quantised by a method that is not read.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        raise InputError(
            "this folder holds an adapter, not a model",
            where=str(folder),
            expected="the base model's folder as the model, and this one as its adapter",
        )
    raw = read_json(folder / "config.json")
    _check_quantisation(raw, folder / "config.json")
    try:
        return family_of(raw.get("model_type")).read_config(raw), raw
    except InputError as error:
        where = str(folder / "config.json")
        raise InputError(error.what, where=where, expected=error.expected) from error


def _check_quantisation(raw: Mapping[str, Any], path: Path) -> None:
    """Other methods publish integers under the weights' names or beside them; which numbers they stand for
    only their own code knows."""
    nested = raw.get("text_config")
    found = raw.get("quantization_config") or (
        nested.get("quantization_config") if isinstance(nested, Mapping) else None
    )
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    if found and method not in _QUANTISATIONS:
        raise InputError(
            f"the weights are quantised by {repr(method) if method else 'a method without a name'}",
            where=f"{path}, field quantization_config",
            expected=f"weights in floats, or quantised by {' or '.join(_QUANTISATIONS)}",
        )


def list_checkpoint(folder: str | Path) -> dict[str, Entry]:
    """Every tensor of a folder, from the headers of its safetensors files.

    Raises:
        InputError: there are no safetensors (only pickles, or nothing), a shard is missing or truncated, or
            two shards hold the same tensor, or the index names no files of the folder.
    """
    folder = Path(folder)
    entries: dict[str, Entry] = {}
    for path in _files(folder):
        for name, entry in list_tensors(path).items():
            if name in entries:
                raise InputError(
                    f"duplicate: tensor '{name}' is in two files",
                    where=f"{entries[name].path} and {path}",
                    expected="each tensor once",
                )
            entries[name] = entry
    return entries


def _files(folder: Path) -> list[Path]:
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise InputError("no weight_map", where=str(folder / INDEX), expected="tensor name -> file name")
        _check_names(names, folder / INDEX)
        return [folder / name for name in sorted(set(names.values()))]
    if any(path for pattern in _PICKLES for path in folder.glob(pattern)):
        raise InputError(
            "the checkpoint has only pickle files, which can run code when read",
            where=str(folder),
            expected="safetensors (transformers' save_pretrained writes them)",
        )
    raise InputError("no weights", where=str(folder), expected=f"{SINGLE}, or {INDEX} and its files")


def _check_names(weight_map: Mapping[str, Any], path: Path) -> None:
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file or file == ".." or Path(file).name != file:
            raise InputError(
                f"tensor '{tensor}' is in {file!r}",
                where=f"{path}, field weight_map",
                expected="the name of a file in this folder",
            )


def load_params(
    folder: str | Path,
    config: ModelConfig,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    quantisation: Quantisation | None = None,
) -> Params:
    """The parameters of a checkpoint.

    Reports tensors that are left out, and for a folder that is not tiny the time per GB, on stderr.

    Args:
        folder: a checkpoint folder.
        config: its network, as `read_config` gives it.
        dtype: "float32" or "bfloat16"; by default bfloat16 stays, everything else becomes float32.
        mesh: where to put them; without one, on the default device.
        quantisation: rounds the kernels of attention, experts and feed-forwards while they are read.

    Returns:
        Flat name -> array, exactly those that `declare(replace(config, quantisation=quantisation))` names
        (without adapters).

    Raises:
        InputError: names the tensor that is missing, unmapped, duplicate, of a wrong shape, of integers or
            not finite.
    """
    return dict(read_params(folder, config, dtype=dtype, mesh=mesh, quantisation=quantisation))


def read_params(
    folder: str | Path,
    config: ModelConfig,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    quantisation: Quantisation | None = None,
) -> Iterator[tuple[str, jax.Array]]:
    """The items of `load_params` one at a time, for who does not keep them all.

    Raises:
        InputError: as `load_params`, when the first one is asked for or the wrong tensor is reached.
    """
    folder, started = Path(folder), time.perf_counter()
    check_mesh(config, mesh)
    specs = declare(config)
    table = family_of(config.family).table
    entries = _without_prefixes(table, list_checkpoint(folder))
    plan = resolve(config, table, specs, {name: entry.shape for name, entry in entries.items()}, str(folder))
    check_scales(entries)
    _check_numbers(plan, entries)
    placed = shardings(specs, mesh) if mesh is not None else {}
    chosen = {} if quantisation is None else quantised_weights(config, quantisation)
    rounded = {name: part_shardings(name, specs[name], quantisation, mesh) for name in chosen}
    with Loader(entries) as loader:
        check_tied(loader.reader, (table.tied or {}) if config.tie_embeddings else {}, entries)
        for name, places in plan.items():
            if name not in rounded:
                stored = _dtype(table.row(name), entries, places[0], dtype)
                yield name, loader.load(specs[name], places, stored, placed.get(name))
        for name, parts in rounded.items():
            found = loader.load_quantised(specs[name], plan[name], quantisation, parts)
            for part, value in zip(PARTS, found, strict=True):
                yield f"{name}.{part}", value
    _tell(left_out(config, table, list(entries)), plan, entries, time.perf_counter() - started)


def part_shardings(
    name: str, spec: ParamSpec, quantisation: Quantisation, mesh: Mesh | None
) -> list[NamedSharding] | None:
    """Where `values` and `scales` of a weight lie on the mesh; None without one.

    Raises:
        InputError: the mesh does not divide them.
    """
    if mesh is None:
        return None
    declared = part_specs(spec, quantisation)
    found = [named_sharding(mesh, part.axes) for part in declared]
    for part, sharding in zip(declared, found, strict=True):
        try:
            sharding.shard_shape(part.shape)
        except ValueError as error:
            raise InputError(
                f"the mesh does not divide '{name}' in {quantisation}: {part.shape}",
                where="mesh",
                expected="sizes that divide it, or no quantisation",
            ) from error
    return found


def _dtype(row: Row, entries: Mapping[str, Entry], piece: Piece, wanted: str | None) -> np.dtype:
    return np.dtype(np.float32) if row.float32 else target_dtype(stored_dtype(entries, piece), wanted)


def _check_numbers(plan: Mapping[str, Sequence[Piece]], entries: Mapping[str, Entry]) -> None:
    """Only of packed tensors are the integers read as what they stand for."""
    plain = (piece.name for places in plan.values() for piece in places if not piece.source.packed)
    for name in plain:
        if entries[name].dtype.kind in "iu":
            raise InputError(
                f"tensor '{name}' holds integers ({entries[name].dtype})",
                where=str(entries[name].path),
                expected="floats of 16, 32 or 64 bits, FP8 with its scales, or experts packed as MXFP4",
            )


def _without_prefixes(table: TensorTable, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    plain: dict[str, Entry] = {}
    for name, entry in entries.items():
        if table.plain_name(name) in plain:
            raise InputError(
                f"duplicate: tensor '{table.plain_name(name)}' is there with a prefix and without",
                where=str(entry.path),
                expected="each tensor once",
            )
        plain[table.plain_name(name)] = entry
    return plain


def _tell(
    skipped: Mapping[str, int],
    plan: Mapping[str, Sequence[Piece]],
    entries: Mapping[str, Entry],
    seconds: float,
) -> None:
    lines = [f"left out {count} tensors of {module}" for module, count in skipped.items()]
    names = {name for places in plan.values() for piece in places for name in piece.tensors}
    size = sum(entries[name].nbytes for name in names) / 1e9
    if size > _WORTH_TELLING_GB:
        lines.append(f"read {size:.2f} GB in {seconds:.1f} s, {seconds / size:.2f} s per GB")
    for line in lines:
        print(line, file=sys.stderr)


def save_folder(
    folder: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    extra_config: Mapping[str, Any] | None = None,
    write_beside: Callable[[Path], object] | None = None,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Writes a checkpoint folder in the family's published layout, which transformers loads.

    The folder appears whole or not at all; nothing that is there is deleted.

    Args:
        folder: a new or empty folder.
        config: the network, without adapters (merge them first).
        params: its parameters; with several processes every one of them calls, the first one writes.
        extra_config: further fields of config.json (token ids and the like); the network's own fields win.
            Without any, the token ids are null: a field that is absent would get the family's default, which
            need not even be in the vocabulary.
        write_beside: writes further files (tokenizer, chat template) into the folder it is given.
        max_file_bytes: size above which the weights go into several files.

    Raises:
        InputError: the folder is there and not empty, or the disk refuses.
    """
    assert config.lora is None, "merge the adapters first"
    tensors = by_tensor(published(config, family_of(config.family).table, declare(config)))
    files = _split(_planned(tensors, params), max_file_bytes)
    arrays = _disk_arrays(tensors, params)
    if jax.process_index() != 0:
        for _ in arrays:
            pass
        return
    with new_folder(folder) as temporary:
        for name, planned in files.items():
            taken = (next(arrays) for _ in planned)
            write(temporary / name, planned, taken, {"format": "pt"})
        if len(files) > 1:
            _write_index(temporary / INDEX, files)
        text = json.dumps(_config_fields(config, params, extra_config or {}), indent=2, sort_keys=True)
        (temporary / "config.json").write_text(text + "\n", encoding="utf-8")
        if write_beside is not None:
            write_beside(temporary)


def copy_companions(source: Path, target: Path) -> None:
    """Copies what belongs beside the weights: tokenizer, chat template, generation defaults."""
    for name in COMPANIONS:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _planned(tensors: Tensors, params: Params) -> list[Planned]:
    return [
        Planned(name, parts[0][1].shape, np.dtype(params[parts[0][0]].dtype))
        for name, parts in tensors.items()
    ]


def _split(planned: Sequence[Planned], max_bytes: int) -> dict[str, list[Planned]]:
    groups: list[list[Planned]] = [[]]
    size = 0
    for plan in planned:
        if groups[-1] and size + plan.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(plan)
        size += plan.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _disk_arrays(tensors: Tensors, params: Params) -> Iterator[np.ndarray]:
    """The disk tensors in the plan's order; one layer of the parameters that fill one is on the host."""
    held: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}
    for parts in tensors.values():
        keys = [(parameter, piece.at[:1]) for parameter, piece in parts]
        held = {key: value for key, value in held.items() if key in keys}
        for parameter, layer in keys:
            if (parameter, layer) not in held:
                held[parameter, layer] = to_host(params[parameter][layer] if layer else params[parameter])
        blocks = [(piece, held[key][piece.at[1:]]) for key, (_, piece) in zip(keys, parts, strict=True)]
        yield _disk_array(blocks)


def _disk_array(blocks: Sequence[tuple[Piece, np.ndarray]]) -> np.ndarray:
    """One disk tensor from the parameters that it holds."""
    if len(blocks) == 1:
        piece, block = blocks[0]
        block = np.swapaxes(block, -1, -2) if piece.source.transpose else block
        return block[None] if piece.source.boxed else block
    out = np.empty(blocks[0][0].shape, blocks[0][1].dtype)
    for piece, block in blocks:
        place = out[piece.disk_index([slice(0, n) for n in block.shape])]
        place[...] = np.swapaxes(block, -1, -2) if piece.source.transpose else block
    return out


def to_host(array: jax.Array) -> np.ndarray:
    """An array on this host, gathered where other processes hold parts of it (then all of them must call)."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _write_index(path: Path, files: Mapping[str, Sequence[Planned]]) -> None:
    total = sum(plan.nbytes for planned in files.values() for plan in planned)
    names = {plan.name: file for file, planned in files.items() for plan in planned}
    path.write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=2) + "\n",
        encoding="utf-8",
    )


def _config_fields(config: ModelConfig, params: Params, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The family's fields and those of the checkpoint that say nothing about the network."""
    own = family_of(config.family).write_config(config)
    extra = extra or dict.fromkeys(f"{name}_id" for name in SPECIAL_TOKENS)
    if isinstance(extra.get("text_config"), Mapping) and "text_config" not in own:
        extra = extra["text_config"]  # the text model by itself
    kept = {key: value for key, value in extra.items() if key not in _SUPERSEDED}
    return {**kept, **own, "torch_dtype": str(params["embed.embedding"].dtype)}
