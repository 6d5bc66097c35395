"""What an expert does between its projections in and out, with its derivative. Legend: X any axes."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from safemoe_jax.errors import InputError


@jax.tree_util.register_static
@dataclass(frozen=True)
class Activation:
    """A function of the gate and up projections; static under jit.

    Attributes:
        kind: "silu": gate sigmoid(gate) up. "clamped" (gpt_oss): g sigmoid(alpha g) (u + 1), where g is gate
            held below the limit and u is up held within it on both sides.
        limit, alpha: of "clamped".
    """

    kind: str = "silu"
    limit: float = 7.0
    alpha: float = 1.702

    def __post_init__(self) -> None:
        if self.kind not in ("silu", "clamped"):
            raise InputError(f"no activation {self.kind!r}", where="activation", expected="silu or clamped")

    def forward(self, gate_X: jax.Array, up_X: jax.Array) -> jax.Array:
        """The function's value, in the arguments' dtype."""
        if self.kind == "silu":
            return jax.nn.silu(gate_X) * up_X
        gate_X, up_X = jnp.minimum(gate_X, self.limit), jnp.clip(up_X, -self.limit, self.limit)
        return gate_X * jax.nn.sigmoid(self.alpha * gate_X) * (up_X + 1)

    def backward(
        self, gate_X: jax.Array, up_X: jax.Array, d_act_X: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The value once more, and the cotangents of gate and up for a cotangent of the value."""
        if self.kind == "silu":
            sigmoid_X = jax.nn.sigmoid(gate_X)
            silu_X = gate_X * sigmoid_X
            d_gate_X = d_act_X * up_X * (sigmoid_X + silu_X * (1 - sigmoid_X))
            return silu_X * up_X, d_gate_X, d_act_X * silu_X
        free_gate_X, free_up_X = gate_X <= self.limit, jnp.abs(up_X) <= self.limit
        gate_X, up_X = jnp.minimum(gate_X, self.limit), jnp.clip(up_X, -self.limit, self.limit)
        sigmoid_X = jax.nn.sigmoid(self.alpha * gate_X)
        glu_X = gate_X * sigmoid_X
        slope_X = sigmoid_X + self.alpha * glu_X * (1 - sigmoid_X)
        d_gate_X = jnp.where(free_gate_X, d_act_X * (up_X + 1) * slope_X, 0)
        return glu_X * (up_X + 1), d_gate_X, jnp.where(free_up_X, d_act_X * glu_X, 0)


SILU = Activation()
