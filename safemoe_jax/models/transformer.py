"""The decoder: embedding, scanned layers, final norm, output projection; router logits are explicit outputs.

Legend: B rows, T positions, S key slots, D model width, V vocabulary, E experts, L MoE layers, X any leading
axes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from safemoe_jax.errors import InputError
from safemoe_jax.models.attention import Row
from safemoe_jax.models.config import Compute, ModelConfig
from safemoe_jax.models.experts import platform
from safemoe_jax.models.kv_cache import Apart, Cache, KeysValues, Stacked
from safemoe_jax.models.layer import Layer
from safemoe_jax.models.norms import model_norm
from safemoe_jax.models.params import Params, ParamSpec, Weights, bind, flat_state
from safemoe_jax.models.rope import Tables, rotary_tables
from safemoe_jax.models.router import choose_experts
from safemoe_jax.models.segments import ACTIVATION_AXES, forced_of, layer_at, place_of, run_segment
from safemoe_jax.parallel.mesh import constrain
from safemoe_jax.routing.override import RoutingOverride

DEFAULT_COMPUTE = Compute()


class Output(NamedTuple):
    """What a forward pass returns.

    logits: float32 [B, T, V], or None where not asked for.
    router_logits: float32 [L, B, T, E], before the softmax, one entry a MoE layer (`moe_layers`).
    hidden: [B, T, D] after the final norm.
    """

    logits: jax.Array | None
    router_logits: jax.Array
    hidden: jax.Array


class Embed(nnx.Module):
    """The embedding table."""

    def __init__(self, config: ModelConfig) -> None:
        self.embedding = nnx.Param(ParamSpec((config.vocab_size, config.d_model), ("vocab", "embed")))


class Unembed(nnx.Module):
    """The output projection: a kernel unless it is the embedding table, a bias where the config has one."""

    def __init__(self, config: ModelConfig) -> None:
        if not config.tie_embeddings:
            self.kernel = nnx.Param(ParamSpec((config.d_model, config.vocab_size), ("embed", "vocab")))
        if config.lm_head_bias:
            self.bias = nnx.Param(ParamSpec((config.vocab_size,), ("vocab",), "zeros"))


def declare(config: ModelConfig) -> dict[str, ParamSpec]:
    """Every parameter of the network (adapters included) by name: the one declaration of shapes and axes."""
    specs = _specs("embed", Embed(config))
    for s, segment in enumerate(config.segments):
        for p, kind in enumerate(segment.pattern):
            layer = _specs(f"segments.{s}.{p}", Layer(config, kind))
            specs |= {name: spec.stacked(segment.repeats) for name, spec in layer.items()}
    return specs | _specs("final_norm", model_norm(config)) | _specs("lm_head", Unembed(config))


def _specs(prefix: str, module: nnx.Module) -> dict[str, ParamSpec]:
    return {f"{prefix}.{name}": variable.get_value() for name, variable in flat_state(module).items()}


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
    x_BTD, router_logits, _ = _all_layers(config, weights, tokens_BT, row, override, compute)
    return Output(None, router_logits, _final_norm(config, weights, x_BTD))


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
    if not config.moe_layers:
        return _stack([], config, tokens_BT)
    x_BTD = _embed(config, weights, tokens_BT, compute)
    last_router = config.moe_layers[-1]
    s_last, repeats, place = place_of(config, last_router)
    router_logits = []
    for s in range(s_last + (repeats > 0)):
        stop = repeats if s == s_last else None
        x_BTD, logits_XBTE, _ = run_segment(config, weights, s, x_BTD, row, compute, stop=stop)
        router_logits.append(logits_XBTE)
    for index in range(last_router - place, last_router + 1):
        layer, traits, experts_at = layer_at(config, weights, index, compute)
        x_BTD, _ = layer.attend(x_BTD, row, traits, None)
        if index == last_router:
            router_logits.append(layer.route(x_BTD)[None])
            break
        x_BTD, logits_BTE = layer.feed_forward(x_BTD, row, None, experts_at, compute)
        router_logits.append(None if logits_BTE is None else logits_BTE[None])
    return _stack(router_logits, config, tokens_BT)


def chosen_experts(config: ModelConfig, weights: Weights, router_logits_LXE: jax.Array) -> jax.Array:
    """The experts that the network gives tokens with these router logits, int32 [L, X, K], best first.

    Each MoE layer chooses by its own rule, with its own correction bias where the family has one.

    Args:
        router_logits_LXE: raw router logits of every MoE layer, in order.

    Raises:
        InputError: logits of other layers or experts than the network's.
    """
    layers, n_experts = router_logits_LXE.shape[0], router_logits_LXE.shape[-1]
    if (layers, n_experts) != (config.n_moe_layers, config.n_experts):
        raise InputError(
            f"router logits of {layers} layers and {n_experts} experts",
            where="router_logits",
            expected=f"{config.n_moe_layers} MoE layers and {config.n_experts} experts",
        )
    correction = _corrections(config, weights.merged())
    if correction is not None:
        correction = correction.reshape(layers, *(1,) * (router_logits_LXE.ndim - 2), n_experts)
    return choose_experts(jnp.asarray(router_logits_LXE, jnp.float32), config, correction)[1]


def _corrections(config: ModelConfig, params: Params) -> jax.Array | None:
    """The correction bias of every MoE layer, [L, E], or None where the routers have none."""
    if not config.routing.correction_bias:
        return None
    places = (place_of(config, layer) for layer in config.moe_layers)
    return jnp.stack(
        [params[f"segments.{s}.{p}.moe.router.correction_bias"][repeat] for s, repeat, p in places]
    )


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
    x_BTD, _, kept = _all_layers(config, weights, tokens_BT, row, override, compute, keep=True)
    kind = Apart if platform(compute) == "cpu" else Stacked
    caches = tuple(tuple(kind.of(new, cache_length) for new in places) for places in kept)
    free = ((0, 0), (0, cache_length - tokens_BT.shape[1]))
    cache = Cache(caches, jnp.pad(row.key_positions_BS, free))
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
        valid_BS: bool, slots that hold a real token of the row, with or without `slot`.

    Returns:
        Logits float32 [B, V] for the next token, and the updated cache.
    """
    position_B1 = position_B[:, None]
    positions_BS = jax.lax.dynamic_update_slice(cache.positions_BS, position_B1, (0, slot))
    rope = _rope(config, position_B1, jnp.max(position_B) + 1)
    seen_B1S = (valid_BS & (jnp.arange(valid_BS.shape[1]) != slot))[:, None, :]
    row = Row(rope, seen_B1S, position_B1, positions_BS, None)
    x_BTD, _, kept = _all_layers(config, weights, token_B[:, None], row, None, compute, cache, keep=True)
    cache = cache._replace(positions_BS=positions_BS).write(kept, slot)
    return unembed(config, weights, _final_norm(config, weights, x_BTD[:, 0])), cache


