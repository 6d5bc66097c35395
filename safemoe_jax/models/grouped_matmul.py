"""The experts' feed-forward, one function with one kernel a platform; sparse and without dropping on all of them.

Legend: T tokens, K experts a token (top-k), N = T*K pairs sorted by expert, D model width, F expert width,
G groups in the weight stack, E experts, R layers stacked.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from safemoe_jax.models.expert_blocks import Stack, blocks_ffn

Kernel = Literal["dense", "blocks", "ragged", "megablox"]


def expert_ffn(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    experts_TK: jax.Array,
    gate_GDF: jax.Array,
    up_GDF: jax.Array,
    down_GFD: jax.Array,
    *,
    first_group: jax.Array | int,
    n_experts: int,
    kernel: Kernel,
    mesh: Mesh | None = None,
) -> jax.Array:
    """y[t] = sum_k weights[t,k] * down_e (silu(gate_e x_t) * (up_e x_t)) with e = experts[t,k]; no token is dropped.

    x_TD: float32 or bfloat16. weights_TK: combine weights of the router. experts_TK: int32 in [0, E).
    gate_GDF, up_GDF, down_GFD: stacked weights; this layer's E groups begin at ``first_group`` (may be traced).
    Returns [T,D] in the dtype of ``x_TD``; products are summed in float32.
    """
    stack = Stack(gate_GDF, up_GDF, down_GFD)
    if kernel == "blocks":
        return blocks_ffn(x_TD, weights_TK, experts_TK, stack, first_group, n_experts)
    stack = Stack(*(lax.dynamic_slice_in_dim(w, first_group, n_experts, 0) for w in stack))
    return _dense(x_TD, weights_TK, experts_TK, stack, n_experts)


def _dense(x_TD, weights_TK, experts_TK, stack, n_experts):
    weights_TE = (jax.nn.one_hot(experts_TK, n_experts, dtype=jnp.float32) * weights_TK[..., None]).sum(1)
    gate_TEF = jnp.einsum("td,edf->tef", x_TD, stack.gate, preferred_element_type=jnp.float32)
    up_TEF = jnp.einsum("td,edf->tef", x_TD, stack.up, preferred_element_type=jnp.float32)
    act_TEF = (jax.nn.silu(gate_TEF) * up_TEF * weights_TE[..., None]).astype(x_TD.dtype)
    return jnp.einsum("tef,efd->td", act_TEF, stack.down, preferred_element_type=jnp.float32).astype(
        x_TD.dtype
    )


def choose_kernel(platform: str, tokens: int, top_k: int, n_experts: int, d: int, f: int) -> Kernel:
    """The kernel for these shapes: "blocks" on a CPU but for tiny models, where all experts densely cost less."""
    if platform == "cpu":
        return "dense" if n_experts * f <= 512 else "blocks"
    return "megablox" if platform == "tpu" else "ragged"
