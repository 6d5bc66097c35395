"""Speed of loading a checkpoint folder, against safetensors alone on the same folder.

    python experiments/bench_loading.py            1.2 GB a folder; writes experiments/bench_loading.{json,md}
    python experiments/bench_loading.py --layers 1 --rounds 1      smaller and shorter, printed only

What is compared: `safetensors` alone is `safetensors.numpy.load_file` of every file of the folder, with all
tensors kept, because that is what loading is for. Ours is `load_params`: the same bytes checked, stacked,
transposed and on the devices. Both read files that the system has in memory already, take turns in one
process, and free what they loaded before the other one's clock starts; medians are compared. Before either
clock starts, as much memory is written to and freed: a virtual machine gives idle memory back to its host,
and to get it again takes about ten times as long as loading, whoever's turn it falls to.
Three folders: the published OLMoE layout (one tensor an expert and projection) in float32 and in bfloat16,
and the fused layout of transformers 5. Each is loaded onto one device and onto meshes of 8 fake ones. GB/s
counts the folder's bytes. A mesh with data 2 holds every parameter twice; CPU devices of one process share
the memory of what they both hold.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import safetensors
from jax.sharding import Mesh
from safetensors.numpy import load_file

from safemoe_jax.checkpoints.huggingface import load_params, read_config
from safemoe_jax.checkpoints.safetensors_files import Planned, write
from safemoe_jax.parallel.mesh import MeshConfig, make_mesh

# OLMoE-1B-7B's sizes of a tensor; fewer experts, layers and words.
CONFIG = {
    "model_type": "olmoe",
    "vocab_size": 4096,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_experts": 22,
    "num_experts_per_tok": 8,
    "rms_norm_eps": 1e-5,
}
LAYERS = 2
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
FOLDERS = (("published", "float32"), ("published", "bfloat16"), ("fused", "float32"))
MESHES = {
    "1 device": None,
    "8 devices (data 2, fsdp 2, tensor 2)": MeshConfig(data=2, fsdp=2, tensor=2),
    "8 devices (expert 2, fsdp 4)": MeshConfig(expert=2, fsdp=4),
}
WANTED = 0.6
HERE = Path(__file__).parent


def layer_shapes(config: dict, layer: int, layout: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a layer's tensors."""
    d, f, e = config["hidden_size"], config["intermediate_size"], config["num_experts"]
    stem = f"model.layers.{layer}"
    yield from ((f"{stem}.self_attn.{p}_proj.weight", (d, d)) for p in "qkvo")
    yield from ((f"{stem}.self_attn.{p}_norm.weight", (d,)) for p in "qk")
    yield from ((f"{stem}.{n}_layernorm.weight", (d,)) for n in ("input", "post_attention"))
    yield f"{stem}.mlp.gate.weight", (e, d)
    if layout == "fused":
        yield f"{stem}.mlp.experts.gate_up_proj", (e, 2 * f, d)
        yield f"{stem}.mlp.experts.down_proj", (e, d, f)
        return
    for i in range(e):
        yield from ((f"{stem}.mlp.experts.{i}.{p}_proj.weight", (f, d)) for p in ("gate", "up"))
        yield f"{stem}.mlp.experts.{i}.down_proj.weight", (d, f)


