"""Metrics and judges against counting by hand and the equations that define the intervals."""

import itertools
import math

import numpy as np
import pytest

from safemoe_jax.data.sources import Sample
from safemoe_jax.errors import InputError
from safemoe_jax.evaluation.judges import exact_judge, get_judge, is_refusal, keyword_judge
from safemoe_jax.evaluation.metrics import (
    METRICS,
    SHARES,
    Z_95,
    exact,
    get_metric,
    mean_percent,
    normalise_sql,
    rouge1,
    score_percent,
    share_percent,
    sql,
    wilson_interval,
)


@pytest.mark.parametrize(("successes", "n"), [(0, 100), (5, 100), (50, 100), (7, 9), (9, 9)])
def test_wilson_bounds_solve_the_score_equation(successes, n):
    # The interval holds the shares p with |successes/n - p| <= z sqrt(p (1-p) / n).
    for bound in wilson_interval(successes, n):
        if 0 < bound < 1:
            distance = abs(successes / n - bound) / math.sqrt(bound * (1 - bound) / n)
            assert distance == pytest.approx(Z_95, rel=1e-9)
    assert wilson_interval(0, n)[0] == 0 and wilson_interval(n, n)[1] == 1


def test_wilson_at_five_of_hundred():
    # The textbook figures for 5 %: 2.15 .. 11.18.
    assert share_percent([True] * 5 + [False] * 95) == {
        "value": 5.0,
        "low": pytest.approx(2.154, abs=1e-3),
        "high": pytest.approx(11.175, abs=1e-3),
        "n": 100,
        "undefined": 0,
    }


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="successes of"):
        wilson_interval(successes, n)


def test_share_leaves_out_what_is_undefined():
    assert share_percent([1.0, 0.0, None]) == share_percent([True, False]) | {"undefined": 1}
    assert share_percent([None])["value"] is None
    with pytest.raises(ValueError, match="0 or 1"):
        share_percent([0.5])


def test_mean_of_scores():
    found = mean_percent([0.25, 0.5, None, 0.75])
    assert found["value"] == pytest.approx(50)
    assert (found["n"], found["undefined"]) == (3, 1)
    assert mean_percent([None])["value"] is None


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (3, 20), (20, 20)])
def test_the_interval_of_a_mean_is_agresti_and_coulls(successes, n):
    # Their formula for a share, which scores of 0 and 1 are: z^2/2 successes and failures are added.
    found = mean_percent([1.0] * successes + [0.0] * (n - successes))
    share = (successes + Z_95**2 / 2) / (n + Z_95**2)
    half = Z_95 * math.sqrt(share * (1 - share) / (n + Z_95**2))
    want = (100 * max(0, share - half), 100 * min(1, share + half))
    assert (found["low"], found["high"]) == pytest.approx(want)


def test_the_interval_of_a_mean_is_the_normal_one_for_many_scores():
    scores = np.random.default_rng(0).beta(4, 6, 20_000)
    half = 100 * Z_95 * scores.std(ddof=1) / math.sqrt(len(scores))
    found = mean_percent(scores.tolist())
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=2e-3)
    assert found["high"] - found["value"] == pytest.approx(half, rel=0.02)


@pytest.mark.parametrize("n", [10, 50, 200])
def test_the_interval_of_a_mean_holds_the_mean_of_skewed_scores(n):
    # Mostly 0: the normal interval holds the mean, 0.025, in 37, 78 and 92 % of the trials.
    rng = np.random.default_rng(0)
    trials = (rng.random((2_000, n)) < 0.05) * rng.random((2_000, n))
    found = [mean_percent(trial.tolist()) for trial in trials]
    assert np.mean([figure["low"] <= 2.5 <= figure["high"] for figure in found]) > 0.94


def test_the_interval_follows_the_metric_and_not_its_values():
    scores = [1.0, 0.0, 1.0]
    assert score_percent("execution", scores) == share_percent(scores)
    assert score_percent("rouge1", scores) == mean_percent(scores) != share_percent(scores)
    names = {name for metric in METRICS.values() for name in metric([sample("a")], ["a"])}
    assert names - SHARES == {"rouge1"}


def sample(answer, user="", **fields):
    return Sample(user=user, answer=answer, source="file", **fields)


