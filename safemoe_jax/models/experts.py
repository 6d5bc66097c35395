"""The routed experts of one layer, its shared expert and their router.

Legend: B rows, T positions, D model width, F expert width, E experts, K experts of a token, r rank,
G expert groups that the arrays hold: E for one layer, or repeats * E for a whole stack read in place.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from safemoe_jax.models.activation import Activation
from safemoe_jax.models.adapted import Adapted, base_of, shape_of
from safemoe_jax.models.config import Compute, LoraConfig, ModelConfig
from safemoe_jax.models.expert_stack import Place, Stack
from safemoe_jax.models.feed_forward import FeedForward
from safemoe_jax.models.grouped_matmul import choose_kernel, expert_ffn
from safemoe_jax.models.linear import Linear
from safemoe_jax.models.params import LoraParam, ParamSpec
from safemoe_jax.models.quantised import PARTS, Quantised, Weight, read_weight, weight_param
from safemoe_jax.models.router import Router, choose_experts

GATE_UP_TARGET = "mlp.experts.gate_up_proj"
DOWN_TARGET = "mlp.experts.down_proj"
MATRICES = ("gate", "up", "down")
EXPERT_STACKS = (
    *MATRICES,
    *(f"{name}.{part}" for name in MATRICES for part in PARTS),
    *(f"{name}_bias" for name in MATRICES),
)
"""Parameters of `Experts` with one entry an expert: kernels read a stack of layers [R * E, ...] in place."""


class Experts(nnx.Module):
    """Gated experts, down(activation(gate(x), up(x))), each optionally with its own low-rank update."""

    def __init__(self, config: ModelConfig) -> None:
        n, d, f = config.n_experts, config.d_model, config.expert_dim
        inwards, how = ParamSpec((n, d, f), ("expert", "embed", "mlp")), config.quantisation
        self.gate, self.up = weight_param(inwards, how), weight_param(inwards, how)
        self.down = weight_param(ParamSpec((n, f, d), ("expert", "mlp", "embed")), how)
        wide = ParamSpec((n, f), ("expert", "mlp"), "zeros")
        narrow = ParamSpec((n, d), ("expert", "embed"), "zeros")
        self.gate_bias = nnx.Param(wide) if config.expert_bias else None
        self.up_bias = nnx.Param(wide) if config.expert_bias else None
        self.down_bias = nnx.Param(narrow) if config.expert_bias else None
        self.n_experts = n
        self.activation = Activation(config.activation, config.activation_limit, config.activation_alpha)
        self.scale_input = config.routing.kind == "sigmoid_input"
        self.float32_weights = config.routing.float32_weights
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
        place: Place,
        compute: Compute,
    ) -> jax.Array:
        """The weighted sum of each token's experts, [B, T, D].

        Args:
            x_BTD: tokens.
            weights_BTK: combine weights.
            experts_BTK: indices of the chosen experts.
            place: where this layer's experts lie in the arrays (see G above).
            compute: kernel and mesh.
        """
        stack = self._weights(x_BTD.dtype)
        x_XD = x_BTD.reshape(-1, x_BTD.shape[-1])
        weights_XK = weights_BTK.reshape(-1, weights_BTK.shape[-1])
        y_XD = expert_ffn(
            x_XD,
            weights_XK if self.float32_weights else weights_XK.astype(x_XD.dtype),
            experts_BTK.reshape(weights_XK.shape),
            *stack[:3],
            first_group=place.first_group,
            n_experts=self.n_experts,
            kernel=self._kernel(compute, weights_XK.shape, stack),
            mesh=compute.mesh,
            biases=None if self.down_bias is None else stack[3:],
            activation=self.activation,
            scale_input=self.scale_input,
            own=place.own,
        )
        return y_XD.reshape(x_BTD.shape)

    def _kernel(self, compute: Compute, pairs: tuple[int, int], stack: Stack) -> str:
        if compute.experts != "auto":
            return compute.experts
        tokens, k = (pairs[0] * pairs[1], 1) if self.scale_input else pairs
        if isinstance(base_of(stack.gate), Quantised) and platform(compute) == "cpu":
            return "blocks"  # it alone brings back one expert at a time
        return choose_kernel(platform(compute), tokens, k, self.n_experts, *shape_of(stack.gate)[1:])

    def _weights(self, dtype: jnp.dtype) -> Stack:
        """What the arrays hold (see G above); the updates are those of this layer."""
        params = self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias
        stack = Stack(*(param if param is None else read_weight(param, dtype) for param in params))
        if self.lora is None:
            return stack
        if GATE_UP_TARGET in self.lora.targets:
            a, halves = self.gate_up_lora_a[...], jnp.split(self.gate_up_lora_b[...], 2, axis=-1)
            gate, up = (self._adapted(*parts) for parts in zip(stack[:2], (a, a), halves, strict=True))
            stack = stack._replace(gate=gate, up=up)
        if DOWN_TARGET in self.lora.targets:
            down = self._adapted(stack.down, self.down_lora_a[...], self.down_lora_b[...])
            stack = stack._replace(down=down)
        return stack

    def _adapted(self, weight: Weight, a_EIr: jax.Array, b_ErO: jax.Array) -> Adapted:
        return Adapted(weight, a_EIr, self.lora.scale * b_ErO)


class MoE(nnx.Module):
    """Router and experts of one layer, and the shared expert that every token gets besides."""

    def __init__(self, config: ModelConfig) -> None:
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = FeedForward(config, config.shared_dim) if config.shared_dim else None
        self.shared_gate = _shared_gate(config) if config.shared_dim and config.shared_gate else None
        self.config = config

    def __call__(
        self,
        x_BTD: jax.Array,
        forced_logits_BTE: jax.Array | None,
        forced_BT: jax.Array | None,
        place: Place,
        compute: Compute,
    ) -> tuple[jax.Array, jax.Array]:
        """Routes and computes.

        Args:
            x_BTD: normalised hidden states.
            forced_logits_BTE: router logits to route by instead, where forced_BT is True.
            forced_BT: bool, or None.
            place, compute: as in `Experts`.

        Returns:
            The output [B, T, D] and the router's own logits [B, T, E], float32.
        """
        logits_BTE = self.router(x_BTD)
        used_BTE = logits_BTE
        if forced_BT is not None:
            used_BTE = jnp.where(forced_BT[..., None], forced_logits_BTE, logits_BTE)
        correction = self.router.correction_bias
        weights_BTK, experts_BTK = choose_experts(
            used_BTE, self.config, None if correction is None else correction[...]
        )
        y_BTD = self.experts(x_BTD, weights_BTK, experts_BTK, place, compute)
        return self._with_shared(x_BTD, y_BTD), logits_BTE

    def _with_shared(self, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        if self.shared is None:
            return y_BTD
        shared_BTD = self.shared(x_BTD)
        if self.shared_gate is not None:
            shared_BTD = jax.nn.sigmoid(self.shared_gate(x_BTD)) * shared_BTD
        return y_BTD + shared_BTD


def platform(compute: Compute) -> str:
    """The platform that the program is compiled for: the mesh's, not the host's."""
    if compute.mesh is not None:
        return compute.mesh.devices.flat[0].platform
    return jax.default_backend()


def _shared_gate(config: ModelConfig) -> Linear:
    return Linear("shared_expert_gate", config.d_model, 1, ("embed", None), lora=config.lora)


def _expert_lora(lora: LoraConfig | None) -> LoraConfig | None:
    if lora is None or not {GATE_UP_TARGET, DOWN_TARGET} & set(lora.targets):
        return None
    return lora
