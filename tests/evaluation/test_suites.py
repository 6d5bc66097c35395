"""Suites: the figures against counting the rows that come back with them."""

import json

import numpy as np
import pytest

from safemoe_jax.checkpoints.json_files import add_results, read_if_there
from safemoe_jax.data.chat import encode_prompts
from safemoe_jax.data.sources import Sample
from safemoe_jax.errors import InputError
from safemoe_jax.evaluation.generate import ForcedRouting, generate
from safemoe_jax.evaluation.judges import exact_judge
from safemoe_jax.evaluation.metrics import exact
from safemoe_jax.evaluation.records import check_free
from safemoe_jax.evaluation.suites import Suites, answer, evaluate
from safemoe_jax.model import load_pretrained
from tests.evaluation.folders import TEXTS, write_model

PARITY = exact_judge("parity", lambda s, a: s.index % 2 == 0, lambda s, a: s.index < 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_pretrained(write_model(tmp_path_factory.mktemp("models") / "a"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return load_pretrained(write_model(tmp_path_factory.mktemp("models") / "b", seed=1))


def samples(n, answers=None):
    words = TEXTS[0].split()
    users = [" ".join(words[i:] + words[: i % 3]) for i in range(n)]
    answers = answers or [None] * n
    return [
        Sample(user=u, answer=a, source="file.json", index=i)
        for i, (u, a) in enumerate(zip(users, answers, strict=True))
    ]


def test_answers_are_the_decoded_continuations(model):
    tests = samples(3)
    prompts = encode_prompts(model.tokenizer, tests)
    tokens = generate(model, prompts, max_new_tokens=6, stop_tokens=[0])
    decoded = [model.tokenizer.decode(t, skip_special_tokens=True).strip() for t in tokens]
    assert answer(model, tests, 6) == decoded


def test_figures_are_counted_from_the_rows(model, other):
    right = answer(model, samples(4), 5)
    task = samples(4, [right[0], "wrong", right[2].upper(), right[3]])
    suites = Suites(samples(5), samples(3), task, max_new_tokens=4, task_max_new_tokens=5, batch_size=2)
    found = evaluate(model, suites, judge=PARITY, metric=exact, aligned=other, progress=False)
    results, rows = found.results, found.generations
    assert results["hs"] == 60.0 and results["n"] == results["hs_n"] == 5
    assert results["hs_interval"][0] < 60 < results["hs_interval"][1]
    assert results["over_refusal"] == pytest.approx(100 / 3)
    assert results["fa"] == 75.0 and results["fa_metric"] == "exact"
    assert results["judge"] == "parity"
    labels = [row["label"] for row in rows if row["suite"] == "harmful"]
    assert labels == ["unsafe", "safe", "unsafe", "safe", "unsafe"]
    assert [row["label"] for row in rows if row["suite"] == "benign"] == ["refused", "answered", "answered"]
    assert [row["label"] for row in rows if row["suite"] == "task"] == [f"exact {x}" for x in (1, 0, 1, 1)]
    assert [row["answer"] for row in rows if row["suite"] == "task"] == right
    assert all(row["judge"] == "parity" and row["n"] == 5 for row in rows[:5])
    assert set(results["routing"]) == {"harmful", "benign", "task"}
    assert len(results["drift_by_layer"]) == len(results["moe_layers"]) == 2
    assert results["drift"] == pytest.approx(np.mean(results["drift_by_layer"]))
    assert results["drift"] > 1e-3 and results["overlap"] < 1
    json.dumps(results), json.dumps(rows)


def test_drift_against_itself_is_zero(model):
    results = evaluate(
        model, Suites(samples(2), max_new_tokens=1), judge=PARITY, aligned=model, progress=False
    ).results
    assert results["drift"] < 1e-6 and results["overlap"] == 1.0
    assert "over_refusal" not in results and "fa" not in results


def test_forced_routing_reaches_the_answers(model, other):
    suites = Suites(samples(4), max_new_tokens=6)
    forced = ForcedRouting(other, "prompt")
    rows = evaluate(model, suites, judge=PARITY, forced_routing=forced, progress=False).generations
    assert [row["answer"] for row in rows] == answer(model, samples(4), 6, forced_routing=forced)
    assert [row["answer"] for row in rows] != answer(model, samples(4), 6)


def test_nothing_to_test_and_a_task_without_metric_are_refused(model):
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate(model, Suites(), judge=PARITY)
    with pytest.raises(InputError, match="metric"):
        evaluate(model, Suites(task=samples(1, ["x"])), judge=PARITY)


def test_results_are_added_and_other_settings_refused(tmp_path):
    settings = {"model": "a", "layers": (1, 2)}
    check_free(tmp_path, "evaluation", settings)
    add_results(tmp_path, {"training": 1})
    add_results(tmp_path, {"hs": 2.0, "evaluation": {"settings": settings}})
    assert read_if_there(tmp_path / "results.json") == {
        "training": 1,
        "hs": 2.0,
        "evaluation": {"settings": {"model": "a", "layers": [1, 2]}},
    }
    check_free(tmp_path, "evaluation", settings)
    with pytest.raises(InputError, match="other settings \\(model\\)"):
        check_free(tmp_path, "evaluation", settings | {"model": "b"})
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(InputError, match="results.json cannot be read"):
        check_free(tmp_path, "evaluation", settings)
