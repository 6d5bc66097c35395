"""The mesh: sizes that fit, and messages for sizes that do not."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import PartitionSpec

from safemoe_jax.errors import InputError
from safemoe_jax.models.config import ModelConfig, check_mesh
from safemoe_jax.parallel.mesh import AXIS_RULES, MESH_AXES, MeshConfig, make_mesh, partition_spec


class FakeMesh:
    """Only the sizes of a mesh, for checks that need no devices."""

    def __init__(self, **sizes: int) -> None:
        self.shape = dict.fromkeys(MESH_AXES, 1) | sizes


def test_a_mesh_of_ones_takes_one_device():
    mesh = make_mesh(MeshConfig())
    assert mesh.size == 1 and mesh.axis_names == MESH_AXES


def test_sizes_that_do_not_make_the_devices_are_refused_with_the_number_that_would():
    wanted = MeshConfig(data=2 * len(jax.devices()))
    with pytest.raises(InputError, match=f"product is {len(jax.devices())}"):
        make_mesh(wanted)
    with pytest.raises(InputError, match="at least 1"):
        make_mesh(MeshConfig(fsdp=0))


def test_every_rule_names_an_axis_of_the_mesh():
    for rule in AXIS_RULES.values():
        axes = rule if isinstance(rule, tuple) else (rule,)
        assert all(axis is None or axis in MESH_AXES for axis in axes)
    assert partition_spec(("layers", "expert", "embed", "mlp")) == PartitionSpec(
        None, "expert", "fsdp", "tensor"
    )


@pytest.mark.parametrize(
    ("sizes", "named"),
    [({"tensor": 3}, "n_heads 4"), ({"tensor": 4}, "n_kv_heads 2"), ({"expert": 4}, "number of experts 6")],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused_by_name(sizes, named):
    config = ModelConfig("olmoe", 40, 16, 2, 4, 2, 4, 1e-5, 6, 2, 8)
    check_mesh(config, FakeMesh(tensor=2, expert=3, fsdp=4))
    with pytest.raises(InputError, match=named):
        check_mesh(config, FakeMesh(**sizes))
