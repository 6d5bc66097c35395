"""Loading straight into the shardings of a mesh: same arrays, and a process reads its own bytes once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.bench_loading import CONFIG, write_folder

# A process of its own: the number of devices is fixed when JAX starts.
PROGRAM = """
import json, math, sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from safemoe_jax.checkpoints import reading
from safemoe_jax.model import load_pretrained
from safemoe_jax.models.params import shardings
from safemoe_jax.models import declare
from safemoe_jax.parallel.mesh import MeshConfig, make_mesh

folder, out, meshes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
plain = load_pretrained(folder)
whole = {name: np.asarray(value) for name, value in plain.params.items()}
rng = np.random.default_rng(0)
tokens = rng.integers(0, plain.config.vocab_size, (4, 8))
regions = []
read_shares = reading.Loader.read_shares
def counted(loader, places, region, shares, dtype):
    regions.append(tuple(stop - start for start, stop in region))
    return read_shares(loader, places, region, shares, dtype)
reading.Loader.read_shares = counted
def check(name, mesh):
    regions.clear()
    model = load_pretrained(folder, mesh=mesh)
    read = sorted(regions)
    specs = declare(model.config)
    placed = shardings(specs, mesh)
    shards = sorted(placed[name].shard_shape(spec.shape) for name, spec in specs.items())
    result = {
        "equal": all(np.array_equal(np.asarray(model.params[n]), whole[n]) for n in whole),
        "placed": all(model.params[n].sharding == placed[n] for n in placed),
        # This one process holds all shares of a parameter, so that it reads them in one go.
        "read_once": read == sorted(spec.shape for spec in specs.values()),
        "split": sum(map(math.prod, shards)) < sum(value.size for value in whole.values()),
        "logits": float(np.abs(np.asarray(model(tokens).logits) - np.asarray(plain(tokens).logits)).max()),
    }
    model.save_pretrained(f"{out}/{name}")
    # Devices share the memory of what they all hold: a step that may write to what it is given must not.
    add = lambda params: {n: v + 1 for n, v in params.items()}
    step = jax.jit(add, out_shardings=placed, donate_argnums=0)
    result["stepped"] = all(
        np.array_equal(share.data, whole[name][share.index] + 1)
        for name, value in step(model.params).items() for share in value.addressable_shards
    )
    return result

print(json.dumps({name: check(name, make_mesh(MeshConfig(**sizes))) for name, sizes in meshes.items()}))
"""


MESHES = {
    "data-fsdp-tensor": dict(data=2, fsdp=2, tensor=2),
    "expert-fsdp": dict(expert=2, fsdp=4),
}


@pytest.fixture(scope="module")
def on_meshes(references, repository, tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """Where the model of each mesh was saved, and what a process of eight devices says of loading it."""
    folder = tmp_path_factory.mktemp("saved")
    arguments = [str(references / "gqa_clip"), str(folder), json.dumps(MESHES)]
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return folder, json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", MESHES)
def test_load_and_save_on_a_mesh(references, on_meshes, mesh):
    """The arrays and logits of one device, each parameter read once; what is saved is the whole model."""
    folder, results = on_meshes
    result = dict(results[mesh])
    assert result.pop("logits") < 1e-4
    assert result == dict.fromkeys(("equal", "placed", "read_once", "split", "stepped"), True)
    saved = (folder / mesh / "model.safetensors").stat().st_size
    assert abs(saved - (references / "gqa_clip" / "model.safetensors").stat().st_size) < 2000


# One of two processes: what it reads, against what its devices hold, in every case of rounding and mesh.
ONE_OF_TWO = """
import json, math, os, sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from safemoe_jax.checkpoints import reading
from safemoe_jax.checkpoints.huggingface import load_params, read_config
from safemoe_jax.models import declare
from safemoe_jax.parallel.mesh import MeshConfig, make_mesh

folder, cases = sys.argv[3], json.loads(sys.argv[4])
config, _ = read_config(folder)
read, buffers = [], []
preadv, read_shares = os.preadv, reading.Loader.read_shares
def counted(*arguments):
    read.append(preadv(*arguments))
    return read[-1]
def measured(*arguments):
    shares = read_shares(*arguments)
    buffers.append(sum(share.nbytes for share in shares))
    return shares
os.preadv, reading.Loader.read_shares = counted, measured

def case(quantisation, sizes):
    whole = load_params(folder, config, quantisation=quantisation)
    plain = {name: np.asarray(value) for name, value in whole.items()}
    read.clear(), buffers.clear()
    params = load_params(folder, config, mesh=make_mesh(MeshConfig(**sizes)), quantisation=quantisation)
    held, equal = 0, True
    for name, array in params.items():
        own = array.addressable_shards
        held += sum({str(share.index): share.data.nbytes for share in own}.values())
        equal &= all(np.array_equal(share.data, plain[name][share.index]) for share in own)
    floats, needed = declare(config), 0
    for name, spec in floats.items():
        # Of a rounded weight: the float32 numbers that its scales are made from, all inputs of them.
        scales = params.get(f"{name}.scales")
        counted = params[name] if scales is None else scales
        inputs = 1 if scales is None else spec.shape[-2] // scales.shape[-2]
        shares = {str(share.index): share.data.size for share in counted.addressable_shards}
        needed += sum(shares.values()) * inputs * 4
    return {
        "needed": needed, "file": sum(4 * math.prod(spec.shape) for spec in floats.values()),
        "equal": equal, "read": sum(read), "held": held, "all": sum(value.nbytes for value in plain.values()),
        "buffer": max(buffers), "largest": max(value.nbytes for value in plain.values()),
    }

print(json.dumps([case(*how) for how in cases]))
"""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


SPLITS = {
    "fsdp": dict(fsdp=2, expert=2),
    "expert": dict(expert=2, tensor=2),
    "fsdp4": dict(fsdp=4),
}
CASES = [(quantisation, split) for quantisation in (None, "int8", "int4") for split in SPLITS]


@pytest.fixture(scope="module")
def of_two_processes(repository, tmp_path_factory) -> dict[tuple[str | None, str], tuple[dict, ...]]:
    """Writes a folder with rows of 8 kB, half of each for either process where a row is divided: a gap of a
    page is where reading through it ends. What each process says of loading it, by case."""
    config = {
        **{**CONFIG, "vocab_size": 64, "intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
        "num_hidden_layers": 1,
    }
    folder = tmp_path_factory.mktemp("two") / "model"
    write_folder(folder, config, "published", "float32")
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    cases = json.dumps([(quantisation, SPLITS[split]) for quantisation, split in CASES])
    address = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO, address, str(number), str(folder), cases],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    both = zip(*(json.loads(out.splitlines()[-1]) for out, _ in said), strict=True)
    return dict(zip(CASES, both, strict=True))


@pytest.mark.parametrize("split", SPLITS)
def test_each_process_reads_only_its_own_bytes(of_two_processes, split):
    """No more than its devices hold, and no buffer above the largest parameter."""
    for got in of_two_processes[None, split]:
        assert got["equal"]
        assert got["read"] == got["held"] < got["all"]
        assert got["buffer"] <= got["largest"]


@pytest.mark.parametrize("quantisation", ["int8", "int4"])
@pytest.mark.parametrize("split", SPLITS)
def test_each_process_rounds_only_its_own_experts_and_outputs(of_two_processes, split, quantisation):
    """Weights that are rounded are read with all inputs, whichever of them the process holds."""
    for got in of_two_processes[quantisation, split]:
        assert got["equal"]
        assert got["read"] == got["needed"] < got["file"]