def write_folder(folder: Path, config: dict, layout: str, dtype: str) -> int:
    """Writes a random checkpoint of the olmoe family, a file a layer and one for the rest.

    Args:
        folder: a new folder.
        config: what its config.json says.
        layout: "published" (one tensor an expert and projection) or "fused" (transformers 5).
        dtype: "float32" or "bfloat16".

    Returns:
        Bytes of its tensors.
    """
    folder.mkdir()
    words = (config["vocab_size"], config["hidden_size"])
    groups = [{"model.embed_tokens.weight": words, "lm_head.weight": words, "model.norm.weight": words[1:]}]
    groups += [dict(layer_shapes(config, i, layout)) for i in range(config["num_hidden_layers"])]
    rng, files = np.random.default_rng(0), {}
    for i, shapes in enumerate(groups):
        file = f"model-{i:05d}.safetensors"
        planned = [Planned(name, shape, DTYPES[dtype]) for name, shape in shapes.items()]
        write(
            folder / file,
            planned,
            (rng.standard_normal(p.shape, np.float32).astype(p.dtype) for p in planned),
            {},
        )
        files |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text(json.dumps(config))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def load_alone(folder: Path) -> list[dict[str, np.ndarray]]:
    """All tensors of a folder, by safetensors."""
    return [load_file(path) for path in sorted(folder.glob("*.safetensors"))]


def load_ours(folder: Path, mesh: Mesh | None) -> dict[str, jax.Array]:
    """All parameters of a folder, on one device or in the mesh's shardings."""
    return jax.block_until_ready(load_params(folder, read_config(folder)[0], mesh=mesh))


def seconds_of(load: Callable[[], object], size: int) -> float:
    """Seconds of one loading of `size` bytes; what it gives is freed after the clock has stopped."""
    gc.collect()
    np.ones(size + size // 4, np.uint8)  # freed at once: memory that the machine has at hand
    started = time.perf_counter()
    loaded = load()
    seconds = time.perf_counter() - started
    del loaded
    return seconds


def compare(folder: Path, size: int, mesh: Mesh | None, rounds: int) -> dict[str, float]:
    """GB/s of both and their ratio: medians of alternating rounds after one that is not measured."""
    runs = {"safetensors": lambda: load_alone(folder), "safemoe_jax": lambda: load_ours(folder, mesh)}
    taken = [{name: seconds_of(run, size) for name, run in runs.items()} for _ in range(rounds + 1)][1:]
    speed = {name: size / 1e9 / statistics.median(turn[name] for turn in taken) for name in runs}
    return {**speed, "ratio": speed["safemoe_jax"] / speed["safetensors"]}


def table(results: dict) -> str:
    """The results as Markdown."""
    lines = [
        "# Speed of loading",
        "",
        "`python experiments/bench_loading.py` wrote this file; its docstring says what is compared. GB/s.",
        "",
        f"| folder | onto | safemoe_jax | safetensors alone | ratio (wanted: {WANTED} or more) |",
        "|---|---|---|---|---|",
    ]
    for row in results["measurements"]:
        lines.append(
            f"| {row['layout']}, {row['dtype']}, {row['gigabytes']:.2f} GB | {row['onto']} "
            f"| {row['safemoe_jax']:.2f} | {row['safetensors']:.2f} | {row['ratio']:.2f} |"
        )
    return "\n".join([*lines, "", ", ".join(f"{k} {v}" for k, v in results["environment"].items()), ""])


def main() -> None:
    """Measures every folder on every mesh."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--layers", type=int, default=LAYERS, help="of the float32 folders; bfloat16 has two times as many"
    )
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    rows = []
    for layout, dtype in FOLDERS:
        layers = arguments.layers * 4 // DTYPES[dtype].itemsize
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            size = write_folder(folder, {**CONFIG, "num_hidden_layers": layers}, layout, dtype)
            for onto, sizes in MESHES.items():
                mesh = None if sizes is None else make_mesh(sizes)
                row = {"layout": layout, "dtype": dtype, "gigabytes": size / 1e9, "onto": onto}
                rows.append(row | compare(folder, size, mesh, arguments.rounds))
                print(json.dumps(rows[-1]), flush=True)
    environment = {
        "jax": jax.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    results = {"environment": environment, "measurements": rows}
    if arguments.layers == LAYERS:
        (HERE / "bench_loading.json").write_text(json.dumps(results, indent=1) + "\n")
        (HERE / "bench_loading.md").write_text(table(results))


if __name__ == "__main__":
    main()
