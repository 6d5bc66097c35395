"""Packing, checked by taking the rows apart again and by searching all alternatives where there are few."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from safemoe_jax.data import packing
from safemoe_jax.data.chat import Encoded
from safemoe_jax.data.packing import Shape


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


@pytest.mark.parametrize(
    ("lengths", "capacity", "rows"),
    [
        ([4, 8, 1, 4, 2, 1], 10, [[1, 4], [0, 3, 2, 5]]),
        ([5, 5, 5], 10, [[0, 1], [2]]),
        ([3], 3, [[0]]),
    ],
)
def test_first_fit_decreasing_by_hand(lengths: list[int], capacity: int, rows: list[list[int]]) -> None:
    assert packing.first_fit_decreasing(lengths, capacity) == rows


def test_first_fit_decreasing_bounds() -> None:
    generator = np.random.default_rng(0)
    for _ in range(100):
        lengths = generator.integers(1, 101, 40).tolist()
        rows = packing.first_fit_decreasing(lengths, 100)
        assert sorted(itertools.chain(*rows)) == list(range(40))
        assert max(sum(lengths[i] for i in row) for row in rows) <= 100
        assert len(rows) <= 11 / 9 * _optimal_upper_bound(lengths, 100) + 1


def _optimal_upper_bound(lengths: list[int], capacity: int) -> int:
    """A number of rows that suffices: the best of many random orders, each into the tightest row."""
    generator = np.random.default_rng(1)
    best = len(lengths)
    for _ in range(20):
        room: list[int] = []
        for length in generator.permutation(lengths):
            fitting = [i for i, free in enumerate(room) if free >= length]
            if fitting:
                tightest = min(fitting, key=lambda i: room[i])
                room[tightest] -= length
            else:
                room.append(capacity - length)
        best = min(best, len(room))
    return best


@pytest.mark.parametrize("shape_margin", [(0, 0), (3, 5)])
def test_packed_rows_give_the_samples_back(shape_margin: tuple[int, int]) -> None:
    samples = random_samples(30, 40)
    items = [packing.item_of(sample) for sample in samples]
    rows = packing.first_fit_decreasing([len(item.tokens) for item in items], 64)
    targets = max(sum(len(items[i].target_columns) for i in row) for row in rows)
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


def test_planned_shapes_are_the_cheapest_of_all_groupings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_COMPILATION_TOKENS", 1000)
    generator = np.random.default_rng(0)
    for _ in range(30):
        needs = [(int(rows), int(generator.integers(1, 60))) for rows in generator.integers(3, 10, 25)]
        shapes = packing.plan_shapes(needs, 64, 2, first_steps=8, max_shapes=3)
        assert _cost(needs, shapes) == pytest.approx(_cheapest(needs, first_steps=8))
        assert all(packing.fitting_shape(shapes, *need) for need in needs)
        assert {packing.fitting_shape(shapes, *need) for need in needs[:8]} == set(shapes)
        assert all(shape.rows % 2 == 0 and shape.targets % 8 == 0 for shape in shapes)


def _cost(needs: list[tuple[int, int]], shapes: tuple[Shape, ...]) -> float:
    return sum(packing.step_cost(packing.fitting_shape(shapes, *need)) for need in needs) + 1000 * len(shapes)


def _cheapest(needs: list[tuple[int, int]], first_steps: int) -> float:
    """Tries every choice of up to three row counts out of those that occur."""
    row_counts = sorted({2 * math.ceil(rows / 2) for rows, _ in needs})
    best = math.inf
    for count in (1, 2, 3):
        for tops in itertools.combinations(row_counts, count):
            if tops[-1] != row_counts[-1]:
                continue
            shapes = tuple(
                Shape(top, 64, 8 * math.ceil(max(t for r, t in needs if r <= top) / 8)) for top in tops
            )
            used = {packing.fitting_shape(shapes, *need) for need in needs[:first_steps]}
            if used == set(shapes):
                best = min(best, _cost(needs, shapes))
    return best


def test_row_length_weighs_waste_against_attention() -> None:
    candidates = packing.row_length_candidates(35)
    assert candidates == [64, 128, 192, 256]
    # 35 samples of 35 tokens: rows of 64 hold one each, five rows of 256 hold seven each.
    assert packing.choose_row_length([([35] * 35, [4] * 35)], 1, candidates) == 256
    # Rows of 512 that are full already: nothing is to be gained by longer ones.
    assert packing.choose_row_length([([512] * 8, [4] * 8)], 1, packing.row_length_candidates(512)) == 512
    assert packing.row_length_candidates(500, limit=512) == [512]
    assert packing.row_length_candidates(500, limit=500) == [500]


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
