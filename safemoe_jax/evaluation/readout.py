"""What a model does at the last token of each prompt: router logits and next-token log-probabilities.

Shapes: L MoE layers, S prompts, B rows, T row length, E experts, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from safemoe_jax.checkpoints.reference import (
    CompactLogProbs,
    Reference,
    fingerprint,
    tokenizer_fingerprint,
)
from safemoe_jax.evaluation.batches import batch_prompts
from safemoe_jax.model import Model
from safemoe_jax.models.config import Compute, ModelConfig
from safemoe_jax.models.params import Weights
from safemoe_jax.models.transformer import chosen_experts, hidden_states, routing_pass, unembed
from safemoe_jax.parallel.mesh import BATCH_AXES, mesh_axis_sizes, named_sharding
from safemoe_jax.routing import at_last_token, drift, token_divergence, top_k_overlap


def read_routing(
    model: Model, prompts: Sequence[np.ndarray], *, batch_size: int = 32, progress: str | None = None
) -> np.ndarray:
    """Router logits at the last token of each prompt: float32 ``[L, S, E]``, raw.

    Nothing after the last router is computed.

    Raises:
        InputError: no prompt, or an empty one.
    """
    return _read(model, prompts, _routing, batch_size, progress)[0]


def read_routing_and_next_token(
    model: Model, prompts: Sequence[np.ndarray], *, batch_size: int = 32, progress: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Router logits ``[L, S, E]`` and next-token log-probabilities ``[S, V]`` at the last token, float32."""
    logits_LSE, log_probs_1SV = _read(model, prompts, _routing_and_next_token, batch_size, progress)
    return logits_LSE, log_probs_1SV[0]


def extract_reference(
    model: Model,
    prompts: Sequence[np.ndarray],
    *,
    benign: Sequence[np.ndarray] = (),
    log_probs: bool = False,
    system_prompt: str = "",
    batch_size: int = 32,
    progress: str | None = None,
) -> Reference:
    """Records how the aligned model routes prompts, for a defence to hold on to (paper: r(x | w_align)).

    Args:
        model: the aligned model, with its tokenizer.
        prompts: token ids of the harmful prompts (D_h), generation prompt included.
        benign: the same of benign prompts; they follow the harmful ones, as group 1.
        log_probs: also keep the next-token log-probabilities at the last prompt token, compactly.
        system_prompt: noted in the file.

    Raises:
        InputError: no prompt, an empty one, or a model without a tokenizer.
    """
    everything = [*prompts, *benign]
    if log_probs:
        logits_LSE, log_probs_SV = read_routing_and_next_token(
            model, everything, batch_size=batch_size, progress=progress
        )
        compact = CompactLogProbs.encode(log_probs_SV)
    else:
        logits_LSE = read_routing(model, everything, batch_size=batch_size, progress=progress)
        compact = None
    return Reference(
        router_logits=logits_LSE,
        prompts=tuple(everything),
        model_fingerprint=fingerprint(model.config, model.params),
        tokenizer_fingerprint=tokenizer_fingerprint(model.tokenizer),
        group=np.repeat(np.array([0, 1], np.int8), [len(prompts), len(benign)]),
        log_probs=compact,
        model=model.name,
        chat_template=model.tokenizer.chat_template or "",
        system_prompt=system_prompt,
    )


def compare_routing(
    student_LSE: np.ndarray, reference_LSE: np.ndarray, student: Model, reference: Model | None = None
) -> dict[str, object]:
    """Drift and top-k overlap of two read-outs of the same prompts, as numbers ready for JSON.

    Args:
        student_LSE, reference_LSE: router logits at the last token of each prompt.
        student: the model of the first, by whose rule and correction biases its experts are chosen.
        reference: that of the second; None where only its logits are known (a reference file): then the
            student's corrections count for both, which fine-tuning does not change.

    Returns:
        ``drift`` and ``overlap`` (means over layers and prompts; nats, and Jaccard index in [0, 1]), both
        ``_by_layer``, the interval ``drift_interval`` (mean over layers, normal 95 % over prompts), and
        ``n``.

    Raises:
        InputError: the two have different layers, prompts or experts.
    """
    # A divergence that is zero may come out as -1e-9 in float32.
    by_layer_L = np.maximum(np.asarray(drift(student_LSE, reference_LSE), np.float64), 0)
    here, there = (
        chosen_experts(model.config, Weights.of(model.params), logits_LSE)
        for model, logits_LSE in ((student, student_LSE), (reference or student, reference_LSE))
    )
    overlap_L = np.asarray(top_k_overlap(here, there), np.float64)
    per_prompt_S = np.asarray(token_divergence(student_LSE, reference_LSE), np.float64).mean(axis=0)
    n = len(per_prompt_S)
    half = 1.96 * per_prompt_S.std(ddof=1) / np.sqrt(n) if n > 1 else 0.0
    mean = float(by_layer_L.mean())
    return {
        "drift": mean,
        "drift_interval": [max(0.0, mean - half), mean + half],
        "drift_by_layer": by_layer_L.tolist(),
        "overlap": float(overlap_L.mean()),
        "overlap_by_layer": overlap_L.tolist(),
        "n": n,
    }


def _read(model, prompts, read, batch_size, progress) -> list[np.ndarray]:
    """Runs ``read`` on batches; results have the prompts on axis 1, in the order of ``prompts``."""
    mesh = model.compute.mesh
    weights = Weights.of(model.params)
    pieces, order = [], []
    with tqdm(total=len(prompts), desc=progress, unit="prompt", disable=None if progress else True) as bar:
        for batch in batch_prompts(prompts, batch_size, mesh_axis_sizes(mesh, BATCH_AXES)):
            placed = (batch.tokens, batch.mask)
            if mesh is not None:
                placed = jax.device_put(placed, named_sharding(mesh, ("batch", None)))
            found = read(model.config, weights, *placed, compute=model.compute)
            pieces.append([np.asarray(x)[:, : len(batch.index)] for x in found])
            order.append(batch.index)
            bar.update(len(batch.index))
    back = np.argsort(np.concatenate(order))
    return [np.concatenate(parts, axis=1)[:, back] for parts in zip(*pieces, strict=True)]


@partial(jax.jit, static_argnames=("config", "compute"))
def _routing(
    config: ModelConfig, weights: Weights, tokens_BT: jax.Array, mask_BT: jax.Array, *, compute: Compute
) -> tuple[jax.Array]:
    logits_LBTE = routing_pass(config, weights, tokens_BT, attention_mask=mask_BT, compute=compute)
    return (_last(logits_LBTE, mask_BT),)


@partial(jax.jit, static_argnames=("config", "compute"))
def _routing_and_next_token(
    config: ModelConfig, weights: Weights, tokens_BT: jax.Array, mask_BT: jax.Array, *, compute: Compute
) -> tuple[jax.Array, jax.Array]:
    out = hidden_states(config, weights, tokens_BT, attention_mask=mask_BT, compute=compute)
    logits_BV = unembed(config, weights, at_last_token(out.hidden, mask_BT))
    return _last(out.router_logits, mask_BT), jax.nn.log_softmax(logits_BV.astype(jnp.float32))[None]


def _last(values_LBTE: jax.Array, mask_BT: jax.Array) -> jax.Array:
    return jax.vmap(at_last_token, in_axes=(0, None))(values_LBTE, mask_BT)
