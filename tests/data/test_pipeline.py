"""The stream of batches: what each step holds, its shapes, and that it resumes."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from safemoe_jax.data.chat import Encoded
from safemoe_jax.data.pipeline import TrainPipeline
from safemoe_jax.errors import InputError
from tests.data.test_packing import learned_pairs, random_samples, unpack

SAMPLES = random_samples(53, 90)


def build(**changes: Any) -> TrainPipeline:
    return TrainPipeline.build(SAMPLES, **({"batch_size": 8, "epochs": 3, "seed": 1} | changes))


def stream(pipeline: TrainPipeline) -> list[int]:
    return [i for step in range(pipeline.total_steps) for i in pipeline.sample_ids(step)]


def test_every_sample_once_an_epoch_in_another_order() -> None:
    pipeline = build()
    assert (pipeline.total_steps, pipeline.steps_per_epoch) == (3 * 53 // 8, 6)
    ids = stream(pipeline)
    epochs = [ids[:53], ids[53:106], ids[106:]]
    assert [sorted(epoch) for epoch in epochs[:2]] == [list(range(53))] * 2
    assert max(Counter(epochs[2]).values()) == 1
    assert epochs[0] != epochs[1] and epochs[1][: len(epochs[2])] != epochs[2]
    assert epochs[0] != sorted(epochs[0])
    assert ids == stream(build()) != stream(build(seed=2))


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 3), (1, 6), (1.5, 9), (3, 19)])
def test_steps_are_the_whole_batches_in_the_epochs(epochs: float, steps: int) -> None:
    assert build(epochs=epochs).total_steps == steps
    assert build(epochs=epochs, total_steps=4).total_steps == 4


@pytest.mark.parametrize("changes", [{}, {"row_multiple": 4}, {"row_length": 90}])
def test_each_batch_holds_exactly_its_samples_in_a_planned_shape(changes: dict[str, Any]) -> None:
    pipeline = build(**changes)
    assert 1 <= len(pipeline.shapes) <= 4
    seen = []
    for step, batch in enumerate(pipeline.iter()):
        chosen = [SAMPLES[i] for i in pipeline.sample_ids(step)]
        assert len(chosen) == 8
        assert sorted(unpack(batch)) == sorted(tuple(s.tokens.tolist()) for s in chosen)
        assert len(learned_pairs(batch)) == sum(int(s.loss_mask[1:].sum()) for s in chosen)
        seen.append((*batch["tokens"].shape, batch["targets"].shape[1]))
        assert batch["tokens"].shape[0] % changes.get("row_multiple", 1) == 0
    assert len(seen) == pipeline.total_steps
    assert set(seen) == set(pipeline.shapes) == set(seen[: pipeline.steps_per_epoch])
    if "row_length" in changes:
        assert pipeline.capacity.tokens == 90


def test_several_shapes_when_they_pay() -> None:
    """Many steps of uneven size: four shapes at the most, all of them met in the first epoch."""
    generator = np.random.default_rng(0)
    lengths = np.where(generator.random(4000) < 0.5, 20, 500)
    samples = [Encoded(np.ones(n, np.int32), np.arange(n) >= n - 5) for n in lengths]
    pipeline = TrainPipeline.build(samples, 8, epochs=4, seed=0)
    assert 2 <= len(pipeline.shapes) <= 4
    used = [pipeline.batch(step)["tokens"].shape[0] for step in range(pipeline.steps_per_epoch)]
    assert set(used) == {shape.rows for shape in pipeline.shapes}
    fixed = sum(max(used) for _ in used)
    assert sum(used) < 0.8 * fixed


def test_resumes_at_any_step_with_the_same_stream() -> None:
    pipeline = build()
    expected = [batch["tokens"] for batch in pipeline.iter()]
    for stop in (0, 1, 7, 18, 19):
        first = pipeline.iter()
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.get_state()))
        second = build().iter()
        second.set_state(state)
        for rest in (list(second), list(pipeline.iter(stop))):
            assert len(rest) == len(expected) - stop
            for batch, tokens in zip(rest, expected[stop:], strict=True):
                np.testing.assert_array_equal(batch["tokens"], tokens)
    assert pipeline.iter(7).get_state() == state | {"next_index": 7}


def test_prompts_ride_in_the_task_batches() -> None:
    prompts = [p.tokens + 10_000 for p in random_samples(5, 120, seed=3)]

    def riding(step: int) -> list[int]:
        return [2 * step % 5, (2 * step + 1) % 5] if step != 4 else [3]

    pipeline = build(prompts=prompts, prompts_for_step=riding)
    plain = build()
    assert stream(pipeline) == stream(plain)
    for step, batch in enumerate(pipeline.iter()):
        chosen = riding(step)
        count = len(chosen)
        expected = [tuple(SAMPLES[i].tokens.tolist()) for i in pipeline.sample_ids(step)]
        expected += [tuple(prompts[i].tolist()) for i in chosen]
        assert sorted(unpack(batch)) == sorted(expected)
        assert sorted(learned_pairs(batch)) == sorted(learned_pairs(plain.batch(step)))
        assert batch["prompt_index"][:count].tolist() == chosen and len(batch["prompt_index"]) == 2
        assert batch["prompt_weights"].tolist() == [1.0] * count + [0.0] * (2 - count)
        last = batch["tokens"][batch["prompt_row"], batch["prompt_column"]][:count]
        assert last.tolist() == [prompts[i][-1] for i in chosen]
        assert (*batch["tokens"].shape, batch["targets"].shape[1]) in pipeline.shapes
    every = build(prompts=prompts, total_steps=2).batch(1)
    assert every["prompt_index"].tolist() == [0, 1, 2, 3, 4]


def test_samples_without_a_target_are_left_out_and_counted() -> None:
    nothing = Encoded(np.arange(5, dtype=np.int32), np.zeros(5, bool), truncated=True)
    samples = [nothing, *SAMPLES[:10], nothing, *SAMPLES[10:20]]
    pipeline = TrainPipeline.build(samples, 5, epochs=1, seed=0)
    assert sorted(stream(pipeline)) == [i for i in range(22) if i not in (0, 11)]
    report = pipeline.report()
    assert (report["samples"], report["dropped"], report["truncated"], report["steps"]) == (20, 2, 2, 4)


def test_report_counts_what_the_batches_hold() -> None:
    pipeline = build(prompts=[np.arange(1, 8)], prompts_for_step=lambda step: [0])
    batches = list(pipeline.iter())
    report = pipeline.report()
    real = np.mean([(b["segment_ids"] > 0).sum() for b in batches])
    assert report["tokens_per_step"] == pytest.approx(real)
    share = sum((b["segment_ids"] == 0).sum() for b in batches) / sum(b["tokens"].size for b in batches)
    assert report["padding_share"] == pytest.approx(share)
    weights = np.concatenate([b["target_weights"].ravel() for b in batches])
    assert report["target_padding_share"] == pytest.approx(1 - weights.mean())
    assert report["tokens_per_epoch"] == sum(len(s.tokens) for s in SAMPLES)
    assert report["targets_per_epoch"] == sum(int(s.loss_mask[1:].sum()) for s in SAMPLES)
    assert json.loads(json.dumps(report)) == report


def test_fingerprint_tells_streams_apart() -> None:
    other = [*SAMPLES[:-1], Encoded(SAMPLES[-1].tokens + 1, SAMPLES[-1].loss_mask)]
    mask = [*SAMPLES[:-1], Encoded(SAMPLES[-1].tokens, np.ones(len(SAMPLES[-1].tokens), bool))]
    streams = [
        build(), build(seed=2), build(batch_size=7), build(epochs=2), build(row_length=256),
        build(row_multiple=4), build(prompts=[np.arange(5)]), build(prompts=[np.arange(1, 6)]),
        TrainPipeline.build(other, 8, 3, 1), TrainPipeline.build(mask, 8, 3, 1),
    ]  # fmt: skip
    assert len({pipeline.fingerprint for pipeline in streams}) == len(streams)
    assert build().fingerprint == streams[0].fingerprint


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 200}, "less than one batch"),
        ({"row_length": 50}, "cannot hold a sample"),
        ({"seed": -1}, "seed is -1"),
        ({"total_steps": 0}, "steps is 0"),
    ],
)
def test_bad_settings(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        build(**changes)


def test_nothing_to_learn() -> None:
    nothing = Encoded(np.arange(5, dtype=np.int32), np.zeros(5, bool))
    with pytest.raises(InputError, match="none of 3 samples has an answer token to learn"):
        TrainPipeline.build([nothing] * 3, 2)
