"""The experts' feed-forward: one function, one kernel a platform, sparse and without dropping on all.

Legend: T tokens, K experts a token (top-k), N = T*K pairs sorted by expert, D model width, F expert width,
G groups in the weight stack, E experts, M rows padded to whole tiles.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from safemoe_jax.errors import InputError
from safemoe_jax.models.activation import SILU, Activation
from safemoe_jax.models.adapted import Adapted, AnyWeight, shape_of, times
from safemoe_jax.models.expert_blocks import blocks_ffn
from safemoe_jax.models.expert_layout import Pairs, collect, dispatch, sort_pairs
from safemoe_jax.models.expert_stack import OwnArrays, Stack
from safemoe_jax.models.quantised import Int4, Quantised

Kernel = Literal["dense", "blocks", "ragged", "megablox"]
KERNELS: tuple[Kernel, ...] = ("dense", "blocks", "ragged", "megablox")

_TILE = 128  # rows, inner and outer width of a megablox tile


def choose_kernel(platform: str, tokens: int, top_k: int, n_experts: int, d: int, f: int) -> Kernel:
    """The cheapest kernel for a platform ("cpu", "gpu", "tpu") and these shapes, by measurement.

    Args:
        platform: of the mesh that the program is compiled for, not of the host.
        tokens: T.
        top_k, n_experts, d, f: K, E, D, F.
    """
    if platform != "cpu":
        return "megablox" if platform == "tpu" and d % _TILE == 0 and f % _TILE == 0 else "ragged"
    blocks = _blocks_nanoseconds(tokens * top_k, d, f)
    dense = _dense_nanoseconds(tokens, n_experts, d, f)
    return "dense" if n_experts <= top_k or dense < blocks else "blocks"


# Both are fitted to forward times on two cores; experiments/bench_experts.py checks the choice.
def _blocks_nanoseconds(n_pairs: int, d: int, f: int) -> float:
    start, sorting_a_pair, flops_a_nanosecond = 100_000, 300, 120
    return start + n_pairs * (sorting_a_pair + 6 * d * f / flops_a_nanosecond)


def _dense_nanoseconds(tokens: int, n_experts: int, d: int, f: int) -> float:
    activation, slicing, flops_a_nanosecond = 2.5, 3, 150
    time = tokens * n_experts * f * (6 * d / flops_a_nanosecond + activation) + slicing * n_experts * d * f
    return 1.2 * time  # its backward pass fares worse than its forward


def expert_ffn(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    experts_TK: jax.Array,
    gate_GDF: AnyWeight,
    up_GDF: AnyWeight,
    down_GFD: AnyWeight,
    *,
    first_group: jax.Array | int,
    n_experts: int,
    kernel: Kernel,
    mesh: Mesh | None = None,
    biases: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    activation: Activation = SILU,
    scale_input: bool = False,
    own: OwnArrays | None = None,
) -> jax.Array:
    """y[t] = sum_k weights[t,k] * down_e(activation(gate_e x_t, up_e x_t)), e = experts[t,k]; no drops.

    With `scale_input` the weight stands inside: y[t] = sum_k ffn_e(weights[t,k] * x_t).

    Under a mesh of several devices each computes its own tokens (axes "data" and "fsdp"), its own experts
    ("expert") and its own slice of the expert width ("tensor"); the partial results are summed over the
    latter two. The weights are then gathered over "fsdp" for this layer only, so a caller should pass one
    layer (G = E), not the whole stack.

    Args:
        x_TD: float32 or bfloat16.
        weights_TK: combine weights of the router.
        experts_TK: int32 in [0, E).
        gate_GDF, up_GDF, down_GFD: weights of one layer or a stack of layers, quantised or not. Only "blocks"
            on one device reads a stack in place; the others slice the layer out of it. Factors of adapted
            weights are those of this layer, [E, ...], in either case.
        first_group: where this layer's E groups begin; may be traced.
        n_experts: E.
        kernel: "dense" (all experts; the oracle), "blocks" (CPU), "ragged" (`jax.lax.ragged_dot`) or
            "megablox" (Pallas kernel for TPUs, interpreted elsewhere).
        mesh: the mesh that the program is compiled for, if any.
        biases: of gate and up [G,F] and of down [G,D]; each is added once a chosen expert.
        activation: what stands between the projections, silu(gate) * up by default.
        scale_input: the weights multiply the experts' input, not their output.
        own: the matrices once more, an array a layer; "blocks" on one device may read these instead.

    Returns:
        [T,D] in the dtype of x_TD; products are accumulated in float32.

    Raises:
        InputError: the kernel is unknown, or the mesh does not divide the experts or their width.
    """
    if kernel not in KERNELS:
        raise InputError(f"no expert kernel {kernel!r}", where="experts", expected=f"one of {KERNELS}")
    stack = Stack(gate_GDF, up_GDF, down_GFD, *(biases or ()))
    arguments = x_TD, weights_TK, experts_TK
    if scale_input:
        arguments = _one_row_a_pair(*arguments)
    if mesh is not None and mesh.size > 1:
        stack = stack.layer(first_group, n_experts)
        y_XD = _sharded(*arguments, stack, n_experts, kernel, mesh, activation)
    else:
        interpret = _platform(mesh) != "tpu"
        y_XD = _one_device(*arguments, stack, first_group, n_experts, kernel, interpret, activation, own)
    y_XD = y_XD.astype(x_TD.dtype)
    return y_XD.reshape(*experts_TK.shape, -1).sum(1) if scale_input else y_XD


def _one_row_a_pair(
    x_TD: jax.Array, weights_TK: jax.Array, experts_TK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each pair as a token of its own, already weighted: rows [N,D], weights [N,1] of one, experts [N,1]."""
    rows_TKD = x_TD[:, None] * weights_TK[..., None].astype(x_TD.dtype)
    ones_N1 = jnp.ones((experts_TK.size, 1), weights_TK.dtype)
    return rows_TKD.reshape(-1, x_TD.shape[1]), ones_N1, experts_TK.reshape(-1, 1)


