"""The decoder: embedding, scanned layers, final norm, output projection; router logits are explicit outputs.

Legend: B rows, T positions, S key slots, D model width, V vocabulary, E experts, L MoE layers, R layers of a
segment, X any leading axes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from safemoe_jax.models.attention import Attention, LayerCache
from safemoe_jax.models.config import Compute, ModelConfig
from safemoe_jax.models.experts import MoE
from safemoe_jax.models.norms import RMSNorm
from safemoe_jax.models.params import Params, ParamSpec, Weights, bind, flat_state
from safemoe_jax.models.rope import rotary_tables
from safemoe_jax.parallel.mesh import constrain
from safemoe_jax.routing.override import RoutingOverride

ACTIVATION_AXES = ("batch", None, None)
DEFAULT_COMPUTE = Compute()
_EXPERT_STACKS = tuple(f"moe.experts.{name}" for name in ("gate", "up", "down"))


class Output(NamedTuple):
    """What a forward pass returns.

    logits: float32 [B, T, V], or None where not asked for.
    router_logits: float32 [L, B, T, E], before the softmax, one entry a MoE layer (`moe_layers`).
    hidden: [B, T, D] after the final norm.
    """

    logits: jax.Array | None
    router_logits: jax.Array
    hidden: jax.Array


class Cache(NamedTuple):
    """Keys and values of every segment, each [R, B, G, S, H]."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


class _Row(NamedTuple):
    """What every layer of one pass shares: rotary tables, attention mask, overridden positions, first cache
    slot."""

    rope: tuple[jax.Array, jax.Array]
    mask_BTS: jax.Array
    forced_BT: jax.Array | None
    slot: jax.Array | None


