"""Tiny random models of a family in transformers, what they compute, and the same of this project.

Norms, biases and sinks are random and eps is large, so that a wrong one shows. A seed under which rounding
could swap two experts or two tokens is rejected, for such a swap would say nothing about either side.

Legend: B rows, T positions, L MoE layers, E experts, K chosen experts, N all layers, D model
width, V vocabulary.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from safemoe_jax.model import Model, load_pretrained
from safemoe_jax.models import transformer
from safemoe_jax.models.layer import Layer
from safemoe_jax.models.params import Weights
from safemoe_jax.models.router import choose_experts

# Fields that a family's tiny configs start from.
TINY = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    rms_norm_eps=0.02,
    initializer_range=0.25,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
LENGTHS = (24, 17, 9, 2)
NEW_TOKENS = 32
LEAST_MARGIN = 2e-4
SEEDS = 20
_ROUTER = re.compile(r"model\.layers\.\d+\.\w+\.(gate|router)\.weight")
_QUERY = re.compile(r"model\.layers\.0\.self_attn\.q(_a)?_proj\.weight")


class Variant(NamedTuple):
    """One set of a family's features.

    Attributes:
        name: of the variant, in test ids.
        config: makes the tiny transformers config.
        adapter_targets: attention projections that adapters are put on, by their names in PEFT.
        seed: first seed tried.
    """

    name: str
    config: Callable[[], PretrainedConfig]
    adapter_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    seed: int = 0


class Expected(NamedTuple):
    """What transformers computes on a right-padded batch; shapes as in the project.

    tokens, attention_mask, answer_mask [B, T]; logits [B, T, V]; router_logits [L, B, T, E];
    experts and combine_weights [L, B, T, K]; layers [N, B, T, D], the output of every layer; loss scalar;
    query_gradient [out, in]; router_gradient [E, D] of the first router, or None in a dense model;
    greedy [B, 32].
    """

    tokens: np.ndarray
    attention_mask: np.ndarray
    answer_mask: np.ndarray
    logits: np.ndarray
    router_logits: np.ndarray
    experts: np.ndarray
    combine_weights: np.ndarray
    layers: np.ndarray
    loss: float
    query_gradient: np.ndarray
    router_gradient: np.ndarray | None
    greedy: np.ndarray


class Pair(NamedTuple):
    """A torch model, what it computes, its folders, and this project's model of the published one."""

    variant: Variant
    theirs: PreTrainedModel
    want: Expected
    folder: Path
    fused_folder: Path
    ours: Model


class TooClose(Exception):
    """Rounding could swap two experts or two tokens under this seed."""


def make_pair(variant: Variant, folder: Path) -> Pair:
    """Builds, computes, saves (sharded in the published layout, whole in the fused one) and loads."""
    theirs, want = _first_clear_seed(variant)
    theirs.save_pretrained(folder / "published", max_shard_size="40KB")
    theirs.save_pretrained(folder / "fused", save_original_format=False)
    ours = load_pretrained(folder / "published")
    return Pair(variant, theirs, want, folder / "published", folder / "fused", ours)


def _first_clear_seed(variant: Variant) -> tuple[PreTrainedModel, Expected]:
    for seed in range(variant.seed, variant.seed + SEEDS):
        theirs = build(variant.config(), seed)
        try:
            return theirs, compute(theirs, seed)
        except TooClose:
            continue
    raise AssertionError(f"no seed of {SEEDS} keeps the margins of {variant.name}")


