"""What is rounded where in bfloat16: combine weights, router logits, norms and attention, against
transformers' modules.

Each fact is checked on one module with the same numbers in, so that no rounding before it can hide a rule.
Numbers are compared bit by bit; one in a hundred may be off by its last bit, for the exp and rsqrt of two
libraries are.

Attention is where this project does not round as transformers does, on purpose. Eager attention there rounds
the scores to bfloat16 in every family; its softmax, which two families ask for in bfloat16 and the others in
float32, is float32 inside for all of them, and gpt_oss rounds the scores once more after it has taken the
largest one off (`eager_attention` below is that, to the bit). Here scores stay float32 in every family: what
differs is error that transformers makes and this project does not.

Legend: L MoE layers, X tokens, D model width, E experts, K chosen experts; B rows, T queries, S keys, N query
heads, G key/value heads, H head width, W value width.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from safemoe_jax.model import Model, load_pretrained
from safemoe_jax.models import attention
from safemoe_jax.models import experts as experts_module
from safemoe_jax.models.norms import model_norm
from safemoe_jax.models.params import bind
from safemoe_jax.models.segments import layer_at
from tests.parity.families.harness import batch, build, recorded, reload, routers

# family -> whether its combine weights, and its router logits, stay float32 in a bfloat16 model
FLOAT32_WEIGHTS = {
    "olmoe": (False, False),
    "qwen2_moe": (False, False),
    "qwen3_moe": (False, False),
    "deepseek_v2": (True, True),
    "mixtral": (True, False),
    "gpt_oss": (False, False),
    "phimoe": (False, False),
    "llama4": (False, False),
}


class Layer(NamedTuple):
    """What one MoE layer of transformers saw and chose: inputs [X, D], logits [X, E], the rest [X, K]."""

    inputs: torch.Tensor
    logits: torch.Tensor
    weights: torch.Tensor
    experts: torch.Tensor


class Attended(NamedTuple):
    """One attention of transformers: queries, keys and values in bfloat16, laid out as this project has them;
    which keys are seen; the scale; the sinks if there are any; the output."""

    q_BTNH: jnp.ndarray
    k_BSGH: jnp.ndarray
    v_BSGW: jnp.ndarray
    mask_BTS: jnp.ndarray
    scale: float
    sinks_N: jnp.ndarray | None
    output_BTNW: jnp.ndarray


class Case(NamedTuple):
    """A family's model in bfloat16 here and there, and what its routers and attentions did on a batch; `real`
    is which tokens of it are no padding, [B, T]."""

    family: str
    ours: Model
    theirs: PreTrainedModel
    layers: list[Layer]
    attended: list[Attended]
    real: np.ndarray


@pytest.fixture(scope="module", params=FLOAT32_WEIGHTS)
def case(request, tmp_path_factory) -> Case:
    """One of the paper's families, its published variant."""
    torch.set_num_threads(1)
    variants = importlib.import_module(f"tests.parity.families.test_{request.param}").VARIANTS
    exact, folder = build(variants[0].config(), seed=3), tmp_path_factory.mktemp(request.param) / "model"
    exact.save_pretrained(folder)
    theirs, _ = reload(folder, torch.bfloat16)
    tokens, mask, _ = batch(theirs.config.vocab_size, seed=3)
    inputs: list[torch.Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, given: inputs.append(given[0].flatten(0, -2)))
        for module in routers(theirs)
    ]
    with recorded(theirs, check=False) as (routed, _), attention_of(theirs) as attended, torch.no_grad():
        theirs(input_ids=torch.tensor(tokens, dtype=torch.long), attention_mask=torch.tensor(mask))
    for hook in hooks:
        hook.remove()
    layers = [Layer(x, *values) for x, values in zip(inputs, routed, strict=True)]
    ours = load_pretrained(folder, dtype="bfloat16")
    return Case(request.param, ours, theirs, layers, attended, mask.astype(bool))


@contextmanager
def attention_of(model: PreTrainedModel) -> Iterator[list[Attended]]:
    """Records the eager attentions of the next forward pass, in order."""
    modeling, found = importlib.import_module(type(model).__module__), []
    forward = modeling.eager_attention_forward

    def listening(module, query, key, value, attention_mask, scaling, **kwargs):
        output, weights = forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        qkv = (ours_of(heads.transpose(1, 2)) for heads in (query, key, value))
        mask = jnp.asarray((attention_mask[:, 0] == 0).numpy())
        sinks = ours_of(module.sinks) if hasattr(module, "sinks") else None
        found.append(Attended(*qkv, mask, scaling, sinks, ours_of(output)))
        return output, weights

    modeling.eager_attention_forward = listening
    try:
        yield found
    finally:
        modeling.eager_attention_forward = forward


