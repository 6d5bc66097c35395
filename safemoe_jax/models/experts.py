"""The routed experts of one layer.

Legend: B rows, T positions, D model width, F expert width, E experts, K experts of a token, r rank,
G expert groups that the arrays hold: E for one layer, or repeats * E for a whole stack read in place.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from safemoe_jax.models.config import Compute, LoraConfig, ModelConfig
from safemoe_jax.models.grouped_matmul import choose_kernel, expert_ffn
from safemoe_jax.models.params import LoraParam, ParamSpec
from safemoe_jax.models.router import Router, choose_experts

GATE_UP_TARGET = "mlp.experts.gate_up_proj"
DOWN_TARGET = "mlp.experts.down_proj"
EXPERT_STACKS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
"""Parameters of `Experts` with one entry an expert; the kernels read a stack of layers [R * E, ...] in place."""


class Experts(nnx.Module):
    """SwiGLU experts: down(silu(gate(x)) * up(x)), each optionally with its own low-rank update."""

    def __init__(self, config: ModelConfig) -> None:
        n, d, f = config.n_experts, config.d_model, config.expert_dim
        self.gate = nnx.Param(ParamSpec((n, d, f), ("expert", "embed", "mlp")))
        self.up = nnx.Param(ParamSpec((n, d, f), ("expert", "embed", "mlp")))
        self.down = nnx.Param(ParamSpec((n, f, d), ("expert", "mlp", "embed")))
        self.n_experts = n
        self.lora = _expert_lora(config.lora)
        if self.lora is not None and GATE_UP_TARGET in self.lora.targets:
            rank = self.lora.rank
            self.gate_up_lora_a = LoraParam(ParamSpec((n, d, rank), ("expert", "embed", "lora"), "lora_a"))
            self.gate_up_lora_b = LoraParam(ParamSpec((n, rank, 2 * f), ("expert", "lora", None), "zeros"))
        if self.lora is not None and DOWN_TARGET in self.lora.targets:
            rank = self.lora.rank
            self.down_lora_a = LoraParam(ParamSpec((n, f, rank), ("expert", "mlp", "lora"), "lora_a"))
            self.down_lora_b = LoraParam(ParamSpec((n, rank, d), ("expert", "lora", "embed"), "zeros"))

    def __call__(
        self,
        x_BTD: jax.Array,
        weights_BTK: jax.Array,
        experts_BTK: jax.Array,
        first_group: jax.Array | int,
        compute: Compute,
    ) -> jax.Array:
        """The weighted sum of each token's experts, [B, T, D].

        Args:
            x_BTD: tokens.
            weights_BTK: combine weights.
            experts_BTK: indices of the chosen experts.
            first_group: where this layer's experts begin in the arrays (see G above).
            compute: kernel and mesh.
        """
        gate, up, down, first_group = self._effective_weights(first_group, x_BTD.dtype)
        width, k = x_BTD.shape[-1], weights_BTK.shape[-1]
        kernel = compute.experts
        if kernel == "auto":
            tokens = x_BTD.shape[0] * x_BTD.shape[1]
            kernel = choose_kernel(platform(compute), tokens, k, self.n_experts, width, gate.shape[-1])
        y_XD = expert_ffn(
            x_BTD.reshape(-1, width),
            weights_BTK.reshape(-1, k).astype(x_BTD.dtype),
            experts_BTK.reshape(-1, k),
            gate,
            up,
            down,
            first_group=first_group,
            n_experts=self.n_experts,
            kernel=kernel,
            mesh=compute.mesh,
        )
        return y_XD.reshape(x_BTD.shape)

    def _effective_weights(
        self, first_group: jax.Array | int, dtype: jnp.dtype
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | int]:
        """The layer's weights with the adapters' updates added, for one layer at a time."""
        gate, up, down = (w[...].astype(dtype) for w in (self.gate, self.up, self.down))
        if self.lora is None:
            return gate, up, down, first_group
        gate, up, down = (
            jax.lax.dynamic_slice_in_dim(w, first_group, self.n_experts)
            if w.shape[0] != self.n_experts
            else w
            for w in (gate, up, down)
        )
        scale = self.lora.scale
        if GATE_UP_TARGET in self.lora.targets:
            update = scale * (self.gate_up_lora_a[...] @ self.gate_up_lora_b[...])
            gate_update, up_update = jnp.split(update.astype(dtype), 2, axis=-1)
            gate, up = gate + gate_update, up + up_update
        if DOWN_TARGET in self.lora.targets:
            down = down + (scale * (self.down_lora_a[...] @ self.down_lora_b[...])).astype(dtype)
        return gate, up, down, 0


class MoE(nnx.Module):
    """Router and experts of one layer."""

    def __init__(self, config: ModelConfig) -> None:
        self.router = Router(config)
        self.experts = Experts(config)
        self.top_k, self.renormalise = config.top_k, config.norm_topk_prob

    def __call__(
        self,
        x_BTD: jax.Array,
        forced_logits_BTE: jax.Array | None,
        forced_BT: jax.Array | None,
        first_group: jax.Array | int,
        compute: Compute,
    ) -> tuple[jax.Array, jax.Array]:
        """Routes and computes.

        Args:
            x_BTD: normalised hidden states.
            forced_logits_BTE: router logits to route by instead, where forced_BT is True.
            forced_BT: bool, or None.
            first_group, compute: as in `Experts`.

        Returns:
            The output [B, T, D] and the router's own logits [B, T, E], float32.
        """
        logits_BTE = self.router(x_BTD)
        used_BTE = logits_BTE
        if forced_BT is not None:
            used_BTE = jnp.where(forced_BT[..., None], forced_logits_BTE, logits_BTE)
        weights_BTK, experts_BTK = choose_experts(used_BTE, self.top_k, self.renormalise)
        return self.experts(x_BTD, weights_BTK, experts_BTK, first_group, compute), logits_BTE


def platform(compute: Compute) -> str:
    """The platform that the program is compiled for: the mesh's, not the host's."""
    if compute.mesh is not None:
        return compute.mesh.devices.flat[0].platform
    return jax.default_backend()


def _expert_lora(lora: LoraConfig | None) -> LoraConfig | None:
    if lora is None or not {GATE_UP_TARGET, DOWN_TARGET} & set(lora.targets):
        return None
    return lora