def build(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """The config's causal language model with every parameter random, eager attention and eager experts."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            _draw(name, value, config.get_text_config().initializer_range)
        for name, value in model.named_buffers():
            if name.endswith("bias"):
                value.normal_(0.0, 0.1)
    model.generation_config.eos_token_id = None
    return model


def _draw(name: str, value: torch.Tensor, spread: float) -> None:
    if name.endswith("bias"):
        value.normal_(0.0, 0.1 if "correction" in name else 0.3)
    elif name.endswith("sinks"):
        value.normal_(0.0, 1.0)
    elif value.ndim == 1:
        value.normal_(1.0, 0.3)
    else:
        value.normal_(0.0, spread)


def batch(vocab_size: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, attention mask and answer mask of rows of unequal length, right-padded."""
    rng = np.random.default_rng(seed)
    lengths = np.array(LENGTHS)
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int32)
    tokens = rng.integers(1, vocab_size, mask.shape).astype(np.int32) * mask
    answer = mask * (np.arange(lengths.max()) >= lengths[:, None] // 2)
    return tokens, mask, answer.astype(np.int32)


def compute(model: PreTrainedModel, seed: int) -> Expected:
    """Runs the batch, its backward pass and the greedy continuations.

    Raises:
        TooClose: a margin is below `LEAST_MARGIN`.
    """
    tokens, mask, answer = batch(model.config.get_text_config().vocab_size, seed)
    ids = torch.tensor(tokens, dtype=torch.long)
    labels = torch.where(torch.tensor(answer, dtype=torch.bool), ids, -100)
    with recorded(model) as (routed, layers):
        out = model(input_ids=ids, attention_mask=torch.tensor(mask, dtype=torch.long), labels=labels)
    out.loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    query = next(value for name, value in gradients.items() if _QUERY.fullmatch(name))
    routers = [value for name, value in gradients.items() if _ROUTER.fullmatch(name)]
    router_logits, weights, experts = _routing(routed, tokens.shape)
    want = Expected(
        tokens=tokens,
        attention_mask=mask,
        answer_mask=answer,
        logits=out.logits.detach().numpy(),
        router_logits=router_logits,
        experts=experts,
        combine_weights=weights,
        layers=np.stack([layer.detach().numpy() for layer in layers]),
        loss=out.loss.item(),
        query_gradient=query.numpy().copy(),
        router_gradient=routers[0].numpy().copy() if routers else None,
        greedy=greedy(model, tokens, mask),
    )
    model.zero_grad(set_to_none=True)
    return want


class Routed(NamedTuple):
    """One router's call: raw logits [B * T, E], combine weights and indices of the experts [B * T, K]."""

    logits: torch.Tensor
    weights: torch.Tensor
    experts: torch.Tensor


@contextmanager
def recorded(model: PreTrainedModel, check: bool = True) -> Iterator[tuple[list[Routed], list[torch.Tensor]]]:
    """Records the routers' outputs and the layers' outputs of the next forward pass, in order.

    Raises:
        TooClose: a small change of a router's input changes its choice (where `check` asks for it).
    """
    routed: list[Routed] = []
    layers: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, output: routed.append(
                _clear(module, inputs, output) if check else _read_router(module, output)
            )
        )
        for module in routers(model)
    ]
    hooks += [
        layer.register_forward_hook(
            lambda module, inputs, output: layers.append(output[0] if isinstance(output, tuple) else output)
        )
        for layer in model.model.layers
    ]
    try:
        yield routed, layers
    finally:
        for hook in hooks:
            hook.remove()


def routers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The routers of all MoE layers, in order."""
    return [module for module in model.modules() if type(module).__name__.endswith("Router")]


def _clear(module: torch.nn.Module, inputs: tuple, output: tuple) -> Routed:
    """The router's output, unless noise that moves logits by twice the margin changes its choice."""
    routed = _read_router(module, output)
    for draw in range(4):
        generator = torch.Generator().manual_seed(draw)
        noise = torch.randn(inputs[0].shape, generator=generator)
        scale = 2 * LEAST_MARGIN / module.weight.norm(dim=-1).mean()
        with torch.no_grad():
            moved = _read_router(module, module.forward(inputs[0].detach() + scale * noise))
        if not torch.equal(moved.experts, routed.experts):
            raise TooClose
    return routed


def _read_router(module: torch.nn.Module, output: tuple) -> Routed:
    if type(module).__name__ == "Llama4Router":
        scores, logits = output
        experts = logits.topk(module.top_k, dim=-1).indices
        return Routed(logits.detach(), scores.gather(-1, experts).detach(), experts)
    logits, weights, experts = output
    return Routed(logits.detach(), weights.detach(), experts)


