"""Hugging Face checkpoint folders, in and out, tensor by tensor. Only safetensors: a pickle runs code.

Reading holds at most one stacked parameter and one block of a disk tensor beside the parameters themselves.
With a mesh each process reads only the slices that its devices hold.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from safemoe_jax.checkpoints.atomic import new_folder
from safemoe_jax.checkpoints.safetensors_files import Entry, Planned, Reader, list_tensors, write
from safemoe_jax.errors import InputError
from safemoe_jax.families import family_of
from safemoe_jax.families.tensor_table import Piece, TensorTable, published, resolve
from safemoe_jax.models.config import ModelConfig, check_mesh
from safemoe_jax.models.params import Params, ParamSpec, shardings
from safemoe_jax.models.transformer import declare

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
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_BLOCK_BYTES = 32 * 2**20


def find_folder(path_or_hub_id: str | Path) -> Path:
    """The folder of a checkpoint: as given, or a snapshot fetched from the Hugging Face hub.

    Args:
        path_or_hub_id: a folder, or `owner/name` where no such folder is there.

    Raises:
        InputError: neither a folder nor something that the hub has.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if (
        path.is_absolute()
        or str(path_or_hub_id).startswith((".", "~"))
        or str(path_or_hub_id).count("/") != 1
    ):
        raise InputError(
            "no such folder",
            where=str(path_or_hub_id),
            expected="a checkpoint folder, or a hub id like owner/name",
        )
    return _fetch(str(path_or_hub_id))


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer.model"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"neither a folder here nor a checkpoint that the hub gives: {reason}",
            where=hub_id,
            expected="a checkpoint folder, or a hub id that this machine can reach and may read",
        ) from error


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
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise InputError(
            f"{path.name} cannot be read: {error}", where=str(path), expected="valid JSON"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path.name} is no object", where=str(path), expected="a JSON object")
    return value


