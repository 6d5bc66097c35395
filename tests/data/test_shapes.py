"""Shapes planned from lengths, checked by searching all alternatives where there are few."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from safemoe_jax.data import shapes as planner
from safemoe_jax.data.shapes import Capacity, Shape


@pytest.mark.parametrize(
    ("lengths", "targets", "capacity", "rows"),
    [
        ([4, 8, 1, 4, 2, 1], [1] * 6, Capacity(10, 10), [[1, 4], [0, 3, 2, 5]]),
        ([5, 5, 5], [1] * 3, Capacity(10, 10), [[0, 1], [2]]),
        ([3], [2], Capacity(3, 1), [[0]]),
        ([4, 8, 1, 4, 2, 1], [1] * 6, Capacity(10, 2), [[1, 4], [0, 3], [2, 5]]),
        ([4, 4, 3, 3], [3, 3, 1, 1], Capacity(8, 4), [[0, 2], [1, 3]]),
    ],
)
def test_first_fit_decreasing_by_hand(
    lengths: list[int], targets: list[int], capacity: Capacity, rows: list[list[int]]
) -> None:
    assert planner.first_fit_decreasing(lengths, targets, capacity) == rows


def test_first_fit_decreasing_bounds() -> None:
    generator = np.random.default_rng(0)
    for _ in range(100):
        lengths = generator.integers(1, 101, 40).tolist()
        rows = planner.first_fit_decreasing(lengths, [0] * 40, Capacity(100, 0))
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


def test_planned_shapes_are_the_cheapest_of_all_groupings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_COMPILATION_TOKENS", 1000)
    generator = np.random.default_rng(0)
    for _ in range(30):
        needs = [(int(rows), int(generator.integers(1, 60))) for rows in generator.integers(3, 10, 25)]
        shapes = planner.plan_shapes(needs, 64, 2, first_steps=8, max_shapes=3)
        assert _cost(needs, shapes) == pytest.approx(_cheapest(needs, first_steps=8))
        assert all(planner.fitting_shape(shapes, *need) for need in needs)
        assert {planner.fitting_shape(shapes, *need) for need in needs[:8]} == set(shapes)
        assert all(shape.rows % 2 == 0 and shape.targets % 8 == 0 for shape in shapes)


def _cost(needs: list[tuple[int, int]], shapes: tuple[Shape, ...]) -> float:
    return sum(planner.step_cost(planner.fitting_shape(shapes, *need)) for need in needs) + 1000 * len(shapes)


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
            used = {planner.fitting_shape(shapes, *need) for need in needs[:first_steps]}
            if used == set(shapes):
                best = min(best, _cost(needs, shapes))
    return best


def test_row_length_weighs_waste_against_attention() -> None:
    candidates = planner.row_length_candidates(35)
    assert candidates == [64, 128, 192, 256]
    # 35 samples of 35 tokens: rows of 64 hold one each, five rows of 256 hold seven each.
    assert planner.choose_capacity([([35] * 35, [4] * 35)], 1, candidates).tokens == 256
    # Rows of 512 that are full already: nothing is to be gained by longer ones.
    full = [([512] * 8, [4] * 8)]
    assert planner.choose_capacity(full, 1, planner.row_length_candidates(512)).tokens == 512
    assert planner.row_length_candidates(500) == list(range(512, 1025, 64))


def test_targets_are_spread_where_one_row_would_set_their_number_for_all() -> None:
    # Twelve rows have room for one of the short samples each; the first row alone would take seven of them.
    step = [300] * 12 + [30] * 12, [20] * 12 + [29] * 12
    assert planner.rows_and_targets(step, Capacity(512, 512)) == (12, 20 + 7 * 29)
    rows, most = planner.rows_and_targets(step, planner.choose_capacity([step], 1, [512]))
    assert rows == 12 and most <= 20 + 3 * 29
    # The limit also stands for steps that were not looked at: full rows of 120 targets, and then one of 400.
    seen = [128] * 32, [30] * 32
    capacity = planner.choose_capacity([seen], 1, [512])
    assert planner.rows_and_targets(seen, capacity) == (8, 120)
    assert planner.rows_and_targets(([64] * 8, [50] * 8), capacity)[1] <= 2 * 120
