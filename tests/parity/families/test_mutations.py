"""The parity tests bite: with any one feature of a family wrong, its logits leave the tolerance.

Every line of MUTATIONS is a mistake that a config translation or the decoder could make, applied to the
config of a loaded model. Parameters that the wrong config does not declare are dropped; those that it
declares in addition are ones or zeros, as a fresh model has them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from safemoe_jax.model import Model, load_pretrained
from safemoe_jax.models.config import ModelConfig
from safemoe_jax.models.transformer import declare
from tests.parity.families.harness import batch, build, their_logits

Change = Callable[[ModelConfig], ModelConfig]


def model(**fields) -> Change:
    """Wrong fields of the network."""
    return lambda config: replace(config, **fields)


def rope(**fields) -> Change:
    """Wrong fields of the rotary embedding."""
    return lambda config: replace(config, rope=replace(config.rope, **fields))


def routing(**fields) -> Change:
    """Wrong fields of the routing."""
    return lambda config: replace(config, routing=replace(config.routing, **fields))


def mla(**fields) -> Change:
    """Wrong fields of latent attention."""
    return lambda config: replace(config, mla=replace(config.mla, **fields))


def window(wrong: Callable[[int, int], int]) -> Change:
    """Another window in each layer, from its number and its right window."""
    return _layers(lambda i, layer: replace(layer, window=wrong(i, layer.window)))


def chunk(wrong: Callable[[int], int]) -> Change:
    """Another chunk in each layer, from its right one."""
    return _layers(lambda i, layer: replace(layer, chunk=wrong(layer.chunk)))


def every_layer(**fields) -> Change:
    """The same wrong fields in all layers."""
    return _layers(lambda i, layer: replace(layer, **fields))


def _layers(wrong: Callable) -> Change:
    return lambda config: replace(
        config, layers=tuple(wrong(i, layer) for i, layer in enumerate(config.layers))
    )


def scaled(field: str, factor: float) -> Change:
    """A number of the network times a factor."""
    return lambda config: replace(config, **{field: getattr(config, field) * factor})


# family, variant -> name of the mistake -> the mistake
MUTATIONS: dict[tuple[str, str], dict[str, Change]] = {
    ("olmoe", "published"): {
        "eps": model(norm_eps=1e-5),
        "no norm of q and k": model(qk_norm="none"),
        "renormalised": model(norm_topk_prob=True),
        "one expert too few": model(top_k=1),
        "one expert too many": model(top_k=3),
        "theta": rope(theta=5000.0),
        "interleaved": rope(interleaved=True),
        "half of a head rotated": rope(dim=4),
        "scores not scaled": model(attention_scale=1.0),
        "mean subtracted in norms": model(norm="layer"),
        "softmax over the chosen": routing(kind="softmax_chosen"),
        "sigmoid": routing(kind="sigmoid"),
    },
    ("olmoe", "everything"): {
        "no clamp": model(clip_qkv=None),
        "clamp a tenth too low": scaled("clip_qkv", 0.9),
        "not renormalised": model(norm_topk_prob=False),
        "no biases of q, k and v": model(attention_bias=False),
        "no bias of o": model(output_bias=False),
    },
    ("qwen2_moe", "published"): {
        "shared expert without gate": model(shared_gate=False),
        "no shared expert": model(shared_dim=0, shared_gate=False),
    },
    ("qwen2_moe", "everything"): {
        "window one too wide": window(lambda i, w: w + 1 if w else 0),
        "window one too narrow": window(lambda i, w: w - 1 if w else 0),
        "no window": window(lambda i, w: 0),
        "every layer slides": window(lambda i, w: 7),
        "window on the other layers": window(lambda i, w: 0 if w else 7),
    },
    ("qwen3_moe", "published"): {"no norm of the heads": model(qk_norm="none")},
    ("qwen3_moe", "everything"): {
        "no yarn": rope(kind="default"),
        "yarn's multiplier": rope(attention_factor=1.0),
        "yarn's factor": rope(factor=3.0),
        "yarn's original context": rope(original_max_positions=64),
        "linear in the place of yarn": rope(kind="linear"),
    },
    ("qwen3", "everything"): {
        "yarn's fast bound": rope(beta_fast=32.0),
        "yarn's own multiplier": rope(attention_factor=None),
    },
    ("mixtral", "everything"): {
        "linear stretch left out": rope(kind="default"),
        "window one too wide": window(lambda i, w: w + 1),
    },
    ("granitemoe", "published"): {
        "embedding multiplier": model(embedding_scale=1.0),
        "residual multiplier": model(residual_scale=1.0),
        "logits divisor": model(logits_divisor=1.0),
        "attention multiplier": model(attention_scale=None),
        "softmax over all experts": routing(kind="softmax"),
    },
    ("llama", "published"): {
        "no llama3 scaling": rope(kind="default"),
        "low frequencies' bound": rope(low_freq_factor=2.0),
        "high frequencies' bound": rope(high_freq_factor=8.0),
    },
    ("llama", "everything"): {"no biases in the feed-forward": model(mlp_bias=False)},
    ("gpt_oss", "published"): {
        "no sinks": model(sinks=False),
        "no router bias": routing(bias=False),
        "no expert biases": model(expert_bias=False),
        "SwiGLU": model(activation="silu"),
        "yarn's range rounded": rope(truncate=True),
        "odd layers slide, not even ones": window(lambda i, w: 0 if w else 5),
    },
    ("gpt_oss", "everything"): {
        "clamp": model(activation_limit=7.0),
        "slope": model(activation_alpha=1.702),
        "yarn's slow bound": rope(beta_slow=1.0),
    },
    ("phimoe", "published"): {
        "mean not subtracted in norms": model(norm="rms"),
        "no bias of the output": model(lm_head_bias=False),
        "plain softmax routing": routing(kind="softmax"),
        "long multiplier": rope(short_mscale=2.0),
        "factors left out": rope(short_factor=(1.0,) * 4),
    },
    ("phimoe", "everything"): {"threshold": routing(jitter=0.01)},
    ("llama4", "published"): {
        "chunk one too wide": chunk(lambda c: c + 1 if c else 0),
        "no chunks": chunk(lambda c: 0),
        "every layer rotates": every_layer(rope=True),
        "no temperature": every_layer(temperature=False),
        "temperature's floor": model(query_temperature=(0.5, 4.0)),
        "temperature's scale": model(query_temperature=(0.4, 3.0)),
        "halves rotated, not pairs": rope(interleaved=False),
        "no norm after the rotation": model(qk_norm="none"),
        "softmax weights": routing(kind="softmax"),
        "no shared expert": model(shared_dim=0),
    },
    ("deepseek_v2", "published"): {
        "latent norms' eps": mla(norm_eps=0.02),
        "halves rotated, not pairs": rope(interleaved=False),
        "scores without yarn's square": model(attention_scale=None),
    },
    ("deepseek_v2", "everything"): {
        "no groups": routing(groups=1, top_groups=1),
        "one group too many": routing(top_groups=3),
        "half as many groups": routing(groups=2, top_groups=1),
        "groups scored by their best two": routing(group_score="top2"),
        "routed scale": routing(scale=1.0),
        "renormalised, as its config asks": model(norm_topk_prob=True),
    },
    ("deepseek_v3", "published"): {
        "no correction": routing(correction_bias=False),
        "not renormalised": model(norm_topk_prob=False),
        "routed scale": routing(scale=1.0),
        "no groups": routing(groups=1, top_groups=1),
        "one group too many": routing(top_groups=3),
        "half as many groups": routing(groups=2, top_groups=1),
        "groups scored by their best": routing(group_score="max"),
    },
    ("glm4_moe", "published"): {"whole heads rotated": rope(dim=None)},
    ("dots1", "published"): {
        "no norm of the heads": model(qk_norm="none"),
        "no correction": routing(correction_bias=False),
        "softmax scores": routing(kind="softmax"),
        "not renormalised": model(norm_topk_prob=False),
        "routed scale": routing(scale=1.0),
        "no shared experts": model(shared_dim=0),
    },
    ("dots1", "everything"): {
        "no groups": routing(groups=1, top_groups=1),
        "one group too many": routing(top_groups=3),
        "half as many groups": routing(groups=2, top_groups=1),
        "groups scored by their best": routing(group_score="max"),
        "renormalised": model(norm_topk_prob=True),
        "every layer slides": window(lambda i, w: 7),
        "window one too wide": window(lambda i, w: w + 1 if w else 0),
    },
    ("dots1", "mixed"): {"window on the other layers": window(lambda i, w: 0 if w else 5)},
    ("ernie4_5_moe", "published"): {
        "no correction": routing(correction_bias=False),
        "sigmoid scores": routing(kind="sigmoid"),
        "not renormalised": model(norm_topk_prob=False),
        "halves rotated, or pairs": lambda config: rope(interleaved=not config.rope.interleaved)(config),
        "no shared experts": model(shared_dim=0),
        "one expert too few": model(top_k=2),
    },
    ("ernie4_5_moe", "everything"): {
        "no least sum": routing(smallest_sum=0.0),
        "least sum a tenth lower": lambda config: routing(smallest_sum=0.9 * config.routing.smallest_sum)(
            config
        ),
        "no bias of the output": model(lm_head_bias=False),
        "no biases in the feed-forward": model(mlp_bias=False),
    },
}
CASES = [(*base, name) for base, mistakes in MUTATIONS.items() for name in mistakes]


class Base(NamedTuple):
    """A loaded model, a batch, and what transformers makes of it."""

    model: Model
    tokens: np.ndarray
    mask: np.ndarray
    want: np.ndarray


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Callable[[str, str], Base]:
    """Family and variant -> the model, made once; the variants are those of the parity tests."""
    made: dict[tuple[str, str], Base] = {}

    def base(family: str, name: str) -> Base:
        if (family, name) not in made:
            torch.set_num_threads(1)
            variants = importlib.import_module(f"tests.parity.families.test_{family}").VARIANTS
            config = next(variant.config for variant in variants if variant.name == name)()
            theirs, folder = build(config, seed=3), tmp_path_factory.mktemp(family) / "theirs"
            theirs.save_pretrained(folder)
            tokens, mask, _ = batch(config.vocab_size, seed=3)
            made[family, name] = Base(
                load_pretrained(folder), tokens, mask, their_logits(theirs, tokens, mask)
            )
        return made[family, name]

    return base


def error(base: Base, network: Model) -> float:
    """Largest difference from transformers' logits on real tokens."""
    got = np.asarray(network(base.tokens, base.mask).logits)
    return float(np.abs(got - base.want)[base.mask.astype(bool)].max())


def mutated(right: Model, change: Change) -> Model:
    """The model under a wrong config."""
    config = change(right.config)
    assert config != right.config
    fresh = {"zeros": jnp.zeros, "ones": jnp.ones}
    params = {
        name: right.params[name] if name in right.params else fresh[spec.init](spec.shape, jnp.float32)
        for name, spec in declare(config).items()
    }
    return replace(right, config=config, params=params)


def test_there_are_at_least_forty():
    assert len(CASES) >= 40 and len(set(CASES)) == len(CASES)


@pytest.mark.parametrize(("family", "variant"), MUTATIONS)
def test_the_right_config_is_within_the_tolerance(bases, family, variant):
    base = bases(family, variant)
    assert error(base, base.model) < 1e-4


@pytest.mark.parametrize(("family", "variant", "name"), CASES)
def test_one_mistake_leaves_the_tolerance(bases, family, variant, name):
    base = bases(family, variant)
    wrong = mutated(base.model, MUTATIONS[family, variant][name])
    assert error(base, wrong) > 1e-3
