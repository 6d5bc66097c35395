"""The routing penalty: how far the routers' distributions have moved from the aligned model's (L_reg).

Shapes: L MoE layers, B prompts or batch rows, T row length, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from safemoe_jax.errors import InputError

Direction = Literal["forward", "reverse"]
Reduction = Literal["sum_layers", "mean_layers"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "reverse")
REDUCTIONS: tuple[Reduction, ...] = ("sum_layers", "mean_layers")


def alignment_penalty(
    student_logits: jax.Array,
    reference_logits: jax.Array,
    *,
    temperature: float | jax.Array,
    layer_weights: jax.Array | Sequence[float] | None = None,
    token_mask: jax.Array | None = None,
    direction: Direction = "forward",
    reduction: Reduction = "sum_layers",
) -> jax.Array:
    """KL divergence between reference and current routing, a float32 scalar in nats, to be minimised.

    With the defaults this is the number the published code trains on: torch's
    ``KLDivLoss(reduction="batchmean")`` on ``[B, L, E]``, that is, the sum over layers and the mean over
    prompts. ``reduction="mean_layers"`` is the paper's formula, an expectation over layers as well (SafeMoE,
    L_reg).

    Args:
        student_logits: router logits of the model in training, ``[L, B, E]`` (one token a prompt) or
            ``[L, B, T, E]``; any float dtype, computed in float32. The gradient flows into these only.
        reference_logits: router logits of the aligned model, same shape; treated as data.
        temperature: divides both sets of logits before the softmax; published range 0.1 .. 1.3, smaller is
            stronger.
        layer_weights: ``[L]`` non-negative weights (zeros leave layers out, see :func:`layer_selection`);
            None is all ones. ``mean_layers`` divides by their sum.
        token_mask: ``[B]`` or ``[B, T]``, bool or non-negative weights; what is zero contributes neither
            value nor gradient, whatever stands there. None counts everything. An all-zero mask gives 0.
        direction: ``forward`` is KL(reference || current), the published one; ``reverse`` is
            KL(current || reference).
        reduction: ``sum_layers`` or ``mean_layers``.

    Raises:
        InputError: a non-positive concrete temperature, unequal shapes, or an unknown direction or reduction
            (all at trace time).
    """
    if reduction not in REDUCTIONS:
        raise InputError(
            f"unknown reduction {reduction!r}", where="reduction", expected=" or ".join(REDUCTIONS)
        )
    divergence_L = layer_divergence(
        student_logits, reference_logits, temperature=temperature, token_mask=token_mask, direction=direction
    )
    n_layers = divergence_L.shape[0]
    weights_L = jnp.ones(n_layers) if layer_weights is None else jnp.asarray(layer_weights, jnp.float32)
    if weights_L.shape != (n_layers,):
        raise InputError(
            f"layer_weights has shape {weights_L.shape}", where="layer_weights", expected=f"({n_layers},)"
        )
    total = jnp.sum(weights_L * divergence_L)
    return total if reduction == "sum_layers" else total / jnp.sum(weights_L)


def layer_divergence(
    student_logits: jax.Array,
    reference_logits: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    token_mask: jax.Array | None = None,
    direction: Direction = "forward",
) -> jax.Array:
    """KL of each layer averaged over the tokens that count: ``[L]`` float32, nats. Arguments as in the
    penalty."""
    if student_logits.ndim not in (3, 4):
        raise InputError(
            f"router logits have shape {student_logits.shape}",
            where="student_logits",
            expected="[L,B,E] or [L,B,T,E]",
        )
    if token_mask is None:
        divergence = token_divergence(
            student_logits, reference_logits, temperature=temperature, direction=direction
        )
        return jnp.mean(divergence.reshape(divergence.shape[0], -1), axis=1)
    weights = jnp.asarray(token_mask, jnp.float32)
    if weights.shape != student_logits.shape[1:-1]:
        raise InputError(
            f"token_mask has shape {weights.shape}",
            where="token_mask",
            expected=str(student_logits.shape[1:-1]),
        )
    # Both inputs are replaced where nothing counts: a NaN in padding would reach the gradient by 0 * NaN.
    counts = (weights > 0)[None, ..., None]
    student = jnp.where(counts, student_logits, 0.0)
    reference = jnp.where(counts, reference_logits, 0.0)
    divergence = token_divergence(student, reference, temperature=temperature, direction=direction)
    axes = tuple(range(1, divergence.ndim))
    total = jnp.sum(weights)
    return jnp.sum(divergence * weights, axis=axes) / jnp.where(total > 0, total, 1.0)


def token_divergence(
    student_logits: jax.Array,
    reference_logits: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    direction: Direction = "forward",
) -> jax.Array:
    """KL of every token's routing distribution: ``[..., E]`` and ``[..., E]`` to ``[...]`` float32, nats.

    Raises InputError as :func:`alignment_penalty` does.
    """
    _check_temperature(temperature)
    if direction not in DIRECTIONS:
        raise InputError(
            f"unknown direction {direction!r}", where="direction", expected=" or ".join(DIRECTIONS)
        )
    if student_logits.shape != reference_logits.shape:
        raise InputError(
            f"student logits {student_logits.shape} against reference logits {reference_logits.shape}",
            where="reference_logits",
            expected="the same layers, prompts and experts in both",
        )
    student = _tempered_log_softmax(student_logits, temperature)
    reference = _tempered_log_softmax(jax.lax.stop_gradient(reference_logits), temperature)
    first, second = (reference, student) if direction == "forward" else (student, reference)
    return jnp.sum(jnp.exp(first) * (first - second), axis=-1)


def layer_selection(moe_layers: Sequence[int], layers: Sequence[int] | None) -> np.ndarray:
    """Layer weights that keep only the named decoder layers: ``[L]`` float32, 0 or 1, for ``layer_weights``.

    Args:
        moe_layers: decoder layer index of each MoE layer, ascending (``config.moe_layers``).
        layers: decoder layer indices to keep; negative ones count from the last MoE layer; None keeps all.

    Raises:
        InputError: no layer named, or one that has no router.
    """
    if layers is None:
        return np.ones(len(moe_layers), np.float32)
    expected = f"some of {', '.join(map(str, moe_layers))}"
    if not layers:
        raise InputError("no layer is named", where="layers", expected=expected)
    weights = np.zeros(len(moe_layers), np.float32)
    position_of = {layer: position for position, layer in enumerate(moe_layers)}
    for layer in layers:
        position = position_of.get(layer, len(moe_layers) + layer if -len(moe_layers) <= layer < 0 else None)
        if position is None:
            raise InputError(f"layer {layer} has no router", where="layers", expected=expected)
        weights[position] = 1.0
    return weights


def _tempered_log_softmax(logits: jax.Array, temperature: float | jax.Array) -> jax.Array:
    # The maximum goes first so that a small temperature cannot push large logits to infinity.
    logits = logits.astype(jnp.float32)
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    return jax.nn.log_softmax(shifted / temperature, axis=-1)


def _check_temperature(temperature: float | jax.Array) -> None:
    # A traced temperature has no value yet; configurations check theirs when they are built.
    if not isinstance(temperature, jax.core.Tracer) and not float(temperature) > 0:
        raise InputError(f"temperature is {temperature}", where="temperature", expected="a number above 0")