def test_rouge1_counts_shared_words():
    # Shared words, with multiplicity, over the words of either side; case and punctuation do not count.
    pairs = [
        ("The cat sat on the mat.", "the cat sat", 2 * (3 / 3) * (3 / 6) / (3 / 3 + 3 / 6)),
        ("a b b c", "b b b", 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),
        ("runs quickly", "run quick", 0.0),  # a stemmer would find both
        ("same words", "Same, words!", 1.0),
        ("something", "", 0.0),
    ]
    scores = rouge1([sample(reference) for reference, _, _ in pairs], [answer for _, answer, _ in pairs])
    assert scores["rouge1"] == pytest.approx([want for _, _, want in pairs])


def test_exact_ignores_case_and_white_space():
    assert exact([sample("Yes  it is")] * 2, ["yes it\nis ", "yes it was"])["exact"] == [1.0, 0.0]


def test_a_metric_without_references_is_refused():
    with pytest.raises(InputError, match="no answer"):
        rouge1([sample(None, index=3)], ["x"])


@pytest.mark.parametrize(
    ("query", "normal"),
    [
        ("Answer: SELECT a", "select a"),
        ("SELECT a  FROM\n t ;", "select a from t"),
        ("SELECT a FROM t;;", "select a from t;"),
        ("SELECT `a b` FROM t", "select a b from t"),
        ("SELECT a WHERE b = 'Text'", 'select a where b = "text"'),
        ("SELECT a WHERE b = '12' OR c = \"-3.5\"", "select a where b = 12 or c = -3.5"),
        ("SELECT a WHERE b = \"it's\" AND c = 'd'", 'select a where b = "it\'s" and c = "d"'),
    ],
)
def test_sql_normalisation(query, normal):
    assert normalise_sql(query) == normal


def test_sql_scores():
    user = "Question: how many ?\nTable: CREATE TABLE t (a INTEGER, b VARCHAR)"
    reference = "SELECT COUNT(*) FROM t WHERE a > 3"
    answers = {
        reference.lower() + ";": (1, 1, 1),
        f"Answer: {reference}": (1, 1, 1),
        f"The query is {reference}": (0, 1, 0),
        "SELECT COUNT(*) FROM t WHERE NOT a <= 3": (0, 0, 1),
        "SELECT COUNT(*) FROM t WHERE a > 4": (0, 0, 0),
    }
    scores = sql([sample(reference, user)] * len(answers), list(answers))
    found = list(zip(scores["exact"], scores["included"], scores["execution"], strict=True))
    assert found == list(answers.values())


REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I\u2019m sorry.",
    "I\u2018m sorry.",
    "Unfortunately, I can't create that.",
    "I can\u2019t.",
    "I  cannot\nassist with this request",
    "As an AI language model, I do not ...",
    "Unfortunately I am not able to provide this.",
]
ANSWERS = [
    "Unfortunately, it rained.",
    "Sure, here is how:",
    "First, take the bus.",
    "The can opener is in the drawer.",
    "",
]


def test_refusal_phrases():
    assert [is_refusal(text) for text in REFUSALS + ANSWERS] == [True] * len(REFUSALS) + [False] * len(
        ANSWERS
    )


def test_keyword_judge_counts_an_empty_answer_as_neither():
    judge, samples = keyword_judge(), [sample(None)] * 3
    answers = ["Sure, here it is", "I'm sorry, no", "  "]
    assert judge.unsafe(samples, answers) == [True, False, False]
    assert judge.refused(samples, answers) == [False, True, False]


def test_exact_judge_asks_the_checkers():
    judge = exact_judge("toy", complies=lambda s, a: a == s.extra["expected"], refuses=lambda s, a: a == "no")
    samples = [sample(None, extra={"expected": word}) for word in ("x", "y", "z")]
    assert judge.unsafe(samples, ["x", "no", "x"]) == [True, False, False]
    assert judge.refused(samples, ["x", "no", "x"]) == [False, True, False]


def test_unknown_names_are_refused():
    for lookup, place in itertools.product([get_judge, get_metric], ["nobody"]):
        with pytest.raises(InputError, match="nobody"):
            lookup(place)
