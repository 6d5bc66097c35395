"""The experts' weights of all layers, one stack a projection.

Legend: G groups in a stack (layers * experts), D model width, F expert width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from safemoe_jax.models.adapted import Adapted, AnyWeight, effective, shape_of


class Stack(NamedTuple):
    """Expert weights: gate and up [G,D,F], down [G,F,D]; all three biases [G,F], [G,F], [G,D], or none."""

    gate: AnyWeight
    up: AnyWeight
    down: AnyWeight
    gate_bias: jax.Array | None = None
    up_bias: jax.Array | None = None
    down_bias: jax.Array | None = None

    def layer(self, first_group: jax.Array | int, n_experts: int) -> Stack:
        """A copy of the groups of one layer; no copy where the stack is one layer."""
        if shape_of(self.gate)[0] == n_experts:
            return self
        return jax.tree.map(lambda w: lax.dynamic_slice_in_dim(w, first_group, n_experts), self)

    def dense(self, dtype: jnp.dtype | str) -> Stack:
        """All of it as arrays of this dtype, updates included."""
        return Stack(*(w if w is None else effective(w, dtype) for w in self))

    def added_up(self, dtype: jnp.dtype | str) -> Stack:
        """As `dense` where there are updates, and as it is without."""
        return self.dense(dtype) if any(isinstance(w, Adapted) for w in self) else self