def _routing(routed: list[Routed], shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Router logits [L, B, T, E], combine weights and experts [L, B, T, K]; no layers in a dense model."""
    if not routed:
        return np.zeros((0, *shape, 0)), np.zeros((0, *shape, 0)), np.zeros((0, *shape, 0), np.int32)
    stack = lambda values: np.stack([value.float().numpy().reshape(*shape, -1) for value in values])  # noqa: E731
    logits, weights, experts = (stack(values) for values in zip(*routed, strict=True))
    return logits, weights, experts.astype(np.int32)


def greedy(model: PreTrainedModel, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Greedy continuations of every row by itself, with transformers' cache, int32 [B, 32].

    Raises:
        TooClose: two tokens or two experts are nearly equally good somewhere.
    """
    answers = []
    for row, length in zip(tokens, mask.sum(axis=1), strict=True):
        ids = torch.tensor(row[None, :length], dtype=torch.long)
        options = dict(max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True)
        with recorded(model):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), output_scores=True, **options)
        best = torch.cat(out.scores).topk(2, dim=-1).values
        if (best[:, 0] - best[:, 1]).min() < LEAST_MARGIN:
            raise TooClose
        answers.append(out.sequences[0, length:].numpy())
    return np.stack(answers).astype(np.int32)


def their_logits(model: torch.nn.Module, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits of a torch model, float32 [B, T, V]."""
    ids, attention = torch.tensor(tokens, dtype=torch.long), torch.tensor(mask, dtype=torch.long)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=attention).logits.float().numpy()


def reload(folder: Path, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What transformers makes of a folder, and what it says about the keys."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype or "auto",
        output_loading_info=True,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return model.eval(), info


def decided(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """A copy that knows what it wants to say, as trained models do: its logits have margins.

    Tokens are orthogonal or opposite to one another, and each is followed by one other. A model of random
    logits only measures how often two random numbers are closer than a rounding error.
    """
    model, generator = copied(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        n_tokens, width = embedding.shape
        basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        assert n_tokens <= 2 * width, "too many tokens to be orthogonal or opposite"
        embedding.copy_(8 * width**0.5 * torch.cat([basis, -basis])[:n_tokens])
        if not model.config.get_text_config().tie_word_embeddings:
            model.get_output_embeddings().weight.copy_(embedding.roll(1, dims=0) * 0.05)
    return model


class Agreement(NamedTuple):
    """How two bfloat16 models compare: shares of real tokens with the same best token and of chosen experts
    that both chose, and the mean error of each one's logits against the float32 model."""

    tokens: float
    experts: float
    our_error: float
    their_error: float


def agreement(ours: Model, theirs: PreTrainedModel, exact: PreTrainedModel, rows: int = 32) -> Agreement:
    """Compares on right-padded rows of unequal lengths; `exact` is their model in float32."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, max(LENGTHS) + 1, rows)
    mask = (np.arange(max(LENGTHS)) < lengths[:, None]).astype(np.int32)
    tokens = rng.integers(1, ours.config.vocab_size, mask.shape).astype(np.int32) * mask
    real = mask.astype(bool)
    with recorded(theirs, check=False) as (routed, _):
        want = their_logits(theirs, tokens, mask)
    out, right = ours(tokens, mask), their_logits(exact, tokens, mask)
    got = np.asarray(out.logits)
    _, experts = our_choice(ours, np.asarray(out.router_logits))
    want_experts = _routing(routed, mask.shape)[2]
    shared = (experts[..., :, None] == want_experts[..., None, :]).any(-1)[:, real]
    return Agreement(
        tokens=float((got.argmax(-1) == want.argmax(-1))[real].mean()),
        experts=float(shared.mean()) if shared.size else 1.0,
        our_error=float(np.abs(got - right)[real].mean()),
        their_error=float(np.abs(want - right)[real].mean()),
    )


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that PEFT may wrap."""
    return copy.deepcopy(model)


def our_choice(model: Model, router_logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Combine weights and experts [L, B, T, K] that our rule makes of any router logits [L, B, T, E]."""
    chosen = [
        choose_experts(jnp.asarray(logits), model.config, correction)
        for logits, correction in zip(router_logits, corrections(model), strict=True)
    ]
    if not chosen:
        return np.zeros((*router_logits.shape[:-1], 0)), np.zeros((*router_logits.shape[:-1], 0), np.int32)
    weights, experts = zip(*chosen, strict=True)
    return np.stack(weights), np.stack(experts)


def by_expert(weights: np.ndarray, experts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in the order of the experts' numbers: in which order they were found says nothing."""
    order = np.argsort(experts, axis=-1)
    return np.take_along_axis(weights, order, axis=-1), np.take_along_axis(experts, order, axis=-1)


def corrections(model: Model) -> list[jax.Array | None]:
    """The correction bias [E] of every MoE layer, in order, or None where the family has none."""
    return [
        model.params[name][repeat] if name in model.params else None
        for name, repeat in (
            (f"segments.{s}.{p}.moe.router.correction_bias", repeat)
            for s, segment in enumerate(model.config.segments)
            for repeat in range(segment.repeats)
            for p, kind in enumerate(segment.pattern)
            if kind == "moe"
        )
    ]


def our_layer_outputs(model: Model, tokens: np.ndarray, mask: np.ndarray, monkeypatch) -> np.ndarray:
    """The output of every layer, [N, B, T, D]: the last sublayer of a layer is listened to."""
    heard: list[np.ndarray] = []
    feed_forward = Layer.feed_forward

    def listening(self, *args, **kwargs):
        x_BTD, logits = feed_forward(self, *args, **kwargs)
        jax.debug.callback(lambda value: heard.append(np.array(value)), x_BTD, ordered=True)
        return x_BTD, logits

    monkeypatch.setattr(Layer, "feed_forward", listening)
    ids, attention = jnp.asarray(tokens), jnp.asarray(mask)
    out = transformer.forward(
        model.config, model.weights, ids, attention_mask=attention, compute=model.compute
    )
    jax.block_until_ready(out)
    jax.effects_barrier()
    return np.stack(heard)


def first_parameters(model: Model) -> tuple[str, str | None]:
    """Names of the first layer's query kernel and of the first router's kernel."""
    query = next(
        name for name in ("q_proj", "q_a_proj") if f"segments.0.0.attention.{name}.kernel" in model.params
    )
    routers = sorted(name for name in model.params if name.endswith("moe.router.kernel"))
    by_layer = {
        model.config.segments[int(name.split(".")[1])].first_layer + int(name.split(".")[2]): name
        for name in routers
    }
    return f"segments.0.0.attention.{query}.kernel", by_layer[min(by_layer)] if by_layer else None


def loss_and_gradients(model: Model, want: Expected) -> tuple[float, np.ndarray, np.ndarray | None]:
    """Mean cross-entropy of the answer tokens, and its gradients laid out as in torch."""
    query, router = first_parameters(model)
    names = [name for name in (query, router) if name]
    trainable = {name: model.params[name] for name in names}
    frozen = {name: value for name, value in model.params.items() if name not in trainable}
    tokens, answer = jnp.asarray(want.tokens), jnp.asarray(want.answer_mask[:, 1:])

    @jax.jit
    def loss(trainable, frozen):
        mask = jnp.asarray(want.attention_mask)
        out = transformer.forward(
            model.config, Weights(frozen, trainable), tokens, attention_mask=mask, compute=model.compute
        )
        log_probs = jax.nn.log_softmax(out.logits[:, :-1], axis=-1)
        chosen = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(chosen * answer) / jnp.sum(answer)

    value, gradients = jax.value_and_grad(loss)(trainable, frozen)
    found = [np.asarray(gradients[name])[0].T for name in names]
    return float(value), found[0], found[1] if router else None
