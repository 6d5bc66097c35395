"""One model's evaluation: harmfulness, over-refusal, task accuracy, routing drift. Reads and writes no file.

Every figure is made from answers that come back with it, so that another judge can look at them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from safemoe_jax.data.chat import encode_prompts
from safemoe_jax.data.sources import Sample
from safemoe_jax.errors import InputError
from safemoe_jax.evaluation.generate import ForcedRouting, generate
from safemoe_jax.evaluation.judges import Finding, Judge
from safemoe_jax.evaluation.metrics import Metric, Score, reference_answers, score_percent, share_percent
from safemoe_jax.evaluation.readout import compare_routing, read_routing
from safemoe_jax.model import Model

Results = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Suites:
    """What a model is tested on; an empty suite is left out.

    Attributes:
        harmful: instructions that the model should refuse.
        benign: instructions of the same topics that it should answer.
        task: samples of the fine-tuning task with their right answers, not seen in training.
        max_new_tokens: longest answer to harmful and benign instructions.
        task_max_new_tokens: longest answer to a task sample.
        batch_size: most prompts computed together.
    """

    harmful: Sequence[Sample] = ()
    benign: Sequence[Sample] = ()
    task: Sequence[Sample] = ()
    max_new_tokens: int = 1024
    task_max_new_tokens: int = 512
    batch_size: int = 32


@dataclass(frozen=True)
class Evaluation:
    """Figures and what they were made from.

    Attributes:
        results: percent (hs, over_refusal, fa) with ``_interval`` and ``_n``, drift in nats; ready for JSON.
        generations: one row an answer: suite, prompt, answer, label, judge or metric, n.
    """

    results: Results
    generations: list[Row]


def evaluate(
    model: Model,
    suites: Suites,
    *,
    judge: Judge,
    metric: Metric | None = None,
    aligned: Model | None = None,
    forced_routing: ForcedRouting | None = None,
    progress: bool = True,
) -> Evaluation:
    """Answers every suite greedily and judges the answers; compares routing with the aligned model's.

    Args:
        model: the model to test, with its tokenizer.
        suites: what to test it on.
        judge: decides about harmful and benign suites.
        metric: scores the task suite; its first score is the fine-tuning accuracy.
        aligned: the model before fine-tuning; None measures no drift.
        forced_routing: answer with another model's routing of the prompt.
        progress: show progress bars on a terminal.

    Returns:
        ``results`` has, as far as it was tested: hs, over_refusal, fa, each with ``<name>_interval`` (95 %)
        and ``<name>_n``; hs_unreadable (answers that the judge could not decide, which hs leaves out);
        judge; task (all scores of the metric); n (harmful prompts); drift, drift_interval, drift_by_layer,
        overlap, overlap_by_layer on harmful prompts, moe_layers, and under ``routing`` the same for each
        suite.

    Raises:
        InputError: nothing to test, a task suite without a metric or answers, or an aligned model of other
            routers.
    """
    if not (suites.harmful or suites.benign or suites.task):
        raise InputError(
            "nothing to evaluate", where="harmful, benign, task", expected="one of them at least"
        )
    if suites.task and metric is None:
        raise InputError("the task suite has no metric", where="task_metric", expected="a metric")
    reference_answers(suites.task)  # refuses a suite without answers before hours of generation, not after
    results: Results = {}
    generations: list[Row] = []
    scored = {
        "harmful": (partial(_judge_harmful, judge=judge), suites.max_new_tokens, {"judge": judge.name}),
        "benign": (partial(_judge_benign, judge=judge), suites.max_new_tokens, {"judge": judge.name}),
        "task": (partial(_score_task, metric=metric), suites.task_max_new_tokens, {}),
    }
    for name, (score, max_new_tokens, named) in scored.items():
        samples = getattr(suites, name)
        if samples:
            title = name if progress else None
            answers = answer(
                model, samples, max_new_tokens, suites.batch_size, forced_routing, progress=title
            )
            found, labels = score(samples, answers)
            results |= found | named
            generations += _rows(name, samples, answers, labels, **named)
    if aligned is not None:
        results |= routing_results(model, aligned, suites, progress=progress)
    return Evaluation(results, generations)


def answer(
    model: Model,
    samples: Sequence[Sample],
    max_new_tokens: int,
    batch_size: int = 32,
    forced_routing: ForcedRouting | None = None,
    *,
    progress: str | None = None,
) -> list[str]:
    """The model's greedy answers, without special tokens and surrounding white space."""
    new_tokens = generate(
        model,
        encode_prompts(model.tokenizer, samples),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        override=forced_routing,
        progress=progress,
    )
    return [text.strip() for text in model.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


def routing_results(model: Model, aligned: Model, suites: Suites, *, progress: bool = True) -> Results:
    """Drift and overlap at the last prompt token on each suite; the harmful suite's also at the top level."""
    routing = {}
    for name in ("harmful", "benign", "task"):
        samples = getattr(suites, name)
        if samples:
            prompts = encode_prompts(model.tokenizer, samples)
            here, there = (
                read_routing(
                    m,
                    prompts,
                    batch_size=suites.batch_size,
                    progress=f"routing, {name}" if progress else None,
                )
                for m in (model, aligned)
            )
            routing[name] = compare_routing(here, there, model, aligned)
    top = {key: value for key, value in routing.get("harmful", {}).items() if key != "n"}
    return top | {"moe_layers": list(model.config.moe_layers), "routing": routing}


def _judge_harmful(samples: Sequence[Sample], answers: list[str], judge: Judge) -> tuple[Results, list[str]]:
    found, refused = judge.findings(samples, answers), judge.refused(samples, answers)
    share = share_percent(finding.unsafe for finding in found)
    labels = [_harm_label(*pair) for pair in zip(found, refused, strict=True)]
    return _flat("hs", share) | {"hs_unreadable": share["undefined"], "n": len(answers)}, labels


def _harm_label(finding: Finding, refused: bool) -> str:
    if finding.unsafe is None:
        return "unreadable"
    if finding.unsafe:
        return f"unsafe {finding.categories}".strip()
    return "refused" if refused else "safe"


def _judge_benign(samples: Sequence[Sample], answers: list[str], judge: Judge) -> tuple[Results, list[str]]:
    refused = judge.refused(samples, answers)
    return _flat("over_refusal", share_percent(refused)), ["refused" if r else "answered" for r in refused]


def _score_task(samples: Sequence[Sample], answers: list[str], metric: Metric) -> tuple[Results, list[str]]:
    scores = metric(samples, answers)
    first = next(iter(scores))
    results = _flat("fa", score_percent(first, scores[first])) | {
        "fa_metric": first,
        "task": {name: score_percent(name, values) for name, values in scores.items()},
    }
    labels = [
        ", ".join(f"{name} {_shown(value)}" for name, value in zip(scores, row, strict=True))
        for row in zip(*scores.values(), strict=True)
    ]
    return results, labels


def _shown(score: Score) -> str:
    return "undefined" if score is None else f"{score:.3g}"


def _flat(name: str, figure: Results) -> Results:
    return {
        name: figure["value"],
        f"{name}_interval": [figure["low"], figure["high"]],
        f"{name}_n": figure["n"],
    }


def _rows(
    suite: str, samples: Sequence[Sample], answers: list[str], labels: list[str], **more: str
) -> list[Row]:
    return [
        {"suite": suite, "prompt": s.user, "answer": a, "label": label, "source": s.source, "index": s.index}
        | ({} if s.answer is None else {"expected": s.answer})
        | more
        | {"n": len(answers)}
        for s, a, label in zip(samples, answers, labels, strict=True)
    ]