class Layer(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig) -> None:
        self.input_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.post_attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.moe = MoE(config)

    def attend(
        self, x_BTD: jax.Array, row: _Row, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attention with its residual."""
        with jax.named_scope("attention"):
            y_BTD, cache = self.attention(self.input_norm(x_BTD), row.rope, row.mask_BTS, cache)
        return x_BTD + y_BTD, cache

    def route(self, x_BTD: jax.Array) -> jax.Array:
        """Router logits [B, T, E] of the states after attention; no expert is computed."""
        return self.moe.router(self.post_attention_norm(x_BTD))

    def experts(
        self,
        x_BTD: jax.Array,
        row: _Row,
        forced_logits_BTE: jax.Array | None,
        first_group: jax.Array | int,
        compute: Compute,
    ) -> tuple[jax.Array, jax.Array]:
        """Experts with their residual, and the router logits."""
        with jax.named_scope("moe"):
            h_BTD = self.post_attention_norm(x_BTD)
            y_BTD, logits_BTE = self.moe(h_BTD, forced_logits_BTE, row.forced_BT, first_group, compute)
        return x_BTD + y_BTD, logits_BTE


class Embed(nnx.Module):
    """The embedding table."""

    def __init__(self, config: ModelConfig) -> None:
        self.embedding = nnx.Param(ParamSpec((config.vocab_size, config.d_model), ("vocab", "embed")))


class Unembed(nnx.Module):
    """The output projection of an untied model."""

    def __init__(self, config: ModelConfig) -> None:
        self.kernel = nnx.Param(ParamSpec((config.d_model, config.vocab_size), ("embed", "vocab")))


def declare(config: ModelConfig) -> dict[str, ParamSpec]:
    """Every parameter of the network (adapters included) by name: the one declaration of shapes and axes."""
    specs = {"embed.embedding": flat_state(Embed(config))["embedding"].get_value()}
    for s, segment in enumerate(config.segments):
        for p, _ in enumerate(segment.pattern):
            for name, variable in flat_state(Layer(config)).items():
                specs[f"segments.{s}.{p}.{name}"] = variable.get_value().stacked(segment.repeats)
    specs["final_norm.scale"] = flat_state(RMSNorm(config.d_model, config.norm_eps))["scale"].get_value()
    if not config.tie_embeddings:
        specs["lm_head.kernel"] = flat_state(Unembed(config))["kernel"].get_value()
    return specs


def forward(
    config: ModelConfig,
    weights: Weights,
    tokens_BT: jax.Array,
    *,
    attention_mask: jax.Array | None = None,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    override: RoutingOverride | None = None,
    compute: Compute = DEFAULT_COMPUTE,
) -> Output:
    """Logits, router logits and final hidden states.

    Args:
        config: the network (static).
        weights: its parameters.
        tokens_BT: int32 token ids, right-padded.
        attention_mask: [B, T] of 0/1, real tokens; all real by default.
        positions: int32 [B, T]; 0..T-1 by default.
        segment_ids: int32 [B, T]; tokens see only tokens of their own segment (packing), 0 is padding. Takes
            the place of attention_mask.
        override: routing to follow instead of the model's own (`routing.override`).
        compute: dtype, kernels and mesh (static).

    Returns:
        Output with every field filled.
    """
    out = hidden_states(
        config,
        weights,
        tokens_BT,
        attention_mask=attention_mask,
        positions=positions,
        segment_ids=segment_ids,
        override=override,
        compute=compute,
    )
    return out._replace(logits=unembed(config, weights, out.hidden))


def hidden_states(
    config: ModelConfig,
    weights: Weights,
    tokens_BT: jax.Array,
    *,
    attention_mask: jax.Array | None = None,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    override: RoutingOverride | None = None,
    compute: Compute = DEFAULT_COMPUTE,
) -> Output:
    """`forward` without the vocabulary projection: logits is None."""
    row = _row(config, tokens_BT, attention_mask, positions, segment_ids, override)
    x_BTD = _embed(weights, tokens_BT, compute)
    router_logits = []
    for s, _ in enumerate(config.segments):
        x_BTD, logits_RBTE, _ = _run_segment(
            config, weights, s, x_BTD, row, _layers_of(override, config, s), compute
        )
        router_logits.append(logits_RBTE)
    return Output(None, _stack(router_logits), _final_norm(config, weights, x_BTD))


def routing_pass(
    config: ModelConfig,
    weights: Weights,
    tokens_BT: jax.Array,
    *,
    attention_mask: jax.Array | None = None,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    compute: Compute = DEFAULT_COMPUTE,
) -> jax.Array:
    """Router logits float32 [L, B, T, E] only: stops at the last router, whose experts are not computed."""
    row = _row(config, tokens_BT, attention_mask, positions, segment_ids, None)
    x_BTD = _embed(weights, tokens_BT, compute)
    router_logits = []
    last = len(config.segments) - 1
    for s in range(last):
        x_BTD, logits_RBTE, _ = _run_segment(config, weights, s, x_BTD, row, None, compute)
        router_logits.append(logits_RBTE)
    repeats = config.segments[last].repeats
    if repeats > 1:
        x_BTD, logits_RBTE, _ = _run_segment(
            config, weights, last, x_BTD, row, None, compute, stop=repeats - 1
        )
        router_logits.append(logits_RBTE)
    trainable = {k: v[-1] for k, v in _segment_params(weights.trainable, last).items()}
    layer, _ = _layer(config, _frozen_stacks(weights, last, compute), trainable, repeats - 1)
    x_BTD, _ = layer.attend(x_BTD, row, None)
    router_logits.append(layer.route(x_BTD)[None])
    return _stack(router_logits)


def prefill(
    config: ModelConfig,
    weights: Weights,
    tokens_BT: jax.Array,
    attention_mask_BT: jax.Array,
    *,
    cache_length: int,
    override: RoutingOverride | None = None,
    compute: Compute = DEFAULT_COMPUTE,
) -> tuple[jax.Array, Cache]:
    """Runs right-padded prompts and fills the cache.

    Args:
        tokens_BT: prompts, int32, right-padded to T.
        attention_mask_BT: 0/1, real tokens.
        cache_length: key slots to allocate, at least T plus the tokens to decode.
        override: forced routing on prompt positions.

    Returns:
        Logits at each row's last real token, float32 [B, V], and the cache; its slot t holds prompt position
        t.
    """
    row = _row(config, tokens_BT, attention_mask_BT, None, None, override)
    pad = cache_length - tokens_BT.shape[1]
    mask_BTS = jnp.pad(row.mask_BTS, ((0, 0), (0, 0), (0, pad)))
    row = row._replace(mask_BTS=mask_BTS, slot=jnp.int32(0))
    cache = _empty_cache(config, tokens_BT.shape[0], cache_length, compute)
    x_BTD = _embed(weights, tokens_BT, compute)
    for s, _ in enumerate(config.segments):
        forced = _layers_of(override, config, s)
        x_BTD, _, cache = _run_segment(config, weights, s, x_BTD, row, forced, compute, cache=cache)
    last_B = attention_mask_BT.sum(axis=1, dtype=jnp.int32) - 1
    x_BD = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
    return unembed(config, weights, _final_norm(config, weights, x_BD)), cache


def decode_step(
    config: ModelConfig,
    weights: Weights,
    token_B: jax.Array,
    position_B: jax.Array,
    slot: jax.Array,
    cache: Cache,
    *,
    valid_BS: jax.Array,
    compute: Compute = DEFAULT_COMPUTE,
) -> tuple[jax.Array, Cache]:
    """One token a row.

    Args:
        token_B: int32, the tokens just chosen.
        position_B: int32, their positions (each row's own length so far).
        slot: int32 scalar, the cache slot that all rows write.
        cache: as returned by `prefill` or the last step.
        valid_BS: bool, slots that hold a real token of the row, `slot` included.

    Returns:
        Logits float32 [B, V] for the next token, and the updated cache.
    """
    rope = rotary_tables(config.rope, config.head_dim, position_B[:, None])
    row = _Row(rope, valid_BS[:, None, :], None, slot)
    x_BTD = _embed(weights, token_B[:, None], compute)
    for s, _ in enumerate(config.segments):
        x_BTD, _, cache = _run_segment(config, weights, s, x_BTD, row, None, compute, cache=cache)
    return unembed(config, weights, _final_norm(config, weights, x_BTD[:, 0])), cache


def unembed(config: ModelConfig, weights: Weights, hidden_XD: jax.Array) -> jax.Array:
    """Logits over the vocabulary, float32 [X, V], of final hidden states [X, D]."""
    params = weights.merged()
    with jax.named_scope("unembed"):
        kernel_DV = params["embed.embedding"].T if config.tie_embeddings else params["lm_head.kernel"]
        return jnp.matmul(hidden_XD, kernel_DV.astype(hidden_XD.dtype), preferred_element_type=jnp.float32)


def _row(
    config: ModelConfig,
    tokens_BT: jax.Array,
    attention_mask: jax.Array | None,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    override: RoutingOverride | None,
) -> _Row:
    length = tokens_BT.shape[1]
    columns = jnp.arange(length, dtype=jnp.int32)
    if positions is None:
        positions = jnp.broadcast_to(columns, tokens_BT.shape)
    mask_BTS = (columns[:, None] >= columns[None, :])[None]
    if segment_ids is None and attention_mask is not None:
        segment_ids = attention_mask
    if segment_ids is not None:
        same_BTS = segment_ids[:, :, None] == segment_ids[:, None, :]
        # A padding query keeps its own key, so that no row of the softmax is empty.
        mask_BTS = mask_BTS & same_BTS
    mask_BTS = jnp.broadcast_to(mask_BTS, (*tokens_BT.shape, length))
    forced_BT = None if override is None else override.mask
    return _Row(rotary_tables(config.rope, config.head_dim, positions), mask_BTS, forced_BT, None)


def _embed(weights: Weights, tokens_BT: jax.Array, compute: Compute) -> jax.Array:
    table_VD = weights.merged()["embed.embedding"]
    x_BTD = jnp.take(table_VD, tokens_BT, axis=0).astype(compute.jnp_dtype)
    return constrain(x_BTD, compute.mesh, ACTIVATION_AXES)


def _final_norm(config: ModelConfig, weights: Weights, x_XD: jax.Array) -> jax.Array:
    norm = RMSNorm(config.d_model, config.norm_eps)
    return bind(norm, {"scale": weights.merged()["final_norm.scale"]})(x_XD)


def _run_segment(
    config: ModelConfig,
    weights: Weights,
    s: int,
    x_BTD: jax.Array,
    row: _Row,
    forced_RBTE: jax.Array | None,
    compute: Compute,
    *,
    stop: int | None = None,
    cache: Cache | None = None,
) -> tuple[jax.Array, jax.Array, Cache | None]:
    """Scans the first `stop` layers of a segment (all by default).

    Frozen weights are read from their stack by layer index, so that a partial pass copies none of them and
    the backward pass keeps none of them; trainable weights are scanned over, so that their gradients are
    stacked, not summed.
    """
    stop = config.segments[s].repeats if stop is None else stop
    frozen = _frozen_stacks(weights, s, compute)
    trainable = {k: v[:stop] for k, v in _segment_params(weights.trainable, s).items()}
    stacks = None if cache is None else (cache.keys[s], cache.values[s])

    def body(carry: tuple, per_layer: tuple) -> tuple[tuple, jax.Array]:
        x_BTD, stacks = carry
        index, trainable, forced_BTE = per_layer
        layer, first_group = _layer(config, frozen, trainable, index)
        layer_cache = None if stacks is None else LayerCache(*stacks, index, row.slot)
        x_BTD, layer_cache = layer.attend(x_BTD, row, layer_cache)
        x_BTD, logits_BTE = layer.experts(x_BTD, row, forced_BTE, first_group, compute)
        stacks = None if layer_cache is None else (layer_cache.keys_RBGSH, layer_cache.values_RBGSH)
        return (constrain(x_BTD, compute.mesh, ACTIVATION_AXES), stacks), logits_BTE

    per_layer = (jnp.arange(stop, dtype=jnp.int32), trainable, forced_RBTE)
    (x_BTD, stacks), logits_RBTE = jax.lax.scan(_rematerialised(body, compute), (x_BTD, stacks), per_layer)
    if stacks is not None:
        cache = Cache(_replaced(cache.keys, s, stacks[0]), _replaced(cache.values, s, stacks[1]))
    return x_BTD, logits_RBTE, cache


def _rematerialised(body: callable, compute: Compute) -> callable:
    # Slices of the frozen stacks are cheap to read again; saving them would be a second copy of the weights.
    policy = jax.checkpoint_policies.save_anything_except_these_names("frozen_weights")
    if compute.remat == "full":
        policy = jax.checkpoint_policies.nothing_saveable
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def _layer(
    config: ModelConfig,
    frozen: Params,
    trainable: Params,
    index: jax.Array | int,
) -> tuple[Layer, jax.Array | int]:
    """Layer `index` of a segment, and where its experts begin in the expert arrays.

    Args:
        config: the network.
        frozen: the segment's frozen stacks, as `_frozen_stacks` gives them.
        trainable: this layer's trainable parameters.
        index: int32, the layer's place in the segment.
    """
    arrays, first_group = dict(trainable), 0
    for name, stack in frozen.items():
        if name in _EXPERT_STACKS and stack.ndim == 3:
            arrays[name], first_group = stack, index * config.n_experts
        else:
            layer_slice = jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)
            arrays[name] = checkpoint_name(layer_slice, "frozen_weights")
    return bind(Layer(config), arrays), first_group


def _frozen_stacks(weights: Weights, s: int, compute: Compute) -> Params:
    """A segment's frozen parameters, stacked over its layers.

    On one device an expert stack is handed to the kernel whole, [R * E, ...] (a reshape, no copy), because
    the kernel reads one expert at a time. On a mesh its expert axis may be split, so there each layer is
    sliced.
    """
    frozen = _segment_params(weights.frozen, s)
    if compute.mesh is not None and compute.mesh.size > 1:
        return frozen
    return {
        name: stack.reshape(-1, *stack.shape[2:]) if name in _EXPERT_STACKS else stack
        for name, stack in frozen.items()
    }


def _segment_params(params: Params, s: int, p: int = 0) -> Params:
    prefix = f"segments.{s}.{p}."
    return {name[len(prefix) :]: value for name, value in params.items() if name.startswith(prefix)}


def _layers_of(override: RoutingOverride | None, config: ModelConfig, s: int) -> jax.Array | None:
    if override is None:
        return None
    segment = config.segments[s]
    first = config.moe_layers.index(segment.first_layer)
    return override.router_logits[first : first + segment.repeats]


def _empty_cache(config: ModelConfig, batch: int, length: int, compute: Compute) -> Cache:
    def zeros() -> tuple[jax.Array, ...]:
        shape = (batch, config.n_kv_heads, length, config.head_dim)
        return tuple(jnp.zeros((segment.repeats, *shape), compute.jnp_dtype) for segment in config.segments)

    return Cache(zeros(), zeros())


def _stack(parts: list[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)


def _replaced(items: tuple, index: int, value: jax.Array) -> tuple:
    return (*items[:index], value, *items[index + 1 :])
