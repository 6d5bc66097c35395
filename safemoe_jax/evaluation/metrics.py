"""Numbers from judged answers: shares and means with their intervals, ROUGE-1, text and SQL matches.

A metric maps samples and their answers to one score in [0, 1] a sample, None where the score is undefined.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from safemoe_jax.data.sources import Sample
from safemoe_jax.errors import InputError
from safemoe_jax.evaluation.sql import create_statements, execution_match

Score = float | None
Metric = Callable[[Sequence[Sample], Sequence[str]], dict[str, list[Score]]]
"""Samples and answers to named lists of scores; the first name is the fine-tuning accuracy (FA)."""

SHARES = frozenset({"exact", "included", "execution"})
"""Names of the scores that are right or wrong, so that their mean is a share, whatever its values."""

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def wilson_interval(successes: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share, as fractions (E. B. Wilson 1927).

    Unlike the normal approximation it is not empty at 0 or n successes: 0 of 100 gives 0 .. 0.037.

    Raises:
        ValueError: n is 0, or successes lie outside 0 .. n.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    share, spread = successes / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    # At the ends the bound is exactly 0 or 1; the difference would leave a rounding error.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def share_percent(flags: Iterable[Score]) -> dict[str, Any]:
    """Share of true flags in percent: ``{"value", "low", "high", "n", "undefined"}``, Wilson's 95 % interval.

    Flags that are None count as undefined and are left out; if all are, the value and its interval are None.

    Raises:
        ValueError: a flag is neither true (1) nor false (0).
    """
    defined, undefined = _defined(flags)
    if any(flag not in (0, 1) for flag in defined):
        raise ValueError("a share is of flags, 0 or 1; other scores have a mean")
    if not defined:
        return _figure(None, None, None, 0, undefined)
    successes, n = sum(map(bool, defined)), len(defined)
    low, high = wilson_interval(successes, n)
    return _figure(successes / n, low, high, n, undefined)


def mean_percent(scores: Iterable[Score]) -> dict[str, Any]:
    """Mean of the defined scores in [0, 1] in percent: ``{"value", "low", "high", "n", "undefined"}``.

    The 95 % interval is Agresti and Coull's (1998), which holds for any scores between 0 and 1: the normal
    interval of the scores and z^2 / 2 = 1.92 more observations at either end. The plain normal interval is
    empty where all scores are the same, and too short for few or skewed ones; for hundreds of scores the two
    agree. Without any defined score the value and its interval are None.
    """
    defined, undefined = _defined(scores)
    if not defined:
        return _figure(None, None, None, 0, undefined)
    extra, n = Z_95**2 / 2, len(defined)
    weight = n + 2 * extra
    centre = (sum(defined) + extra) / weight
    squares = sum((score - centre) ** 2 for score in defined) + extra * (centre**2 + (1 - centre) ** 2)
    half = Z_95 * math.sqrt(squares) / weight
    return _figure(sum(defined) / n, max(0.0, centre - half), min(1.0, centre + half), n, undefined)


def score_percent(name: str, scores: Iterable[Score]) -> dict[str, Any]:
    """The figure of a metric's scores: a share with Wilson's interval for those of SHARES, else a mean."""
    return share_percent(scores) if name in SHARES else mean_percent(scores)


def _defined(scores: Iterable[Score]) -> tuple[list[float], int]:
    """The scores that are defined, and how many are not."""
    scores = list(scores)
    defined = [score for score in scores if score is not None]
    return defined, len(scores) - len(defined)


def _figure(
    value: float | None, low: float | None, high: float | None, n: int, undefined: int
) -> dict[str, Any]:
    percent = {
        key: None if fraction is None else 100 * fraction
        for key, fraction in (("value", value), ("low", low), ("high", high))
    }
    return percent | {"n": n, "undefined": undefined}


def rouge1(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, list[Score]]:
    """ROUGE-1 F-measure of each answer against its sample's (rouge-score without stemmer, as published)."""
    from rouge_score.rouge_scorer import (
        RougeScorer,
    )  # imports nltk: a second that other commands need not pay

    scorer = RougeScorer(["rouge1"], use_stemmer=False)
    pairs = zip(reference_answers(samples), answers, strict=True)
    return {"rouge1": [scorer.score(reference, answer)["rouge1"].fmeasure for reference, answer in pairs]}


def exact(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, list[Score]]:
    """Whether the answer is the sample's, but for case and white space."""
    pairs = zip(reference_answers(samples), answers, strict=True)
    return {"exact": [float(_collapse(reference) == _collapse(answer)) for reference, answer in pairs]}


def sql(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, list[Score]]:
    """Exact and included match after normalisation, and execution match on SQLite.

    ``execution`` runs both queries on synthetic rows in the tables that the prompt's CREATE statements
    declare (:func:`safemoe_jax.evaluation.sql.execution_match`); None where the rows cannot decide. The order
    of rows counts where the reference asks for one.
    """
    references = reference_answers(samples)
    scores: dict[str, list[Score]] = {"exact": [], "included": [], "execution": []}
    for sample, reference, answer in zip(samples, references, answers, strict=True):
        wanted, got = normalise_sql(reference), normalise_sql(answer)
        scores["exact"].append(float(wanted == got))
        scores["included"].append(float(wanted in got))
        tables = create_statements(sample.user)
        scores["execution"].append(execution_match(tables, strip_answer(reference), strip_answer(answer)))
    return scores


METRICS: dict[str, Metric] = {"rouge1": rouge1, "sql": sql, "exact": exact}


def get_metric(name: str) -> Metric:
    """The metric of that name; InputError if there is none."""
    if name not in METRICS:
        raise InputError(f"unknown metric {name!r}", where="task_metric", expected=" or ".join(METRICS))
    return METRICS[name]


def normalise_sql(query: str) -> str:
    """A query in the form that exact match compares (the published protocol's rules).

    A leading "Answer:" goes, quoted numbers lose their quotes, single quotes round text become double ones,
    backticks go, one trailing ";" goes, white space collapses, letters become lower case.
    """
    query = re.sub(r"""(['"])([+-]?\d+(?:\.\d+)?)\1""", r"\2", strip_answer(query))
    query = _QUOTED.sub(lambda match: f'"{match[1]}"' if match[1] is not None else match[0], query)
    return _collapse(query.replace("`", "").strip().removesuffix(";"))


def strip_answer(text: str) -> str:
    """The text without a leading "Answer:" and without surrounding white space."""
    return re.sub(r"^\s*answer:", "", text, flags=re.IGNORECASE).strip()


# A double-quoted text is matched as well, so that an apostrophe inside it is not taken for a quote.
_QUOTED = re.compile(r"""'((?:[^']|'')*)'|"[^"]*\"""")


def _collapse(text: str) -> str:
    return " ".join(text.split()).lower()


def reference_answers(samples: Sequence[Sample]) -> list[str]:
    """The right answers of task samples.

    Raises:
        InputError: a sample has none.
    """
    missing = next((sample for sample in samples if sample.answer is None), None)
    if missing is not None:
        raise InputError(
            "a sample has no answer to compare with",
            where=f"{missing.source}, sample {missing.index}",
            expected="a task file whose samples carry an answer",
        )
    return [sample.answer for sample in samples]
