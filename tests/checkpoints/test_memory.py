"""Peak host memory of loading and saving a folder of more than 500 MB (slow: writes and reads it)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

CONFIG = {
    "model_type": "olmoe",
    "vocab_size": 20000,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_experts": 48,
    "num_experts_per_tok": 8,
    "rms_norm_eps": 1e-5,
}

# A process of its own: the peak of a process never falls.
PROGRAM = """
import json, resource, sys, time
import jax, numpy as np
from safemoe_jax.model import load_pretrained
from safemoe_jax.models import declare

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
load_pretrained(sys.argv[1])                      # a tiny one: start-up costs of libraries and devices
before, start = peak(), time.perf_counter()
model = load_pretrained(sys.argv[2])
seconds = time.perf_counter() - start
loaded = peak()
model.save_pretrained(sys.argv[3])
print(json.dumps({
    "load": loaded - before, "save": peak() - before, "seconds": seconds,
    "params": sum(p.nbytes for p in model.params.values()),
    "largest": max(p.nbytes for p in model.params.values()),
}))
"""


def write_large_folder(folder: Path) -> int:
    """A random checkpoint, one file a layer; returns its bytes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    d, f, v = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    groups = [
        {name: (v, d) for name in ("model.embed_tokens.weight", "lm_head.weight")}
        | {"model.norm.weight": (d,)}
    ]
    for i in range(CONFIG["num_hidden_layers"]):
        stem = f"model.layers.{i}"
        shapes = {f"{stem}.self_attn.{p}_proj.weight": (d, d) for p in "qkvo"}
        shapes |= {f"{stem}.self_attn.{p}_norm.weight": (d,) for p in "qk"}
        shapes |= {f"{stem}.{n}_layernorm.weight": (d,) for n in ("input", "post_attention")}
        shapes[f"{stem}.mlp.gate.weight"] = (CONFIG["num_experts"], d)
        for e in range(CONFIG["num_experts"]):
            shapes |= {f"{stem}.mlp.experts.{e}.{p}_proj.weight": (f, d) for p in ("gate", "up")}
            shapes[f"{stem}.mlp.experts.{e}.down_proj.weight"] = (d, f)
        groups.append(shapes)
    names = {}
    for i, shapes in enumerate(groups):
        file = f"model-{i:05d}.safetensors"
        save_file({n: rng.standard_normal(s, np.float32) for n, s in shapes.items()}, folder / file)
        names |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.slow
def test_peak_memory_of_loading_and_saving(references, repository, tmp_path):
    size = write_large_folder(tmp_path / "large")
    assert size >= 500e6
    folders = [str(references / "mha"), str(tmp_path / "large"), str(tmp_path / "saved")]
    environment = {**os.environ, "PYTHONPATH": str(repository), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *folders],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    got = json.loads(run.stdout.splitlines()[-1])
    allowed = 1.2 * got["largest"] + 200e6
    print({**got, "size": size, "allowed": allowed, "over": got["load"] - got["params"]})
    assert got["load"] - got["params"] < allowed
    assert got["save"] - got["params"] < allowed