def unembed(config: ModelConfig, weights: Weights, hidden_XD: jax.Array) -> jax.Array:
    """Logits over the vocabulary, float32 [X, V], of final hidden states [X, D]."""
    params = weights.merged()
    with jax.named_scope("unembed"):
        kernel_DV = params["embed.embedding"].T if config.tie_embeddings else params["lm_head.kernel"]
        logits_XV = jnp.matmul(
            hidden_XD, kernel_DV.astype(hidden_XD.dtype), preferred_element_type=jnp.float32
        )
        if config.lm_head_bias:
            logits_XV = logits_XV + params["lm_head.bias"].astype(jnp.float32)
        return logits_XV if config.logits_divisor == 1 else logits_XV / config.logits_divisor


def _all_layers(
    config: ModelConfig,
    weights: Weights,
    tokens_BT: jax.Array,
    row: Row,
    override: RoutingOverride | None,
    compute: Compute,
    cache: Cache | None = None,
    keep: bool = False,
) -> tuple[jax.Array, jax.Array, list[tuple[KeysValues, ...] | None]]:
    """Embeds and runs every segment: hidden states before the final norm, router logits, keys and values (see
    `run_segment`)."""
    x_BTD = _embed(config, weights, tokens_BT, compute)
    forced_LBTE = None if override is None else override.router_logits
    router_logits, kept = [], []
    for s, _ in enumerate(config.segments):
        forced, seen = forced_of(config, forced_LBTE, s), None if cache is None else cache.segments[s]
        x_BTD, logits_XBTE, new = run_segment(
            config, weights, s, x_BTD, row, compute, forced=forced, cache=seen, keep=keep
        )
        router_logits.append(logits_XBTE)
        kept.append(new)
    return x_BTD, _stack(router_logits, config, tokens_BT), kept


def _row(
    config: ModelConfig,
    tokens_BT: jax.Array,
    attention_mask: jax.Array | None,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    override: RoutingOverride | None,
) -> Row:
    length = tokens_BT.shape[1]
    columns = jnp.arange(length, dtype=jnp.int32)
    if positions is None:
        positions = jnp.broadcast_to(columns, tokens_BT.shape)
    mask_BTS = (columns[:, None] >= columns[None, :])[None]
    if segment_ids is None and attention_mask is not None:
        segment_ids = attention_mask
    longest = jnp.max(positions) + 1
    if segment_ids is not None:
        same_BTS = segment_ids[:, :, None] == segment_ids[:, None, :]
        # A padding query keeps its own key, so that no row of the softmax is empty.
        mask_BTS = mask_BTS & same_BTS
        longest = jnp.max(jnp.where(segment_ids > 0, positions, 0)) + 1
    mask_BTS = jnp.broadcast_to(mask_BTS, (*tokens_BT.shape, length))
    forced_BT = None if override is None else override.mask
    return Row(_rope(config, positions, longest), mask_BTS, positions, positions, forced_BT)


def _rope(config: ModelConfig, positions_BT: jax.Array, longest: jax.Array) -> Tables:
    width = config.head_dim if config.mla is None else config.mla.rope_dim
    return rotary_tables(config.rope, width, positions_BT, longest)


def _embed(config: ModelConfig, weights: Weights, tokens_BT: jax.Array, compute: Compute) -> jax.Array:
    table_VD = weights.merged()["embed.embedding"]
    x_BTD = jnp.take(table_VD, tokens_BT, axis=0).astype(compute.jnp_dtype)
    x_BTD = x_BTD if config.embedding_scale == 1 else x_BTD * config.embedding_scale
    return constrain(x_BTD, compute.mesh, ACTIVATION_AXES)


def _final_norm(config: ModelConfig, weights: Weights, x_XD: jax.Array) -> jax.Array:
    prefix = "final_norm."
    params = {k.removeprefix(prefix): v for k, v in weights.merged().items() if k.startswith(prefix)}
    return bind(model_norm(config), params)(x_XD)


def _stack(parts: list[jax.Array | None], config: ModelConfig, tokens_BT: jax.Array) -> jax.Array:
    parts = [part for part in parts if part is not None]
    if not parts:
        return jnp.zeros((0, *tokens_BT.shape, config.n_experts), jnp.float32)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)