def ours_of(value: torch.Tensor) -> jnp.ndarray:
    """The same numbers and dtype."""
    dtype = {torch.bfloat16: jnp.bfloat16, torch.float32: jnp.float32}[value.dtype]
    return jnp.asarray(value.detach().float().numpy()).astype(dtype)


def eager_attention(seen: Attended, difference_rounded: bool) -> jnp.ndarray:
    """Eager attention of transformers in bfloat16, written out with every rounding, [B, T, N, W]."""

    def rounded(x: jnp.ndarray) -> jnp.ndarray:
        return x.astype(jnp.bfloat16).astype(jnp.float32)

    repeats = seen.q_BTNH.shape[2] // seen.k_BSGH.shape[2]
    k_BSNH, v_BSNW = (jnp.repeat(x, repeats, axis=2).astype(jnp.float32) for x in (seen.k_BSGH, seen.v_BSGW))
    scores = jnp.einsum("BTNH,BSNH->BNTS", seen.q_BTNH.astype(jnp.float32), k_BSNH)
    scores = rounded(rounded(scores) * seen.scale)
    scores = jnp.where(seen.mask_BTS[:, None], scores, -jnp.inf)
    if seen.sinks_N is not None:
        sinks = jnp.broadcast_to(seen.sinks_N[None, :, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, sinks.astype(jnp.float32)], axis=-1)
    if difference_rounded:
        scores = rounded(scores - scores.max(axis=-1, keepdims=True))
    weights = rounded(jax.nn.softmax(scores, axis=-1))[..., : seen.mask_BTS.shape[-1]]
    return jnp.einsum("BNTS,BSNW->BTNW", weights, v_BSNW).astype(jnp.bfloat16)


def nearly_all_bits(got: jnp.ndarray, want: jnp.ndarray) -> None:
    """Same dtype; in bfloat16 99 of 100 numbers are equal and none is off by more than a step, float32 is
    within some steps."""
    assert got.dtype == want.dtype and got.shape == want.shape and got.size > 100
    step = float(jnp.finfo(got.dtype).eps)
    in_bfloat16 = got.dtype == jnp.bfloat16
    got, want = (np.asarray(value.astype(jnp.float32)) for value in (got, want))
    np.testing.assert_allclose(got, want, rtol=step if in_bfloat16 else 16 * step, atol=1e-30)
    if in_bfloat16:
        assert (got == want).mean() >= 0.99


def moe_layer(case: Case, number: int):
    """Our module of a MoE layer, as `layer_at` gives it."""
    config = case.ours.config
    return layer_at(config, case.ours.weights, config.moe_layers[number], case.ours.compute)


def used_weights(case: Case, number: int, monkeypatch) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Combine weights and experts [X, K] that our experts get where transformers' router logits rule."""
    heard = []

    def listening(x_XD, weights_XK, experts_XK, *args, **kwargs):
        heard.append((weights_XK, experts_XK))
        return x_XD

    monkeypatch.setattr(experts_module, "expert_ffn", listening)
    layer, (module, _, place) = case.layers[number], moe_layer(case, number)
    logits_1XE = jnp.asarray(layer.logits.float().numpy())[None]
    x_1XD, forced_1X = ours_of(layer.inputs)[None], jnp.ones((1, len(layer.inputs)), bool)
    module.moe(x_1XD, logits_1XE, forced_1X, place, case.ours.compute)
    return heard[0]


def test_combine_weights_have_the_familys_dtype_and_bits(case, monkeypatch):
    stays_float32, _ = FLOAT32_WEIGHTS[case.family]
    found = []
    for number, layer in enumerate(case.layers):
        assert layer.weights.dtype == (torch.float32 if stays_float32 else torch.bfloat16)
        weights, experts = used_weights(case, number, monkeypatch)
        assert weights.dtype == (jnp.float32 if stays_float32 else jnp.bfloat16)
        order, their_order = (np.argsort(np.asarray(value), axis=-1) for value in (experts, layer.experts))
        same = (np.sort(experts) == np.sort(layer.experts)).all(axis=-1)
        # Where the last logit that is in equals one that is out, either choice is the rule's.
        best = -np.sort(-layer.logits.float().numpy(), axis=-1)
        ties = best[:, experts.shape[-1] - 1] == best[:, experts.shape[-1]]
        assert (same | ties).all() and same.mean() > 0.8
        ours = jnp.take_along_axis(weights, jnp.asarray(order), axis=-1)
        theirs = jnp.take_along_axis(ours_of(layer.weights), jnp.asarray(their_order), axis=-1)
        found.append((ours[same], theirs[same]))
    nearly_all_bits(*(jnp.concatenate(values) for values in zip(*found, strict=True)))