def _platform(mesh: Mesh | None) -> str:
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def _one_device(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    experts_TK: jax.Array,
    stack: Stack,
    first_group: jax.Array | int,
    n_experts: int,
    kernel: Kernel,
    interpret: bool,
    activation: Activation,
    own: OwnArrays | None = None,
) -> jax.Array:
    """float32 [T,D]; experts outside [0, n_experts) contribute zero."""
    if kernel == "blocks":
        return blocks_ffn(x_TD, weights_TK, experts_TK, stack, first_group, n_experts, activation, own)
    stack = stack.layer(first_group, n_experts)
    if kernel == "dense":
        return _dense(x_TD, weights_TK, experts_TK, stack, activation)
    return _grouped(x_TD, weights_TK, experts_TK, stack, kernel, interpret, activation)


def _dense(
    x_TD: jax.Array, weights_TK: jax.Array, experts_TK: jax.Array, stack: Stack, activation: Activation
) -> jax.Array:
    """Every expert for every token, weighted with zero where it was not chosen.

    The experts side by side (X = E*F columns) are one wide feed-forward: three plain matrix products.
    """
    n_experts, _, expert_width = shape_of(stack.gate)
    weights_TE = (jax.nn.one_hot(experts_TK, n_experts) * weights_TK[..., None].astype(jnp.float32)).sum(1)
    gate_TX, up_TX = (times(_side_by_side, x_TD, w) for w in stack[:2])
    if stack.down_bias is not None:
        gate_TX, up_TX = gate_TX + stack.gate_bias.reshape(-1), up_TX + stack.up_bias.reshape(-1)
    act_TX = activation.forward(gate_TX, up_TX) * jnp.repeat(weights_TE, expert_width, axis=1)
    y_TD = times(_stacked, act_TX.astype(x_TD.dtype), stack.down)
    return y_TD if stack.down_bias is None else y_TD + weights_TE @ stack.down_bias.astype(jnp.float32)


def _side_by_side(x_TD: jax.Array, weights_EDF: jax.Array, _: None) -> jax.Array:
    weights_DX = weights_EDF.swapaxes(0, 1).reshape(x_TD.shape[1], -1)
    return jnp.dot(x_TD, weights_DX, preferred_element_type=jnp.float32)


def _stacked(act_TX: jax.Array, weights_EFD: jax.Array, _: None) -> jax.Array:
    weights_XD = weights_EFD.reshape(act_TX.shape[1], -1)
    return jnp.dot(act_TX, weights_XD, preferred_element_type=jnp.float32)


def _grouped(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    experts_TK: jax.Array,
    stack: Stack,
    kernel: Kernel,
    interpret: bool,
    activation: Activation,
) -> jax.Array:
    """Rows sorted by expert through three grouped matmuls.

    Rows of no expert are zeroed going in and coming out, because kernels leave theirs undefined; the first
    mask cleans the gradient on its way back.
    """
    pairs = sort_pairs(experts_TK, shape_of(stack.gate)[0])
    own_N1 = (jnp.arange(pairs.order_N.size) < pairs.used)[:, None]
    rows_ND = jnp.where(own_N1, dispatch(x_TD, pairs), 0)

    product = _ragged if kernel == "ragged" else _megablox_interpreted if interpret else _megablox

    def project(rows: jax.Array, weights: AnyWeight, bias: jax.Array | None) -> jax.Array:
        out = times(product, rows, weights, pairs.counts_E)
        # The mask on the bias is for its gradient: rows of no expert bring undefined values back.
        return out if bias is None else out + jnp.where(own_N1, bias[_expert_of_place(pairs)], 0)

    gate_NF = project(rows_ND, stack.gate, stack.gate_bias)
    up_NF = project(rows_ND, stack.up, stack.up_bias)
    act_NF = activation.forward(gate_NF, up_NF).astype(x_TD.dtype)
    out_ND = jnp.where(own_N1, project(act_NF, stack.down, stack.down_bias), 0)
    return collect(out_ND, weights_TK, pairs)


