"""Batched generation with a key/value cache: one compiled program for prefill and all steps of a batch.

Shapes: B rows, T prompt bucket, N tokens to generate, S = T + N cache slots, L MoE layers, E experts, V
    vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from safemoe_jax.errors import InputError
from safemoe_jax.evaluation.batches import PromptBatch, batch_prompts
from safemoe_jax.model import Model
from safemoe_jax.models.config import Compute, ModelConfig
from safemoe_jax.models.layer_views import with_layer_views
from safemoe_jax.models.params import Weights
from safemoe_jax.models.transformer import Cache, decode_step, prefill, routing_pass
from safemoe_jax.parallel.mesh import BATCH_AXES, mesh_axis_sizes, named_sharding
from safemoe_jax.routing.override import RoutingOverride, Where, make_override

NO_TOKEN = -1
MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class ForcedRouting:
    """Generate with the prompt's routing of another model (the paper's causal test).

    Attributes:
        model: whose router logits are followed; as many MoE layers and experts as the generating model.
        where: at the ``last_token`` of the prompt, or at every token of the ``prompt``.
    """

    model: Model
    where: Where = "last_token"


def generate(
    model: Model,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
    stop_tokens: Sequence[int] | None = None,
    override: ForcedRouting | None = None,
    progress: str | None = None,
) -> list[list[int]]:
    """Continues each prompt, greedily or by sampling.

    An answer does not depend on the prompts beside it, but for rounding, and but for one rotary embedding:
    longrope with unequal multipliers (no published checkpoint has them) follows the longest row of a batch,
    as in transformers. Where a batch passes the original context while decoding, what the cache holds stays
    as it is; transformers computes it anew with the long multiplier, so answers differ from there on.

    Args:
        model: config, params and compute are used; the tokenizer only where ``stop_tokens`` is None.
        prompts: int32 token ids, generation prompt included.
        max_new_tokens: most tokens to generate.
        temperature: 0 is greedy; from 1e-6 on tokens are drawn from softmax(logits / temperature).
        seed: of the draws. What a prompt draws depends on the seed and its place in ``prompts``, not on the
            batch.
        batch_size: most prompts computed together.
        stop_tokens: token ids that end an answer (not part of it); None takes the EOS of tokenizer and
            checkpoint, () never stops.
        override: force another model's routing on prompt tokens.
        progress: title of a progress bar (only shown on a terminal); None shows none.

    Returns:
        The generated token ids of each prompt, in the order of ``prompts``.

    Raises:
        InputError: no or empty prompts, max_new_tokens or batch_size below 1, a temperature that is negative,
            not finite, or above 0 but below 1e-6, or an override by a model of other routers.
    """
    _check(model, max_new_tokens, temperature, override)
    stops = np.asarray(_stop_tokens(model) if stop_tokens is None else stop_tokens, np.int32)
    weights = with_layer_views(model.config, Weights.of(model.params), model.compute)
    mesh = model.compute.mesh
    batches = batch_prompts(prompts, batch_size, mesh_axis_sizes(mesh, BATCH_AXES))
    answers: list[list[int]] = [[] for _ in prompts]
    with tqdm(total=len(prompts), desc=progress, unit="prompt", disable=None if progress else True) as bar:
        for batch in batches:
            new_BN = generate_batch(
                model.config,
                weights,
                *_placed(batch, mesh),
                _row_keys(seed, batch),
                jnp.arange(len(batch.tokens)) < len(batch.index),
                jnp.float32(temperature),
                stops,
                _override(override, batch),
                max_new_tokens=max_new_tokens,
                sample=temperature > 0,
                compute=model.compute,
            )
            for prompt, row in zip(batch.index, np.asarray(new_BN), strict=False):
                answers[prompt] = row[row != NO_TOKEN].tolist()
            bar.update(len(batch.index))
    return answers


class _State(NamedTuple):
    """Where decoding stands: step j is about to decode the token just chosen for slot T + j."""

    step: jax.Array
    token_B: jax.Array
    done_B: jax.Array
    new_BN: jax.Array
    cache: Cache


@partial(jax.jit, static_argnames=("config", "max_new_tokens", "sample", "compute"))
def generate_batch(
    config: ModelConfig,
    weights: Weights,
    tokens_BT: jax.Array,
    mask_BT: jax.Array,
    keys_B: jax.Array,
    active_B: jax.Array,
    temperature: jax.Array,
    stop_tokens: jax.Array,
    override: RoutingOverride | None,
    *,
    max_new_tokens: int,
    sample: bool,
    compute: Compute,
) -> jax.Array:
    """Generates for one batch of right-padded prompts; ends when every active row has stopped.

    Args:
        keys_B: one random key a row.
        active_B: bool; rows that are padding are False and stop at once.
        stop_tokens: int32, any number of ids.

    Returns:
        int32 [B, N]: new tokens up to the stop token, which is left out; -1 after that.
    """
    n_rows, length = tokens_BT.shape
    length_B = jnp.sum(mask_BT, axis=1, dtype=jnp.int32)
    slots = jnp.arange(length + max_new_tokens)
    choose = partial(_choose, keys_B=keys_B, temperature=temperature) if sample else _choose_greedy
    logits_BV, cache = prefill(
        config, weights, tokens_BT, mask_BT, cache_length=slots.size, override=override, compute=compute
    )

    def record(state: _State, logits_BV: jax.Array, place: jax.Array) -> _State:
        """Chooses the token of this place and notes it, unless the row has stopped or stops with it."""
        token_B = choose(logits_BV, place)
        done_B = state.done_B | jnp.isin(token_B, stop_tokens)
        new_BN = state.new_BN.at[:, place].set(jnp.where(done_B, NO_TOKEN, token_B))
        return state._replace(token_B=token_B, done_B=done_B, new_BN=new_BN)

    def decode(state: _State) -> _State:
        slot = length + state.step
        valid_BS = (slots < length_B[:, None]) | ((slots >= length) & (slots <= slot))
        logits_BV, cache = decode_step(
            config,
            weights,
            state.token_B,
            length_B + state.step,
            slot,
            state.cache,
            valid_BS=valid_BS,
            compute=compute,
        )
        state = record(state._replace(cache=cache), logits_BV, state.step + 1)
        return state._replace(step=state.step + 1)

    state = _State(
        step=jnp.int32(0),
        token_B=jnp.zeros(n_rows, jnp.int32),
        done_B=~active_B,
        new_BN=jnp.full((n_rows, max_new_tokens), NO_TOKEN, jnp.int32),
        cache=cache,
    )
    state = record(state, logits_BV, jnp.int32(0))
    unfinished = lambda s: (s.step + 1 < max_new_tokens) & ~jnp.all(s.done_B)  # noqa: E731
    return jax.lax.while_loop(unfinished, decode, state).new_BN


def _choose_greedy(logits_BV: jax.Array, place: jax.Array) -> jax.Array:
    """The first of the largest logits, int32 [B], in two passes: a CPU does not vectorise argmax."""
    last = logits_BV.shape[-1] - 1
    is_largest_BV = logits_BV == logits_BV.max(axis=-1, keepdims=True)
    return jnp.where(is_largest_BV, jnp.arange(last + 1, dtype=jnp.int32), last).min(axis=-1)


def _choose(
    logits_BV: jax.Array, place: jax.Array, *, keys_B: jax.Array, temperature: jax.Array
) -> jax.Array:
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, place)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV / temperature).astype(jnp.int32)


def _row_keys(seed: int, batch: PromptBatch) -> jax.Array:
    index_B = np.zeros(len(batch.tokens), np.uint32)
    index_B[: len(batch.index)] = batch.index
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), index_B)


def _placed(batch: PromptBatch, mesh: jax.sharding.Mesh | None) -> tuple[jax.Array, jax.Array]:
    if mesh is None:
        return jnp.asarray(batch.tokens), jnp.asarray(batch.mask)
    return jax.device_put((batch.tokens, batch.mask), named_sharding(mesh, ("batch", None)))


def _override(forced: ForcedRouting | None, batch: PromptBatch) -> RoutingOverride | None:
    if forced is None:
        return None
    aligned = forced.model
    tokens_BT, mask_BT = _placed(batch, aligned.compute.mesh)
    logits_LBTE = routing_logits(
        aligned.config, Weights.of(aligned.params), tokens_BT, mask_BT, compute=aligned.compute
    )
    return make_override(logits_LBTE, mask_BT, forced.where)


@partial(jax.jit, static_argnames=("config", "compute"))
def routing_logits(
    config: ModelConfig, weights: Weights, tokens_BT: jax.Array, mask_BT: jax.Array, *, compute: Compute
) -> jax.Array:
    """Router logits of right-padded prompts, float32 [L, B, T, E]."""
    return routing_pass(config, weights, tokens_BT, attention_mask=mask_BT, compute=compute)


def _stop_tokens(model: Model) -> list[int]:
    """The checkpoint's end tokens (chat models may name several) and the tokenizer's, which training uses."""
    named = model.hf_config.get("eos_token_id")
    named = named if isinstance(named, list) else [named]
    found = sorted({token for token in (*named, model.tokenizer.eos_token_id) if token is not None})
    if not found:
        raise InputError("no EOS token", where=model.name, expected="eos_token in tokenizer_config.json")
    return found


def _check(model: Model, max_new_tokens: int, temperature: float, override: ForcedRouting | None) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}", where="max_new_tokens", expected="at least 1")
    # Logits over a smaller temperature overflow float32, and what is drawn from them is garbage.
    if temperature != 0 and not MIN_TEMPERATURE <= temperature < math.inf:
        raise InputError(
            f"temperature is {temperature}",
            where="temperature",
            expected=f"0 (greedy) or a finite number from {MIN_TEMPERATURE:g} on",
        )
    if override is None:
        return
    shapes = [(m.config.n_moe_layers, m.config.n_experts) for m in (model, override.model)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"the forced routing has (layers, experts) {shapes[1]}, the model {shapes[0]}",
            where=override.model.name,
            expected="the aligned version of the same model",
        )
