"""The experts' weights of all layers, one stack a projection; low-rank updates are those of one layer.

Legend: G groups in a stack (layers * experts), E experts of a layer, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax

from safemoe_jax.models.adapted import AnyWeight, on_base


class Stack(NamedTuple):
    """Expert weights: gate and up [G,D,F], down [G,F,D]; all three biases [G,F], [G,F], [G,D], or none."""

    gate: AnyWeight
    up: AnyWeight
    down: AnyWeight
    gate_bias: jax.Array | None = None
    up_bias: jax.Array | None = None
    down_bias: jax.Array | None = None

    def layer(self, first_group: jax.Array | int, n_experts: int) -> Stack:
        """A copy of the groups of one layer; no copy of what is one layer's already, as factors are."""

        take = lambda array: lax.dynamic_slice_in_dim(array, first_group, n_experts)  # noqa: E731
        return jax.tree.map(lambda array: array if len(array) == n_experts else take(array), self)


class OwnArrays(NamedTuple):
    """The matrices of a stack once more, an array a layer (`layer_views`).

    layers: gate and up [E,D,F] and down [E,F,D] of each layer.
    repeat: which of them is meant; may be traced.
    """

    layers: tuple[tuple[jax.Array, jax.Array, jax.Array], ...]
    repeat: jax.Array | int

    def read(self, stack: Stack, first_group: jax.Array | int, what: Callable[[Stack], Any]) -> Any:
        """Does it with the meant layer of this stack, whose matrices are read where they lie."""
        n_experts = len(self.layers[0][0])
        take = lambda bias: lax.dynamic_slice_in_dim(bias, first_group, n_experts)  # noqa: E731
        biases = jax.tree.map(take, stack[3:])

        def branch(matrices: tuple[jax.Array, ...]) -> Callable[[], Any]:
            return lambda: what(Stack(*map(on_base, stack[:3], matrices), *biases))

        return lax.switch(self.repeat, [branch(matrices) for matrices in self.layers])


class Place(NamedTuple):
    """Where the experts of one layer lie.

    first_group: where they begin in the arrays; may be traced.
    own: their matrices as arrays of their own, or None.
    """

    first_group: jax.Array | int = 0
    own: OwnArrays | None = None
