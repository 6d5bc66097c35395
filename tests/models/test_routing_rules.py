"""How experts are chosen and weighted, each rule against a loop in NumPy over tokens.

Legend: T tokens, D model width, E experts, K experts chosen for a token.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.models import ModelConfig, RoutingConfig
from safemoe_jax.models.params import bind, flat_state
from safemoe_jax.models.router import Router, choose_experts

E, K, T = 12, 4, 200


def config(kind: str, *, top_k: int = K, norm: bool = False, **routing) -> ModelConfig:
    sizes = {"vocab_size": 8, "d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "head_dim": 8}
    return ModelConfig(
        family="any",
        **sizes,
        norm_eps=1e-5,
        n_experts=E,
        top_k=top_k,
        expert_dim=8,
        norm_topk_prob=norm,
        routing=RoutingConfig(kind=kind, **routing),
    )


def draw(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def in_groups(choice, groups: int, kept: int, best_in_group: int, masked: float):
    """The scores of the `kept` groups whose `best_in_group` largest scores sum highest; others `masked`."""
    parts = choice.reshape(groups, -1)
    order = np.argsort([-np.sort(part)[-best_in_group:].sum() for part in parts])
    out = np.full_like(parts, masked)
    out[order[:kept]] = parts[order[:kept]]
    return out.reshape(-1)


def largest(scores, k: int) -> np.ndarray:
    return np.argsort(-scores)[:k]


def by_softmax(logits):
    scores = softmax(logits)
    chosen = largest(scores, K)
    return scores[chosen], chosen


def by_softmax_of_the_chosen(logits):
    chosen = largest(logits, K)
    return softmax(logits[chosen]), chosen


def by_sigmoid_input(logits):
    chosen = largest(logits, K)
    return sigmoid(logits[chosen]), chosen


def deepseek_v2(logits):
    """Group-limited: groups by their best score, scores of other groups become zero; scaled, not normed."""
    scores = in_groups(softmax(logits), 4, 2, 1, 0.0)
    chosen = largest(scores, K)
    return 2.5 * scores[chosen], chosen


def deepseek_v3(correction):
    """Sigmoid scores; the correction chooses groups and experts, but does not weigh them."""

    def rule(logits):
        scores = sigmoid(logits)
        choice = in_groups(scores + correction, 4, 2, 2, -np.inf)
        chosen = largest(choice, K)
        return 2.5 * scores[chosen] / (scores[chosen].sum() + 0.25), chosen

    return rule


def ernie(correction):
    """Softmax scores chosen with a correction, divided by their sum or by a least value."""

    def rule(logits):
        scores = softmax(logits)
        chosen = largest(scores + correction, K)
        return scores[chosen] / max(scores[chosen].sum(), 0.5), chosen

    return rule


CORRECTION = draw(100, E, scale=0.2)
RULES = {
    "softmax": (config("softmax"), by_softmax, None),
    "softmax, renormalised": (
        config("softmax", norm=True),
        lambda logits: (lambda w, e: (w / w.sum(), e))(*by_softmax(logits)),
        None,
    ),
    "softmax_chosen": (config("softmax_chosen"), by_softmax_of_the_chosen, None),
    "sigmoid_input": (config("sigmoid_input"), by_sigmoid_input, None),
    "deepseek_v2": (config("softmax", groups=4, top_groups=2, scale=2.5), deepseek_v2, None),
    "deepseek_v3": (
        config(
            "sigmoid",
            norm=True,
            correction_bias=True,
            groups=4,
            top_groups=2,
            group_score="top2",
            scale=2.5,
            weight_floor=0.25,
        ),
        deepseek_v3(CORRECTION),
        CORRECTION,
    ),
    "ernie4_5_moe": (
        config("softmax", norm=True, correction_bias=True, smallest_sum=0.5),
        ernie(CORRECTION),
        CORRECTION,
    ),
}


def choose(model: ModelConfig, logits, correction=None):
    correction = None if correction is None else jnp.asarray(correction)
    return jax.jit(lambda x: choose_experts(x, model, correction))(jnp.asarray(logits))


@pytest.mark.parametrize("name", RULES)
def test_experts_and_weights_match_the_rule_token_by_token(name):
    model, rule, correction = RULES[name]
    logits = draw(1, T, E)
    weights, experts = choose(model, logits.reshape(2, T // 2, E), correction)
    assert weights.shape == experts.shape == (2, T // 2, K)
    assert weights.dtype == jnp.float32 and experts.dtype == jnp.int32
    expected = [rule(row.astype(np.float64)) for row in logits]
    np.testing.assert_array_equal(experts.reshape(T, K), [chosen for _, chosen in expected])
    np.testing.assert_allclose(weights.reshape(T, K), [weight for weight, _ in expected], atol=2e-6)


def test_rules_differ_from_one_another():
    """Otherwise a wrong one would pass the test above. One pair is the same function written in two ways."""
    logits = draw(1, T, E)
    found = {name: choose(model, logits, correction) for name, (model, _, correction) in RULES.items()}
    alike = {
        (first, second)
        for first, second in itertools.combinations(found, 2)
        if all(np.allclose(a, b, atol=1e-3) for a, b in zip(found[first], found[second], strict=True))
    }
    assert alike == {("softmax, renormalised", "softmax_chosen")}


def published_sparsemixer(scores, jitter: float):
    """Two picks. Each: threshold the distance to the largest, softmax the rest, take the largest's share."""
    picks, weights, left = [], [], scores.copy()
    for _ in range(2):
        largest_left = left.max()
        gates = left.copy()
        for e, s in enumerate(scores):
            if (largest_left - s) / max(abs(s), largest_left) > 2 * jitter:
                gates[e] = -np.inf
        picks.append(int(left.argmax()))
        weights.append(softmax(gates)[picks[-1]])
        left[picks[-1]] = -np.inf
    return weights, picks


