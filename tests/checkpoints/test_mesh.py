"""Loading straight into the shardings of a mesh of 8 devices: same arrays, and each share read once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

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
buffers = []
read_share = reading.Loader.read_share
def counted(loader, places, index, dtype):
    part = read_share(loader, places, index, dtype)
    buffers.append((places[0].name, part.shape))
    return part
reading.Loader.read_share = counted
model = load_pretrained(folder, mesh=mesh)
specs = declare(model.config)
placed = shardings(specs, mesh)
shards = sorted(placed[name].shard_shape(spec.shape) for name, spec in specs.items())
index_maps = [placed[name].devices_indices_map(spec.shape).values() for name, spec in specs.items()]
distinct = sum(len({str(index) for index in indices}) for indices in index_maps)
whole = {name: np.asarray(value) for name, value in plain.params.items()}
rng = np.random.default_rng(0)
tokens = rng.integers(0, model.config.vocab_size, (4, 8))
print(json.dumps({
    "equal": all(np.array_equal(np.asarray(model.params[n]), whole[n]) for n in whole),
    "placed": all(model.params[n].sharding == placed[n] for n in placed),
    "only_shards": sorted(set(shape for _, shape in buffers)) == sorted(set(shards)),
    "read_once": len(buffers) == distinct,
    "split": sum(map(math.prod, shards)) < sum(value.size for value in whole.values()),
    "logits": float(np.abs(np.asarray(model(tokens).logits) - np.asarray(plain(tokens).logits)).max()),
}))
model.save_pretrained(out)
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
    assert result == dict.fromkeys(("equal", "placed", "only_shards", "read_once", "split"), True)
    saved = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert abs(saved - (references / "gqa_clip" / "model.safetensors").stat().st_size) < 2000