def test_router_logits_are_rounded_where_the_familys_are(case):
    _, in_float32 = FLOAT32_WEIGHTS[case.family]
    for number, layer in enumerate(case.layers):
        assert layer.logits.dtype == (torch.float32 if in_float32 else torch.bfloat16)
        module, _, _ = moe_layer(case, number)
        logits = module.moe.router(ours_of(layer.inputs))
        assert logits.dtype == jnp.float32
        rounded = logits.astype(jnp.bfloat16)
        assert bool((rounded.astype(jnp.float32) == logits).all()) != in_float32
        step = 1e-5 if in_float32 else 2.0**-7
        theirs = layer.logits.float().numpy()
        np.testing.assert_allclose(logits, theirs, rtol=step, atol=step * np.abs(theirs).max())


def test_norms_round_in_the_familys_order(case):
    """gpt_oss applies the scale before the cast back, phimoe's LayerNorm too, the others after it."""
    width, rng = case.ours.config.d_model, np.random.default_rng(0)
    states = torch.tensor(3 * rng.normal(size=(512, width))).to(torch.bfloat16)
    norm = case.theirs.model.norm
    with torch.no_grad():
        want = ours_of(norm(states))
    prefix = "final_norm."
    params = {k.removeprefix(prefix): v for k, v in case.ours.params.items() if k.startswith(prefix)}
    right = bind(model_norm(case.ours.config), params)
    nearly_all_bits(right(ours_of(states)), want)
    if case.ours.config.norm == "layer":
        return
    other = "rms" if case.ours.config.norm == "rms_float32" else "rms_float32"
    wrong = bind(model_norm(replace(case.ours.config, norm=other)), params)
    assert float((wrong(ours_of(states)) == want).mean()) < 0.95


def attended_here(case: Case, dtype: jnp.dtype) -> list[jnp.ndarray]:
    """What our attention makes of the same numbers in a dtype."""
    outputs = []
    for seen in case.attended:
        qkv = (x.astype(dtype) for x in (seen.q_BTNH, seen.k_BSGH, seen.v_BSGW))
        outputs.append(attention.attend(*qkv, seen.mask_BTS, scale=seen.scale, sinks_N=seen.sinks_N))
    return outputs


def test_transformers_rounds_scores_and_its_softmax_is_float32(case):
    """For all families alike, whatever dtype they ask of the softmax, but for gpt_oss's further rounding."""
    further = case.family == "gpt_oss"
    assert len(case.attended) == case.ours.config.n_layers
    for seen in case.attended:
        nearly_all_bits(eager_attention(seen, further)[case.real], seen.output_BTNW[case.real])
    if further:
        equal = [eager_attention(seen, False) == seen.output_BTNW for seen in case.attended]
        assert np.mean([np.asarray(same)[case.real] for same in equal]) < 0.95


def test_attention_is_finer_than_transformers(case, monkeypatch):
    """Less error than in transformers, because scores stay float32: rounded ones would cost some of that."""
    exact, masked_scores = attended_here(case, jnp.float32), attention._masked_scores

    def error(outputs: list[jnp.ndarray]) -> float:
        pairs = zip(outputs, exact, strict=True)
        return float(np.mean([jnp.abs(got.astype(jnp.float32) - want)[case.real] for got, want in pairs]))

    theirs = error([seen.output_BTNW for seen in case.attended])
    ours = error(attended_here(case, jnp.bfloat16))
    # XLA may leave out a cast to bfloat16 and back, but not this.
    rounded = lambda *inputs: jax.lax.reduce_precision(masked_scores(*inputs), 8, 7)  # noqa: E731
    monkeypatch.setattr(attention, "_masked_scores", rounded)
    coarser = error(attended_here(case, jnp.bfloat16))
    print(f"{case.family}: {ours / theirs:.2f} of transformers' error, {coarser / theirs:.2f} if rounded")
    assert ours < 0.9 * theirs
    assert coarser > 1.08 * ours
