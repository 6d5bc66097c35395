"""The expert kernels on meshes: plain ones against the loop by hand, variants against the dense kernel."""

from __future__ import annotations

import subprocess
import sys

_ON_EIGHT_DEVICES = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
sys.path.insert(0, sys.argv[1])
import test_expert_variants as variants
import test_grouped_matmul as plain
from safemoe_jax.errors import InputError
from safemoe_jax.parallel.mesh import MeshConfig, make_mesh

many, few = plain.problem(13, tokens=48), plain.problem(15, tokens=3)
d_y = np.random.default_rng(14).normal(size=(48, plain.D)).astype(np.float32)
# Blocks on every mesh; a kernel without its own rule for experts elsewhere where there are 2 and where 4.
for sizes, kernel, arrays in [
    ((2, 2, 1, 2), "blocks", many),
    ((2, 2, 1, 2), "ragged", many),
    ((1, 2, 2, 2), "blocks", many),
    ((1, 2, 2, 2), "megablox", many),
    ((1, 2, 2, 2), "blocks", few),
    ((2, 1, 4, 1), "blocks", many),
    ((2, 1, 4, 1), "ragged", many),
    ((2, 1, 4, 1), "blocks", few),
]:
    own = d_y[: len(arrays[0])]
    expected = plain.by_hand(*arrays, own)
    plain.assert_close(plain.run(kernel, arrays, own, mesh=make_mesh(MeshConfig(*sizes))), expected, 1e-5)
try:
    plain.run("blocks", many, d_y, mesh=make_mesh(MeshConfig(1, 1, 8, 1)))
except InputError as error:
    assert "expert" in str(error)
else:
    raise AssertionError("4 experts on 8 devices were accepted")

# Every pair of a variant, a mesh and a kernel.
for name, sizes, kernel in [
    ("gpt_oss", (1, 2, 2, 2), "blocks"),
    ("gpt_oss", (2, 1, 1, 4), "ragged"),
    ("all", (1, 2, 2, 2), "ragged"),
    ("all", (2, 1, 1, 4), "blocks"),
]:
    variant = dict(variants.VARIANTS[name])
    experts, floats = variants.problem(13, variant.pop("bias"), tokens=48)
    expected = variants.run("dense", experts, floats, d_y, **variant)
    mesh = make_mesh(MeshConfig(*sizes))
    variants.assert_close(variants.run(kernel, experts, floats, d_y, mesh=mesh, **variant), expected, 1e-5)
print("agree")
"""


def test_eight_devices_agree_with_one(request):
    """Its own process, because the number of devices is fixed when the backend starts."""
    result = subprocess.run(
        [sys.executable, "-c", _ON_EIGHT_DEVICES, str(request.path.parent)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=request.config.rootpath,
    )
    assert result.stdout.strip() == "agree", result.stderr
