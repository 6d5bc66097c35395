"""Which shapes the steps of a run have, planned from lengths alone. Pure functions on numbers.

Every new shape costs a compilation, so all steps share at most four (N rows, T row length, M targets per
row).

Row length T. Attention costs T^2 a row, packing waste falls with T: rows of 64 hold one sample of 35 tokens
(45 % waste), rows of 256 hold seven (4 %). Targets M. A row may fill up with many short samples, and its
number of targets sets M for all rows; so a row has room for a limited number of targets too.
`choose_capacity` tries both, `step_cost` weighs them.

Shapes: N rows, T row length, M targets per row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

ROW_MULTIPLE_OF_TOKENS = 64
TARGET_MULTIPLE = 8
MAX_SHAPES = 4
_TARGET_ROOMS = (1.25, 1.5, 2.0)  # tried: times the mean number of targets in a full row
# At this row length the attention scores of a layer cost as much as its matrix products, for a narrow model
# (width 512, eight active experts of width 256); wide models get there later, so rows come out rather too
# short than too long.
_ATTENTION_PARITY = 4096
# A target costs one row of the vocabulary projection, 1/8 of a token's way through the layers in the same
# model.
_TARGET_COST = 1 / 8
# A further shape must save at least what compiling it costs: about as much as so many tokens (a tiny model on
# a CPU compiles for 5 s and takes some 10,000 tokens/s; larger models compile longer and take fewer).
_COMPILATION_TOKENS = 32_768


Lengths = tuple[Sequence[int], Sequence[int]]  # token and target counts of the items of a step


class Shape(NamedTuple):
    """Sizes of one compiled step."""

    rows: int
    length: int
    targets: int


class Capacity(NamedTuple):
    """What a row has room for."""

    tokens: int
    targets: int


def round_up(value: float, multiple: int) -> int:
    """The smallest multiple that is not below the value."""
    return int(-(-value // multiple)) * multiple


def first_fit_decreasing(
    lengths: Sequence[int], targets: Sequence[int], capacity: Capacity
) -> list[list[int]]:
    """Packs items into rows: the longest first, each into the first row with room for its tokens and targets.

    With room for all targets it takes at most 11/9 of the optimal number of rows, plus one (Dosa 2007). Ties
    keep their order, so the result is determined.

    Returns:
        The numbers of the items in each row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length, learned = lengths[item], targets[item]
        for row, (tokens_left, targets_left) in enumerate(room):
            if length <= tokens_left and learned <= targets_left:
                rows[row].append(item)
                room[row] = tokens_left - length, targets_left - learned
                break
        else:
            rows.append([item])
            room.append((capacity.tokens - length, capacity.targets - learned))
    return rows


def rows_and_targets(step: Lengths, capacity: Capacity) -> tuple[int, int]:
    """What a step needs: its number of rows, and the largest number of targets in one of them."""
    rows = first_fit_decreasing(*step, capacity)
    return len(rows), max(sum(step[1][i] for i in row) for row in rows)


def step_cost(shape: Shape) -> float:
    """Cost of a step in tokens: the rows' tokens, their attention, their targets."""
    per_row = shape.length * (1 + shape.length / _ATTENTION_PARITY) + _TARGET_COST * shape.targets
    return shape.rows * per_row


def choose_capacity(steps: Sequence[Lengths], row_multiple: int, row_lengths: Sequence[int]) -> Capacity:
    """The capacity of rows at which the given steps cost least, if all had the number of targets of the
    fullest row.

    Args:
        steps: a few steps of the run.
        row_multiple: the number of rows is a multiple of this.
        row_lengths: row lengths to try, none below the longest item.
    """

    def cost(capacity: Capacity) -> float:
        rows, targets = zip(*(rows_and_targets(step, capacity) for step in steps), strict=True)
        return sum(step_cost(_shape(n, capacity.tokens, max(targets), row_multiple)) for n in rows)

    return min(itertools.chain(*(_capacities(steps, length) for length in row_lengths)), key=cost)