@pytest.mark.parametrize("jitter", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("shift", [0.0, 4.0, -4.0], ids=["mixed", "positive", "negative"])
def test_sparsemixer_matches_its_published_rule(jitter, shift):
    logits = draw(2, T, E) + np.float32(shift)
    weights, experts = choose(config("sparsemixer", top_k=2, jitter=jitter), logits)
    expected = [published_sparsemixer(row.astype(np.float64), jitter) for row in logits]
    np.testing.assert_array_equal(experts, [picks for _, picks in expected])
    np.testing.assert_allclose(weights, [weight for weight, _ in expected], atol=1e-5)


def test_sparsemixer_weights_share_among_the_close_and_do_not_sum_to_one():
    logits = np.array([[4.0, 3.9, 1.0, 0.0]], np.float32)
    model = config("sparsemixer", top_k=2, jitter=0.05)
    weights, experts = choose(model, logits)
    np.testing.assert_array_equal(experts, [[0, 1]])
    np.testing.assert_allclose(weights, [[sigmoid(0.1), 1.0]], atol=1e-6)


@pytest.mark.parametrize("name", [*RULES, "sparsemixer"])
def test_gradient_is_the_derivative_of_the_rule(name):
    """Against central differences of the rule in float64, where no choice changes."""
    if name == "sparsemixer":
        model, correction = config(name, top_k=2, jitter=0.2), None
        rule = lambda row: published_sparsemixer(row, 0.2)  # noqa: E731
    else:
        model, rule, correction = RULES[name]
    logits = draw(3, E).astype(np.float64)
    d_weights = draw(4, model.top_k).astype(np.float64)
    value = lambda row: np.dot(rule(row)[0], d_weights)  # noqa: E731
    steps = 1e-6 * np.eye(E)
    expected = [(value(logits + step) - value(logits - step)) / 2e-6 for step in steps]

    def loss(row):
        fixed = None if correction is None else jnp.asarray(correction)
        return jnp.dot(choose_experts(row, model, fixed)[0], jnp.asarray(d_weights, jnp.float32))

    found = jax.grad(loss)(jnp.asarray(logits, jnp.float32))
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_correction_gets_no_gradient():
    model, _, correction = RULES["deepseek_v3"]
    logits = jnp.asarray(draw(5, T, E))
    gradient = jax.grad(lambda c: choose_experts(logits, model, c)[0].sum())(jnp.asarray(correction))
    np.testing.assert_array_equal(gradient, np.zeros(E))


def test_correction_of_each_layer_broadcasts():
    model, _, _ = RULES["ernie4_5_moe"]
    logits, corrections = draw(6, 3, T, E), draw(7, 3, E, scale=0.3)
    _, together = choose(model, logits, corrections[:, None])
    for layer in range(3):
        np.testing.assert_array_equal(together[layer], choose(model, logits[layer], corrections[layer])[1])


def test_correction_that_is_missing_or_not_asked_for_is_refused():
    logits = draw(8, T, E)
    with pytest.raises(InputError, match="missing"):
        choose(config("sigmoid", correction_bias=True), logits)
    with pytest.raises(InputError, match="not used"):
        choose(config("sigmoid"), logits, CORRECTION)


def test_unknown_rule_is_refused():
    with pytest.raises(InputError, match="hash"):
        choose(config("hash"), draw(9, T, E))


def _router(model: ModelConfig, arrays: dict[str, np.ndarray]) -> Router:
    assert set(flat_state(Router(model))) == set(arrays)
    return bind(Router(model), {name: jnp.asarray(array) for name, array in arrays.items()})


def test_logits_include_the_bias_but_not_the_correction():
    model = config("sigmoid", bias=True, correction_bias=True)
    arrays = {"kernel": draw(10, 16, E), "bias": draw(11, E), "correction_bias": draw(12, E)}
    x = draw(13, 5, 16)
    found = _router(model, arrays)(jnp.asarray(x))
    np.testing.assert_allclose(found, x @ arrays["kernel"] + arrays["bias"], atol=1e-5)


@pytest.mark.parametrize("float32", [False, True])
def test_float32_router_does_not_round_its_logits_in_a_bfloat16_model(float32):
    model, kernel = config("softmax", float32_logits=float32), draw(14, 16, E)
    x = jnp.asarray(draw(15, 300, 16), jnp.bfloat16)
    found = _router(model, {"kernel": kernel})(x)
    assert found.dtype == jnp.float32
    error = np.abs(found - np.asarray(x, np.float32) @ kernel).max()
    assert (error < 1e-5) == float32 and error < 0.1