def _expert_of_place(pairs: Pairs) -> jax.Array:
    """int32 [N], the expert in each place; of places of no expert, the last one."""
    experts_E = jnp.arange(pairs.counts_E.size, dtype=jnp.int32)
    return jnp.repeat(experts_E, pairs.counts_E, total_repeat_length=pairs.order_N.size)


def _ragged(rows: jax.Array, weights: jax.Array, counts_E: jax.Array) -> jax.Array:
    return lax.ragged_dot(rows, weights, counts_E, preferred_element_type=jnp.float32)


def _megablox_interpreted(rows: jax.Array, weights: jax.Array, counts_E: jax.Array) -> jax.Array:
    return _megablox(rows, weights, counts_E, interpret=True)


def _megablox(rows: jax.Array, weights: jax.Array, counts_E: jax.Array, interpret: bool = False) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox import gmm  # Pallas is slow to import and TPU only

    n_rows = rows.shape[0]
    rows_MD = jnp.pad(rows, ((0, -n_rows % _TILE), (0, 0)))
    out = gmm(rows_MD, weights, counts_E, jnp.float32, (_TILE, _TILE, _TILE), interpret=interpret)
    return out[:n_rows]


def _sharded(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    experts_TK: jax.Array,
    stack: Stack,
    n_experts: int,
    kernel: Kernel,
    mesh: Mesh,
    activation: Activation,
) -> jax.Array:
    """`_one_device` on every device, for its tokens, experts and slice of the expert width."""
    _check_divides(mesh, "expert", n_experts, "experts")
    _check_divides(mesh, "tensor", shape_of(stack.gate)[2], "the expert width")
    stack = stack._replace(down=_with_uncut_blocks(stack.down, mesh.shape.get("tensor", 1)))
    batch = tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape)
    if x_TD.shape[0] % math.prod(mesh.shape[axis] for axis in batch):
        batch = None  # too few tokens to split: every device computes all of them
    expert, tensor = (axis if axis in mesh.shape else None for axis in ("expert", "tensor"))
    own_experts = n_experts // mesh.shape.get("expert", 1)
    interpret = _platform(mesh) != "tpu"

    def local(x_TD: jax.Array, weights_TK: jax.Array, experts_TK: jax.Array, stack: Stack) -> jax.Array:
        if expert is not None:
            experts_TK = experts_TK - lax.axis_index(expert) * own_experts
        if tensor is not None and stack.down_bias is not None:
            # The partial sums over the expert width are added up: one of them brings the bias.
            first = lax.axis_index(tensor) == 0
            stack = stack._replace(down_bias=jnp.where(first, stack.down_bias, 0))
        arguments = x_TD, weights_TK, experts_TK, stack
        y_TD = _one_device(*arguments, 0, own_experts, kernel, interpret, activation)
        return y_TD[None]

    # Partial sums leave stacked along a sharded axis and are added outside: the transpose of that sum is a
    # broadcast without communication, where the transpose of a psum inside would be another psum.
    parts = tuple(axis for axis in (expert, tensor) if axis is not None)
    inwards, outwards = P(expert, None, tensor), P(expert, tensor, None)
    weights_in = Stack(*map(_parts_in, stack[:3], (inwards, inwards, outwards)))
    if stack.down_bias is not None:
        weights_in = Stack(*weights_in[:3], P(expert, tensor), P(expert, tensor), P(expert, None))
    tokens_in = P(batch, None)
    y_STD = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(tokens_in, tokens_in, tokens_in, weights_in),
        out_specs=P(parts or None, batch, None),
        check_vma=False,
    )(x_TD, weights_TK, experts_TK, stack)
    return y_STD.sum(0).astype(x_TD.dtype)


def _parts_in(weight: AnyWeight, spec: P) -> P | Quantised | Adapted:
    """Where the parts of a weight lie: scales of 8 bits have no inputs to be split, a rank is never split."""
    if isinstance(weight, Adapted):
        experts, inputs, outputs = spec
        return Adapted(_parts_in(weight.base, spec), P(experts, inputs, None), P(experts, None, outputs))
    if not isinstance(weight, Quantised):
        return spec
    scales = spec if isinstance(weight, Int4) else P(spec[0], None, spec[2])
    return type(weight)(spec, scales)


def _with_uncut_blocks(weight: AnyWeight, shards: int) -> AnyWeight:
    """The same weight, its 4-bit blocks so small that no shard of the inputs cuts one: a block's scale is
    that of its parts too."""
    if isinstance(weight, Adapted):
        return weight._replace(base=_with_uncut_blocks(weight.base, shards))
    if not isinstance(weight, Int4):
        return weight
    parts = shards // math.gcd(shards, weight.scales.shape[1])
    return weight._replace(scales=jnp.repeat(weight.scales, parts, axis=1))


def _check_divides(mesh: Mesh, axis: str, size: int, what: str) -> None:
    shards = mesh.shape.get(axis, 1)
    if size % shards:
        raise InputError(
            f"{shards} devices cannot share {what} ({size}) evenly",
            where=f"mesh axis {axis!r}",
            expected=f"a divisor of {size}",
        )
