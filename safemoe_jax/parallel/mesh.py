"""The device mesh and the rules that place logical axes on it.

Every parameter and activation names its axes logically ("embed", "heads", ...); only this file says which
mesh axis each of them is split over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from safemoe_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp")

AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "vocab": "tensor",
    "layers": None,
    "norm": None,
    "lora": None,
    "router": None,
}


@dataclass(frozen=True)
class MeshConfig:
    """How many devices each kind of parallelism gets; the product must be the number of devices used.

    Attributes:
        data: replicas of the weights, each with its own rows of the batch.
        fsdp: shards of the weights (along the model width); the batch rows are split over it as well.
        expert: groups that the experts are divided into.
        tensor: shards of attention heads, expert width and vocabulary.
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.data * self.fsdp * self.expert * self.tensor


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh over the given devices (default: all of them, of every process).

    Raises:
        InputError: a size is below 1, or the product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = tuple(getattr(config, axis) for axis in MESH_AXES)
    shown = "mesh " + ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if min(sizes) < 1:
        raise InputError("a mesh size is below 1", where=shown, expected="every size at least 1")
    if config.size == 1:
        devices = devices[:1]
    if math.prod(sizes) != len(devices):
        raise InputError(
            f"the mesh asks for {config.size} devices, {len(devices)} are there",
            where=shown,
            expected=f"sizes whose product is {len(devices)} (or all 1)",
        )
    # Explicit axis types are jax's new default; lax.ragged_dot and automatic partitioning want Auto.
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Mesh axes for a tuple of logical axes (None = not split)."""
    return PartitionSpec(*(None if axis is None else AXIS_RULES[axis] for axis in axes))


def named_sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """Sharding of an array whose axes are named logically."""
    return NamedSharding(mesh, partition_spec(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, mesh: Mesh | None, axes: Sequence[str | None]) -> jax.Array:
    """Tells the partitioner how an activation lies on the mesh; nothing on one device."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, named_sharding(mesh, axes))


def mesh_axis_sizes(mesh: Mesh | None, axes: str | tuple[str, ...]) -> int:
    """Number of shards along one or several mesh axes (1 without a mesh)."""
    if mesh is None:
        return 1
    names = (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names)
