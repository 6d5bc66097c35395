"""The experts' weights of all layers, one stack a projection; low-rank updates are those of one layer.

Legend: G groups in a stack (layers * experts), D model width, F expert width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax import lax

from safemoe_jax.models.adapted import AnyWeight


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