def read_config(folder: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The network that a folder holds, and its config.json as it is.

    Raises:
        InputError: config.json is missing or malformed, its model_type is unknown, a field is wrong.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        raise InputError(
            "this folder holds an adapter, not a model",
            where=str(folder),
            expected="the base model's folder as the model, and this one as its adapter",
        )
    raw = read_json(folder / "config.json")
    try:
        return family_of(raw.get("model_type")).read_config(raw), raw
    except InputError as error:
        where = str(folder / "config.json")
        raise InputError(error.what, where=where, expected=error.expected) from error


def list_checkpoint(folder: str | Path) -> dict[str, Entry]:
    """Every tensor of a folder, from the headers of its safetensors files.

    Raises:
        InputError: there are no safetensors (only pickles, or nothing), a shard is missing or truncated, or
            two shards hold the same tensor.
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
        return [folder / name for name in sorted(set(names.values()))]
    if any(path for pattern in _PICKLES for path in folder.glob(pattern)):
        raise InputError(
            "the checkpoint has only pickle files, which can run code when read",
            where=str(folder),
            expected="safetensors (transformers' save_pretrained writes them)",
        )
    raise InputError("no weights", where=str(folder), expected=f"{SINGLE}, or {INDEX} and its files")


def load_params(
    folder: str | Path, config: ModelConfig, *, dtype: str | None = None, mesh: Mesh | None = None
) -> Params:
    """The parameters of a checkpoint.

    Args:
        folder: a checkpoint folder.
        config: its network, as `read_config` gives it.
        dtype: "float32" or "bfloat16"; by default bfloat16 stays, everything else becomes float32.
        mesh: where to put them; without one, on the default device.

    Returns:
        Flat name -> array, exactly those that `declare(config)` names (without adapters).

    Raises:
        InputError: names the tensor that is missing, unmapped, duplicate, of a wrong shape or not finite.
    """
    folder = Path(folder)
    check_mesh(config, mesh)
    specs = declare(config)
    table = family_of(config.family).table
    entries = list_checkpoint(folder)
    plan = resolve(config, table, specs, {name: entry.shape for name, entry in entries.items()}, str(folder))
    placed = shardings(specs, mesh) if mesh is not None else {}
    with Reader() as reader:
        _check_tied(reader, table, config, entries)
        return {
            name: _load_one(reader, entries, specs[name], places, dtype, placed.get(name))
            for name, places in plan.items()
        }


def _load_one(
    reader: Reader,
    entries: Mapping[str, Entry],
    spec: ParamSpec,
    places: Sequence[Piece],
    dtype: str | None,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    target = _target_dtype(entries[places[0].name].dtype, dtype)
    if sharding is None:
        whole = _read_slice(reader, entries, places, [slice(0, n) for n in spec.shape], target)
        return jax.block_until_ready(jax.device_put(whole))
    read: dict[tuple, np.ndarray] = {}

    def fetch(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(part.indices(n)[:2] for part, n in zip(index, spec.shape, strict=True))
        if bounds not in read:
            read[bounds] = _read_slice(reader, entries, places, [slice(*b) for b in bounds], target)
        return read[bounds]

    return jax.block_until_ready(jax.make_array_from_callback(spec.shape, sharding, fetch))


def _target_dtype(stored: np.dtype, wanted: str | None) -> np.dtype:
    if wanted is None:
        return stored if stored == ml_dtypes.bfloat16 else np.dtype(np.float32)
    return np.dtype(jnp.dtype(wanted))


def _read_slice(
    reader: Reader,
    entries: Mapping[str, Entry],
    places: Sequence[Piece],
    index: Sequence[slice],
    dtype: np.dtype,
) -> np.ndarray:
    """A slice of a parameter, assembled from the disk tensors that it covers."""
    out = np.empty([part.stop - part.start for part in index], dtype)
    for piece in places:
        lead = index[: len(piece.at)]
        if all(part.start <= i < part.stop for part, i in zip(lead, piece.at, strict=True)):
            target = out[tuple(i - part.start for part, i in zip(lead, piece.at, strict=True))]
            _read_piece(reader, entries[piece.name], piece, index[len(piece.at) :], target)
    return out


def _read_piece(reader: Reader, entry: Entry, piece: Piece, index: Sequence[slice], out: np.ndarray) -> None:
    """Copies a block of a disk tensor into `out`, in bounded steps along the disk tensor's first axis."""
    axis = 1 if piece.source.transpose and len(index) == 2 else 0
    first = index[axis].start
    for start, stop in _steps(index[axis], out.nbytes):
        step = [*index[:axis], slice(start, stop), *index[axis + 1 :]]
        block = reader.read(entry.path, piece.name, piece.disk_index(step))
        if not np.isfinite(block.astype(np.float32, copy=False)).all():
            raise InputError(
                f"tensor '{piece.name}' holds NaN or infinite values",
                where=str(entry.path),
                expected="finite weights (the run that wrote them may have diverged)",
            )
        target = out[(slice(None),) * axis + (slice(start - first, stop - first),)]
        target[...] = np.swapaxes(block, -1, -2) if piece.source.transpose else block


def _steps(rows: slice, nbytes: int) -> list[tuple[int, int]]:
    count = rows.stop - rows.start
    step = max(1, count * _BLOCK_BYTES // max(nbytes, 1))
    return [(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]


def _check_tied(
    reader: Reader, table: TensorTable, config: ModelConfig, entries: Mapping[str, Entry]
) -> None:
    """A tied model may still carry its output projection; it must then be the embedding, bit for bit."""
    copies = (table.tied or {}).items() if config.tie_embeddings else ()
    for name, original in copies:
        if name not in entries:
            continue
        same = entries[name].shape == entries[original].shape and all(
            np.array_equal(
                reader.read(entries[name].path, name, index),
                reader.read(entries[original].path, original, index),
            )
            for index in _row_blocks(entries[name])
        )
        if not same:
            raise InputError(
                f"tensor '{name}' is not '{original}', but config.json ties them",
                where=str(entries[name].path),
                expected="equal tensors, or tie_word_embeddings false",
            )


def _row_blocks(entry: Entry) -> list[tuple[slice, ...]]:
    rows, rest = entry.shape[0], [slice(0, n) for n in entry.shape[1:]]
    nbytes = int(np.prod(entry.shape)) * entry.dtype.itemsize
    return [(slice(start, stop), *rest) for start, stop in _steps(slice(0, rows), nbytes)]


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
        write_beside: writes further files (tokenizer, chat template) into the folder it is given.
        max_file_bytes: size above which the weights go into several files.

    Raises:
        InputError: the folder is there and not empty, or the disk refuses.
    """
    assert config.lora is None, "merge the adapters first"
    plan = published(config, family_of(config.family).table, declare(config))
    files = _split(_planned(plan, params), max_file_bytes)
    arrays = _disk_arrays(plan, params)
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


def _planned(plan: Mapping[str, Sequence[Piece]], params: Params) -> list[Planned]:
    return [
        Planned(piece.name, piece.shape, np.dtype(params[name].dtype))
        for name, places in plan.items()
        for piece in places
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


def _disk_arrays(plan: Mapping[str, Sequence[Piece]], params: Params) -> Iterator[np.ndarray]:
    """The disk tensors in the plan's order; one layer of one parameter is on the host at a time."""
    for name, places in plan.items():
        layer, host = None, None
        for piece in places:
            if layer != piece.at[:1] or host is None:
                layer = piece.at[:1]
                host = to_host(params[name][layer] if layer else params[name])
            array = host[piece.at[1:]]
            yield np.swapaxes(array, -1, -2) if piece.source.transpose else array


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
    own = family_of(config.family).write_config(config)
    superseded = {"dtype", "rope_parameters", "num_local_experts", "transformers_version"}
    kept = {key: value for key, value in extra.items() if key not in superseded}
    return {**kept, **own, "torch_dtype": str(params["embed.embedding"].dtype)}
