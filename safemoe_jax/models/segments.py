"""Running layers: one scan a segment, or a single layer by its place.

Legend: B rows, T positions, D model width, E experts, R repeats of a segment's pattern, M MoE layers of the
pattern, X any leading axes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive

from safemoe_jax.models.attention import Row, Traits
from safemoe_jax.models.config import Compute, ModelConfig, Segment
from safemoe_jax.models.expert_stack import OwnArrays, Place
from safemoe_jax.models.experts import EXPERT_STACKS, MATRICES
from safemoe_jax.models.kv_cache import Apart, KeysValues, LayerCache, Stacked
from safemoe_jax.models.layer import Layer
from safemoe_jax.models.params import Params, Weights, bind
from safemoe_jax.parallel.mesh import constrain

ACTIVATION_AXES = ("batch", None, None)
_EXPERT_STACKS = tuple(f"moe.experts.{name}" for name in EXPERT_STACKS)
_UNLIMITED = 2**30


def run_segment(
    config: ModelConfig,
    weights: Weights,
    s: int,
    x_BTD: jax.Array,
    row: Row,
    compute: Compute,
    *,
    forced: tuple[jax.Array | None, ...] | None = None,
    stop: int | None = None,
    cache: tuple[Stacked | Apart, ...] | None = None,
    keep: bool = False,
) -> tuple[jax.Array, jax.Array | None, tuple[KeysValues, ...] | None]:
    """Scans the first `stop` repeats of segment `s` (all by default).

    Frozen weights are read from their stack by index, so that a partial pass copies none of them and the
    backward pass keeps none of them; trainable weights are scanned over, so that their gradients are
    stacked, not summed.

    Args:
        config, weights, compute: the network.
        s: the segment's number.
        x_BTD: hidden states.
        row: what its layers share.
        forced: as `forced_of` gives it.
        stop: repeats to run.
        cache: keys and values of earlier tokens, one cache a place in the pattern.
        keep: return the keys and values of these tokens.

    Returns:
        Hidden states, router logits [R * M, B, T, E] in layer order (None without a MoE layer), and for each
        place in the pattern keys [R, B, T, G, H] and values (None unless they are kept).
    """
    segment = config.segments[s]
    stop = segment.repeats if stop is None else stop
    places = range(len(segment.pattern))
    frozen = [_frozen_stacks(weights, s, p, compute) for p in places]
    own = [_own_arrays(weights, s, p) for p in places]
    shared, scanned = _split_traits(config, segment, stop)

    def body(x_BTD: jax.Array, per_repeat: tuple) -> tuple[jax.Array, tuple]:
        repeat, trainable, traits, forced = per_repeat
        router_logits, kept = [], []
        for p, kind in enumerate(segment.pattern):
            layer, experts_at = _bind_layer(config, kind, frozen[p], trainable[p], repeat, own[p])
            seen = None if cache is None else LayerCache(cache[p], repeat)
            x_BTD, new = layer.attend(x_BTD, row, Traits(**shared[p], **traits[p]), seen)
            x_BTD, logits_BTE = layer.feed_forward(x_BTD, row, forced[p], experts_at, compute)
            x_BTD = constrain(x_BTD, compute.mesh, ACTIVATION_AXES)
            router_logits += [] if logits_BTE is None else [logits_BTE]
            kept.append(new)
        return x_BTD, (tuple(router_logits), tuple(kept) if keep else None)

    per_repeat = (
        jnp.arange(stop, dtype=jnp.int32),
        [{k: v[:stop] for k, v in _params_of(weights.trainable, s, p).items()} for p in places],
        scanned,
        (None,) * len(places) if forced is None else forced,
    )
    x_BTD, (router_logits, kept) = jax.lax.scan(_rematerialised(body, compute), x_BTD, per_repeat)
    return x_BTD, _in_layer_order(router_logits), kept


def layer_at(
    config: ModelConfig, weights: Weights, layer: int, compute: Compute
) -> tuple[Layer, Traits, Place]:
    """One layer outside of any scan: its module, its traits, and where its experts lie."""
    s, repeat, p = place_of(config, layer)
    trainable = {name: stack[repeat] for name, stack in _params_of(weights.trainable, s, p).items()}
    frozen = _frozen_stacks(weights, s, p, compute)
    module, experts_at = _bind_layer(config, config.segments[s].pattern[p], frozen, trainable, repeat)
    return module, Traits.of(config.layers[layer]), experts_at


def place_of(config: ModelConfig, layer: int) -> tuple[int, int, int]:
    """Segment, repeat and place in the pattern of a layer."""
    s = max(s for s, segment in enumerate(config.segments) if segment.first_layer <= layer)
    segment = config.segments[s]
    return s, *divmod(layer - segment.first_layer, len(segment.pattern))


def forced_of(
    config: ModelConfig, router_logits_LBTE: jax.Array | None, s: int
) -> tuple[jax.Array | None, ...] | None:
    """A segment's share of router logits of all MoE layers: [R, B, T, E] a MoE layer of the pattern, None a
    dense one."""
    if router_logits_LBTE is None:
        return None
    segment = config.segments[s]
    first = sum(layer < segment.first_layer for layer in config.moe_layers)
    n_moe = segment.pattern.count("moe")
    share = router_logits_LBTE[first : first + segment.repeats * n_moe]
    per_layer = iter([share[m::n_moe] for m in range(n_moe)])
    return tuple(next(per_layer) if kind == "moe" else None for kind in segment.pattern)


def _split_traits(
    config: ModelConfig, segment: Segment, stop: int
) -> tuple[list[dict[str, Any]], list[dict[str, np.ndarray]]]:
    """Per place in the pattern: traits on which all repeats agree, and the others as arrays to scan."""
    shared, scanned = [], []
    for p in range(len(segment.pattern)):
        layers = config.layers[segment.first_layer + p :: len(segment.pattern)][: segment.repeats]
        columns = dict(zip(Traits._fields, zip(*map(Traits.of, layers), strict=True), strict=True))
        shared.append({name: values[0] for name, values in columns.items() if len(set(values)) == 1})
        differing = {name: values[:stop] for name, values in columns.items() if name not in shared[-1]}
        scanned.append({name: _trait_array(name, values) for name, values in differing.items()})
    return shared, scanned


def _trait_array(name: str, values: tuple) -> np.ndarray:
    if name in ("window", "chunk"):
        return np.asarray([value or _UNLIMITED for value in values], np.int32)
    return np.asarray(values, bool)


def _rematerialised(body: callable, compute: Compute) -> callable:
    policy = jax.checkpoint_policies.nothing_saveable if compute.remat == "full" else _saveable
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def _saveable(primitive: Primitive, *_: Any, **__: Any) -> bool:
    """All but slices: those of the frozen stacks are cheap to read again, and would be a second copy of the
    weights."""
    return primitive.name not in ("dynamic_slice", "squeeze")


def _bind_layer(
    config: ModelConfig,
    kind: str,
    frozen: Params,
    trainable: Params,
    repeat: jax.Array | int,
    own: tuple = (),
) -> tuple[Layer, Place]:
    """The layer of one place in the pattern, and where its experts lie.

    Args:
        config, kind: the network, the kind of layer.
        frozen: the place's frozen stacks, as `_frozen_stacks` gives them.
        trainable: this layer's trainable parameters.
        repeat: int32, the layer's index in the stacks.
        own: as `_own_arrays` gives it.
    """
    arrays, first_group = dict(trainable), 0
    for name, stack in frozen.items():
        if name in _EXPERT_STACKS and stack.ndim == (2 if name.endswith("_bias") else 3):
            arrays[name], first_group = stack, repeat * config.n_experts
        else:
            arrays[name] = jax.lax.dynamic_index_in_dim(stack, repeat, keepdims=False)
    return bind(Layer(config, kind), arrays), Place(first_group, OwnArrays(own, repeat) if own else None)


def _frozen_stacks(weights: Weights, s: int, p: int, compute: Compute) -> Params:
    """The frozen parameters of one place in a segment's pattern, stacked over its repeats.

    On one device an expert stack is handed to the kernel whole, [R * E, ...] (a reshape, no copy), because
    the kernel reads one expert at a time. On a mesh its expert axis may be split, so there each layer is
    sliced.
    """
    frozen = _params_of(weights.frozen, s, p)
    if compute.mesh is not None and compute.mesh.size > 1:
        return frozen
    return {
        name: stack.reshape(-1, *stack.shape[2:]) if name in _EXPERT_STACKS else stack
        for name, stack in frozen.items()
    }


def _own_arrays(weights: Weights, s: int, p: int) -> tuple[tuple[jax.Array, ...], ...]:
    """Gate, up and down of each repeat, where there are views of all of them; else ()."""
    names = [f"segments.{s}.{p}.moe.experts.{matrix}" for matrix in MATRICES]
    if not all(name in weights.layers for name in names):
        return ()
    return tuple(zip(*(weights.layers[name] for name in names), strict=True))


def _params_of(params: Params, s: int, p: int) -> Params:
    prefix = f"segments.{s}.{p}."
    return {name[len(prefix) :]: value for name, value in params.items() if name.startswith(prefix)}


def _in_layer_order(router_logits: tuple[jax.Array, ...]) -> jax.Array | None:
    """[R, B, T, E] a MoE layer of the pattern, interleaved to [R * M, B, T, E]."""
    if len(router_logits) < 2:
        return router_logits[0] if router_logits else None
    stacked = jnp.stack(router_logits, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])
