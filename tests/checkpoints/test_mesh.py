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

folder, out, sizes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
plain = load_pretrained(folder)
mesh = make_mesh(MeshConfig(**sizes))
regions = []
read_shares = reading.Loader.read_shares
def counted(loader, places, region, shares, dtype):
    regions.append(tuple(stop - start for start, stop in region))
    return read_shares(loader, places, region, shares, dtype)
reading.Loader.read_shares = counted
model = load_pretrained(folder, mesh=mesh)
specs = declare(model.config)
placed = shardings(specs, mesh)
shards = sorted(placed[name].shard_shape(spec.shape) for name, spec in specs.items())
whole = {name: np.asarray(value) for name, value in plain.params.items()}
rng = np.random.default_rng(0)
tokens = rng.integers(0, model.config.vocab_size, (4, 8))
result = {
    "equal": all(np.array_equal(np.asarray(model.params[n]), whole[n]) for n in whole),
    "placed": all(model.params[n].sharding == placed[n] for n in placed),
    # This one process holds all shares of a parameter, so that it reads them in one go.
    "read_once": sorted(regions) == sorted(spec.shape for spec in specs.values()),
    "split": sum(map(math.prod, shards)) < sum(value.size for value in whole.values()),
    "logits": float(np.abs(np.asarray(model(tokens).logits) - np.asarray(plain(tokens).logits)).max()),
}
model.save_pretrained(out)
# Devices share the memory of what they all hold: a step that may write to what it is given must not.
step = jax.jit(lambda params: {n: v + 1 for n, v in params.items()}, out_shardings=placed, donate_argnums=0)
result["stepped"] = all(
    np.array_equal(share.data, whole[name][share.index] + 1)
    for name, value in step(model.params).items() for share in value.addressable_shards
)
print(json.dumps(result))
"""


@pytest.mark.parametrize(
    "sizes", [dict(data=2, fsdp=2, tensor=2), dict(expert=2, fsdp=4)], ids=["data-fsdp-tensor", "expert-fsdp"]
)
def test_load_and_save_on_a_mesh(references, repository, tmp_path, sizes):
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    arguments = [str(references / "gqa_clip"), str(tmp_path / "saved"), json.dumps(sizes)]
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result.pop("logits") < 1e-4
    assert result == dict.fromkeys(("equal", "placed", "read_once", "split", "stepped"), True)
    saved = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert abs(saved - (references / "gqa_clip" / "model.safetensors").stat().st_size) < 2000


# One of two processes: what it reads, against what its devices hold.
ONE_OF_TWO = """
import json, math, os, sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from safemoe_jax.checkpoints import reading
from safemoe_jax.checkpoints.huggingface import load_params, read_config
from safemoe_jax.models import declare
from safemoe_jax.parallel.mesh import MeshConfig, make_mesh

folder, sizes, quantisation = sys.argv[3], json.loads(sys.argv[4]), sys.argv[5] or None
config, _ = read_config(folder)
whole = load_params(folder, config, quantisation=quantisation)
plain = {name: np.asarray(value) for name, value in whole.items()}
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
params = load_params(folder, config, mesh=make_mesh(MeshConfig(**sizes)), quantisation=quantisation)
held, equal = 0, True
for name, array in params.items():
    held += sum({str(share.index): share.data.nbytes for share in array.addressable_shards}.values())
    equal &= all(np.array_equal(share.data, plain[name][share.index]) for share in array.addressable_shards)
floats, needed = declare(config), 0
for name, spec in floats.items():
    # Of a rounded weight: the float32 numbers that its scales are made from, all inputs of them.
    scales = params.get(f"{name}.scales")
    found = params[name] if scales is None else scales
    inputs = 1 if scales is None else spec.shape[-2] // scales.shape[-2]
    shares = {str(share.index): share.data.size for share in found.addressable_shards}
    needed += sum(shares.values()) * inputs * 4
print(json.dumps({
    "needed": needed, "file": sum(4 * math.prod(spec.shape) for spec in floats.values()),
    "equal": equal, "read": sum(read), "held": held, "all": sum(value.nbytes for value in plain.values()),
    "buffer": max(buffers), "largest": max(value.nbytes for value in plain.values()),
}))
"""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def load_in_two_processes(
    repository: Path, folder: Path, sizes: dict[str, int], quantisation: str = ""
) -> list[dict]:
    """Writes a folder with rows of 8 kB, half of each for either process where a row is divided: a gap of a
    page is where reading through it ends. What each process says of loading it."""
    config = {
        **{**CONFIG, "vocab_size": 64, "intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
        "num_hidden_layers": 1,
    }
    write_folder(folder, config, "published", "float32")
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    address, arguments = f"127.0.0.1:{free_port()}", [str(folder), json.dumps(sizes), quantisation]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO, address, str(number), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.mark.parametrize(
    "sizes", [dict(fsdp=2, expert=2), dict(expert=2, tensor=2), dict(fsdp=4)], ids=["fsdp", "expert", "fsdp4"]
)
def test_each_process_reads_only_its_own_bytes(repository, tmp_path, sizes):
    for got in load_in_two_processes(repository, tmp_path / "model", sizes):
        assert got["equal"]
        assert got["read"] == got["held"] < got["all"]
        assert got["buffer"] <= got["largest"]


@pytest.mark.parametrize("quantisation", ["int8", "int4"])
@pytest.mark.parametrize(
    "sizes", [dict(fsdp=2, expert=2), dict(expert=2, tensor=2), dict(fsdp=4)], ids=["fsdp", "expert", "fsdp4"]
)
def test_each_process_rounds_only_its_own_experts_and_outputs(repository, tmp_path, sizes, quantisation):
    """Weights that are rounded are read with all inputs, whichever of them the process holds."""
    for got in load_in_two_processes(repository, tmp_path / "model", sizes, quantisation):
        assert got["equal"]
        assert got["read"] == got["needed"] < got["file"]
