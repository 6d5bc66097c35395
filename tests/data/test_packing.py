"""Packing, checked by taking the rows apart again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from safemoe_jax.data import packing
from safemoe_jax.data.chat import Encoded
from safemoe_jax.data.shapes import Capacity, Shape, first_fit_decreasing


def random_samples(count: int, longest: int, seed: int = 0) -> list[Encoded]:
    """Samples whose tokens are all different, so that a token tells where it came from."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, longest + 1, count)
    ends = np.cumsum(lengths)
    samples = []
    for length, end in zip(lengths, ends, strict=True):
        mask = np.arange(length) >= generator.integers(1, length)
        samples.append(Encoded(np.arange(end - length, end, dtype=np.int32) + 1, mask))
    return samples


def unpack(batch: packing.Batch) -> list[tuple[int, ...]]:
    """The segments of a batch, from its arrays alone; checks that positions count within each."""
    found = []
    for tokens, segments, positions in zip(
        batch["tokens"], batch["segment_ids"], batch["positions"], strict=True
    ):
        for segment in range(1, segments.max(initial=0) + 1):
            where = np.flatnonzero(segments == segment)
            assert (np.diff(where) == 1).all() and (positions[where] == np.arange(len(where))).all()
            found.append(tuple(tokens[where].tolist()))
        assert (tokens[segments == 0] == 0).all() and (positions[segments == 0] == 0).all()
    return found


def learned_pairs(batch: packing.Batch) -> list[tuple[int, int]]:
    """(token before, token learned) of each target; checks that both lie in one segment."""
    pairs = []
    for row, target in zip(*np.nonzero(batch["target_weights"]), strict=True):
        column = batch["target_index"][row, target]
        before, after = batch["segment_ids"][row, column : column + 2]
        assert before == after > 0
        assert batch["tokens"][row, column + 1] == batch["targets"][row, target]
        pairs.append((int(batch["tokens"][row, column]), int(batch["targets"][row, target])))
    return pairs


@pytest.mark.parametrize("shape_margin", [(0, 0), (3, 5)])
def test_packed_rows_give_the_samples_back(shape_margin: tuple[int, int]) -> None:
    samples = random_samples(30, 40)
    items = [packing.item_of(sample) for sample in samples]
    counts = [len(item.target_columns) for item in items]
    rows = first_fit_decreasing([len(item.tokens) for item in items], counts, Capacity(64, 40))
    targets = max(sum(counts[i] for i in row) for row in rows)
    shape = Shape(len(rows) + shape_margin[0], 64, targets + shape_margin[1])
    batch, starts = packing.pack(items, rows, shape)
    assert batch["tokens"].shape == shape[:2] and batch["targets"].shape == (shape.rows, shape.targets)
    assert sorted(unpack(batch)) == sorted(tuple(sample.tokens.tolist()) for sample in samples)
    expected = [
        (int(sample.tokens[c - 1]), int(sample.tokens[c]))
        for sample in samples
        for c in range(1, len(sample.tokens))
        if sample.loss_mask[c]
    ]
    assert sorted(learned_pairs(batch)) == sorted(expected)
    for sample, (row, column) in zip(samples, starts, strict=True):
        assert batch["tokens"][row, column] == sample.tokens[0]
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32", "segment_ids": "int32", "positions": "int32",
        "target_index": "int32", "targets": "int32", "target_weights": "float32",
    }  # fmt: skip


def test_a_first_token_is_never_a_target() -> None:
    item = packing.item_of(Encoded(np.array([5, 6, 7], np.int32), np.array([True, True, False])))
    assert item.target_columns.tolist() == [0]


def test_prompts_alone() -> None:
    prompts = [sample.tokens for sample in random_samples(10, 30)]
    batch = packing.pack_prompts(prompts, [7, 2, 5], 64, rows=4, size=5)
    assert sorted(unpack(batch)) == sorted(tuple(prompts[i].tolist()) for i in (7, 2, 5))
    assert batch["tokens"].shape == (4, 64)
    assert batch["prompt_weights"].tolist() == [1, 1, 1, 0, 0]
    assert batch["prompt_index"][:3].tolist() == [7, 2, 5]
    for row, column, index in zip(
        *(batch[f"prompt_{n}"][:3] for n in ("row", "column", "index")), strict=True
    ):
        assert batch["tokens"][row, column] == prompts[index][-1]
    with pytest.raises(ValueError, match="do not fit"):
        packing.pack_prompts(prompts, range(10), 32, rows=1)


def test_prompt_batches_hold_every_prompt_once_in_two_shapes() -> None:
    prompts = [sample.tokens for sample in random_samples(100, 60)]
    batches = packing.prompt_batches(prompts, 32, row_multiple=2)
    shapes = [batch["tokens"].shape for batch in batches]
    assert shapes[0] == shapes[1] == shapes[2] and shapes[3][0] < shapes[0][0]
    assert all(rows % 2 == 0 for rows, _ in shapes)
    assert [len(batch["prompt_index"]) for batch in batches] == [32, 32, 32, 4]
    assert list(itertools.chain(*(batch["prompt_index"] for batch in batches))) == list(range(100))
    for batch in batches:
        last = batch["tokens"][batch["prompt_row"], batch["prompt_column"]]
        assert last.tolist() == [prompts[i][-1] for i in batch["prompt_index"]]


def test_rows_of_processes_make_up_the_batch() -> None:
    batch = packing.pack_prompts([sample.tokens for sample in random_samples(9, 30)], range(9), 32, rows=12)
    parts = [packing.process_rows(batch, index, 3) for index in range(3)]
    np.testing.assert_array_equal(np.concatenate([part["tokens"] for part in parts]), batch["tokens"])
    assert all((part["prompt_row"] == batch["prompt_row"]).all() for part in parts)