def _capacities(steps: Sequence[Lengths], length: int) -> list[Capacity]:
    """Rows of one length: with room for some more targets than the mean, and for every target.

    Equal costs go to the first, so a limit stands even if none of the few steps reaches it: another may.
    """
    most = max(max(targets) for _, targets in steps)
    mean = length * sum(sum(targets) for _, targets in steps) / sum(sum(lengths) for lengths, _ in steps)
    limited = {
        max(round_up(room * mean, TARGET_MULTIPLE), round_up(most, TARGET_MULTIPLE)) for room in _TARGET_ROOMS
    }
    return [
        Capacity(length, targets) for targets in (*sorted(limited, reverse=True), length) if targets <= length
    ]


def row_length_candidates(longest: int) -> list[int]:
    """Multiples of 64 from the longest item to twice that (at least 256)."""
    first = round_up(longest, ROW_MULTIPLE_OF_TOKENS)
    return list(range(first, max(2 * first, 256) + 1, ROW_MULTIPLE_OF_TOKENS))


def plan_shapes(
    needs: Sequence[tuple[int, int]],
    length: int,
    row_multiple: int,
    *,
    first_steps: int | None = None,
    max_shapes: int = MAX_SHAPES,
) -> tuple[Shape, ...]:
    """Chooses the shapes of a run: each step takes the first shape that holds it.

    Steps are grouped by their number of rows; a group's shape is its largest member. The grouping is the
    cheapest one (dynamic programming over the distinct numbers of rows) where a shape costs its compilation.
    Every shape occurs among the first steps, so that nothing is compiled later.

    Args:
        needs: rows and targets per row of every step.
        length: the row length.
        row_multiple: the number of rows is a multiple of this.
        first_steps: the steps among which every shape must occur; None for all.
        max_shapes: the largest number of shapes.

    Returns:
        Shapes, growing in rows and in targets.
    """
    groups = _by_rows(needs, row_multiple, len(needs) if first_steps is None else first_steps)
    # best[k][j]: cost and cuts of the first j groups in k shapes.
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, ())}
    for k in range(1, max_shapes + 1):
        for j in range(1, len(groups) + 1):
            options = [
                (
                    best[k - 1, i][0] + _group_cost(groups, i, j, length) + _COMPILATION_TOKENS,
                    (*best[k - 1, i][1], j),
                )
                for i in range(j)
                if (k - 1, i) in best and any(group.early for group in groups[i:j])
            ]
            if options:
                best[k, j] = min(options)
    _, cuts = min(best[k, len(groups)] for k in range(1, max_shapes + 1) if (k, len(groups)) in best)
    return tuple(_group_shape(groups, cut, length) for cut in cuts)


class _Group(NamedTuple):
    rows: int
    targets: int
    count: int
    early: bool


def _by_rows(needs: Sequence[tuple[int, int]], row_multiple: int, first_steps: int) -> list[_Group]:
    groups: dict[int, _Group] = {}
    for step, (rows, targets) in enumerate(needs):
        rows = round_up(rows, row_multiple)
        old = groups.get(rows, _Group(rows, 0, 0, False))
        groups[rows] = _Group(rows, max(old.targets, targets), old.count + 1, old.early or step < first_steps)
    return [groups[rows] for rows in sorted(groups)]


def _shape(rows: int, length: int, targets: int, row_multiple: int) -> Shape:
    return Shape(round_up(rows, row_multiple), length, round_up(max(targets, 1), TARGET_MULTIPLE))


def _group_shape(groups: list[_Group], end: int, length: int) -> Shape:
    """Rows of the last group, targets of all up to it: shapes grow in both, so the first fit is right."""
    return _shape(groups[end - 1].rows, length, max(group.targets for group in groups[:end]), 1)


def _group_cost(groups: list[_Group], start: int, end: int, length: int) -> float:
    return sum(group.count for group in groups[start:end]) * step_cost(_group_shape(groups, end, length))


def fitting_shape(shapes: Sequence[Shape], rows: int, targets: int) -> Shape:
    """The first planned shape that holds a step."""
    return next(shape for shape in shapes if rows <= shape.rows and targets <= shape.targets)
