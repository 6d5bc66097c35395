"""Parameters as one flat dictionary, declared once.

A module declares each parameter as a `ParamSpec`: shape, logical axes, initialiser. From the declaration
come the abstract tree, the shardings, random initialisation and the check of a loaded checkpoint.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from safemoe_jax.errors import InputError
from safemoe_jax.models.config import ModelConfig
from safemoe_jax.parallel.mesh import named_sharding

Params = dict[str, jax.Array]
"""Dotted parameter name -> array. Layers of one segment are stacked along axis 0."""


class Weights(NamedTuple):
    """A network's parameters, split once into those that a run changes and those that it does not.

    frozen, trainable: disjoint.
    layers: some of the frozen ones once more, as an array a layer (`layer_views`).
    """

    frozen: Params
    trainable: Params
    layers: Mapping[str, tuple[jax.Array, ...]] = {}

    @classmethod
    def of(cls, params: Params) -> Weights:
        """All parameters frozen: inference."""
        return cls(dict(params), {})

    def merged(self) -> Params:
        """All parameters in one dictionary."""
        return {**self.frozen, **self.trainable}


@dataclass(frozen=True)
class ParamSpec:
    """Declaration of one parameter.

    Attributes:
        shape: its shape.
        axes: the logical name of each axis (`parallel.mesh.AXIS_RULES`).
        init: "normal" (the config's range), "zeros", "ones" or "lora_a" (uniform in +-1/sqrt(fan in)).
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"

    def stacked(self, repeats: int) -> ParamSpec:
        """The same parameter for `repeats` layers, stacked along a new first axis."""
        return replace(self, shape=(repeats, *self.shape), axes=("layers", *self.axes))


class LoraParam(nnx.Param):
    """A factor of a low-rank adapter."""


def is_adapter(name: str) -> bool:
    """Whether a parameter is a low-rank factor."""
    return name.endswith(("lora_a", "lora_b"))


def is_correction(name: str) -> bool:
    """Whether a parameter is a router's correction bias.

    It steers choices only and has no gradient. Its makers set it from the load while pretraining, in float32;
    for transformers it is no trainable parameter, and stays float32 in a model of another dtype.
    """
    return name.endswith("router.correction_bias")


def is_quantised(name: str) -> bool:
    """Whether a parameter is a part of a quantised weight."""
    return name.endswith((".values", ".scales"))


def cast(params: Params, dtype: jnp.dtype | str) -> Params:
    """The parameters in another dtype, but for those that are float32 in every model, and quantised ones."""
    kept = {name: value for name, value in params.items() if is_quantised(name)}
    return kept | {
        name: value.astype(jnp.float32 if is_correction(name) else dtype)
        for name, value in params.items()
        if name not in kept
    }


def flat_state(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Dotted name -> variable of every parameter of a module."""
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(module))}


def bind(module: nnx.Module, arrays: Mapping[str, jax.Array]) -> nnx.Module:
    """The module with arrays in the place of its declarations.

    Args:
        module: declares its parameters as `ParamSpec` values.
        arrays: exactly one array for each of its parameters, by dotted name.
    """
    graphdef, state = nnx.split(module)
    flat = [(path, v.replace(arrays[".".join(map(str, path))])) for path, v in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def shardings(specs: Mapping[str, ParamSpec], mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each parameter lies on the mesh."""
    return {name: named_sharding(mesh, spec.axes) for name, spec in specs.items()}


def initialise(
    specs: Mapping[str, ParamSpec],
    key: jax.Array,
    *,
    dtype: jnp.dtype | str = jnp.float32,
    stddev: float = 0.02,
    mesh: Mesh | None = None,
) -> Params:
    """Random parameters, each made on the devices where it will lie.

    The value of a parameter depends on the key and its name only, not on which others are made beside it.

    Raises:
        InputError: the specs are those of a quantised network; its weights are rounded, not drawn.
    """
    if any(map(is_quantised, specs)):
        raise InputError("quantised weights cannot be drawn", expected="weights to quantise")
    placed = shardings(specs, mesh) if mesh is not None else dict.fromkeys(specs)

    def make(name: str, spec: ParamSpec) -> jax.Array:
        subkey = jax.random.fold_in(key, zlib.crc32(name.encode()))
        draw = jax.jit(_draw, static_argnames=("spec", "dtype", "stddev"), out_shardings=placed[name])
        return draw(subkey, spec=spec, dtype=jnp.dtype(dtype), stddev=stddev)

    return {name: make(name, spec) for name, spec in specs.items()}


def _draw(key: jax.Array, *, spec: ParamSpec, dtype: jnp.dtype, stddev: float) -> jax.Array:
    if spec.init == "zeros":
        return jnp.zeros(spec.shape, dtype)
    if spec.init == "ones":
        return jnp.ones(spec.shape, dtype)
    if spec.init == "lora_a":
        bound = 1 / math.sqrt(spec.shape[-2])
        return jax.random.uniform(key, spec.shape, jnp.float32, -bound, bound).astype(dtype)
    return (stddev * jax.random.normal(key, spec.shape, jnp.float32)).astype(dtype)


def split_trainable(config: ModelConfig, params: Params) -> Weights:
    """Splits parameters into frozen and trainable: with adapters only those train, without them everything
    but the routers' correction biases does.

    Trainable parameters become float32 (optimizer updates are far below bfloat16's resolution).

    Raises:
        InputError: the weights are quantised, and there are no adapters that could train.
    """
    if config.lora is None and config.quantisation is not None:
        raise InputError(
            f"full fine-tuning of {config.quantisation} weights",
            where="quantisation",
            expected="adapters (lora), or weights that are not quantised",
        )
    trains = is_adapter if config.lora is not None else lambda name: not is_correction(name)
    chosen = {name for name in params if trains(name)}
    trainable = {name: params[name].astype(jnp.float32) for name in params if name in chosen}
    return Weights({name: value for name, value in params.items() if name not in chosen}, trainable)


def count(specs: Mapping[str, ParamSpec]) -> int:
    """Number of scalars declared."""
    return sum(math.prod(spec.shape) for spec in specs.values())
