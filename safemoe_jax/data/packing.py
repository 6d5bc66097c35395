"""Several samples in one row, and the few shapes that all steps of a run fit. Pure functions on numpy arrays.

Why: padding every sample to the longest wastes most of a batch, and every new shape costs a compilation.
Samples share a row, kept apart by segment ids (attention) and positions (from 0 in every segment). Every step
of a run has one of at most four shapes, planned from the lengths before the first step.

Row length T. Attention costs T^2 a row, packing waste falls with T: rows of 64 hold one sample of 35 tokens
(45 % waste), rows of 256 hold seven (4 %). `choose_row_length` weighs both; see `step_cost`.

Shapes: N rows, T row length, M targets per row, S prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from safemoe_jax.data.chat import Encoded

Batch = dict[str, np.ndarray]

ROW_MULTIPLE_OF_TOKENS = 64
TARGET_MULTIPLE = 8
MAX_SHAPES = 4
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


class Shape(NamedTuple):
    """Sizes of one compiled step."""

    rows: int
    length: int
    targets: int


class Item(NamedTuple):
    """What is packed: tokens int32 [n], and the columns whose next token is learned, int32 [m]."""

    tokens: np.ndarray
    target_columns: np.ndarray


def item_of(encoded: Encoded) -> Item:
    """A sample's item. The token in column c is learned at column c - 1; a first token cannot be learned."""
    return Item(encoded.tokens, np.flatnonzero(encoded.loss_mask[1:]).astype(np.int32))


def prompt_item(tokens: np.ndarray) -> Item:
    """A prompt's item: nothing to learn."""
    return Item(np.asarray(tokens, np.int32), np.zeros(0, np.int32))


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs lengths into rows: the longest first, each into the first row with room.

    At most 11/9 of the optimal number of rows, plus one (Dosa 2007). Ties keep their order, so the result is
    determined.

    Returns:
        The numbers of the items in each row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        for row, free in enumerate(room):
            if length <= free:
                rows[row].append(item)
                room[row] -= length
                break
        else:
            rows.append([item])
            room.append(capacity - length)
    return rows


def rows_and_targets(lengths: Sequence[int], targets: Sequence[int], capacity: int) -> tuple[int, int]:
    """What a step needs: its number of rows, and the largest number of targets in one of them."""
    rows = first_fit_decreasing(lengths, capacity)
    return len(rows), max(sum(targets[i] for i in row) for row in rows)


def step_cost(shape: Shape) -> float:
    """Cost of a step in tokens: the rows' tokens, their attention, their targets."""
    per_row = shape.length * (1 + shape.length / _ATTENTION_PARITY) + _TARGET_COST * shape.targets
    return shape.rows * per_row


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below the value."""
    return -(-value // multiple) * multiple


def choose_row_length(
    steps: Sequence[tuple[Sequence[int], Sequence[int]]], row_multiple: int, candidates: Sequence[int]
) -> int:
    """The row length at which the given steps cost least.

    Args:
        steps: lengths and target counts of the items, for a few steps.
        row_multiple: the number of rows is a multiple of this.
        candidates: row lengths, none below the longest item.
    """

    def cost(length: int) -> float:
        needs = [rows_and_targets(*step, length) for step in steps]
        return sum(step_cost(_shape(rows, length, targets, row_multiple)) for rows, targets in needs)

    return min(candidates, key=cost)


def row_length_candidates(longest: int, limit: int | None = None) -> list[int]:
    """Multiples of 64 from the longest item to twice that (at least 256), none above the limit."""
    first = round_up(longest, ROW_MULTIPLE_OF_TOKENS)
    last = max(2 * first, 256) if limit is None else min(max(2 * first, 256), limit)
    return list(range(first, last + 1, ROW_MULTIPLE_OF_TOKENS)) or [max(longest, last)]


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


def pack(items: Sequence[Item], rows: Sequence[Sequence[int]], shape: Shape) -> tuple[Batch, np.ndarray]:
    """Lays items out in rows.

    Args:
        items: samples and prompts.
        rows: the numbers of the items in each row, at most `shape.rows` rows.
        shape: N, T, M.

    Returns:
        The batch, and the (row, column) at which each item begins, int32 [items, 2]. The batch:
        tokens, segment_ids (1.. in each row; 0 is padding), positions: int32 [N, T];
        target_index: int32 [N, M], columns whose next token is learned; targets: int32 [N, M], that token;
        target_weights: float32 [N, M], 1 for a target and 0 for padding.
    """
    n, t, m = shape
    batch = {name: np.zeros((n, t), np.int32) for name in ("tokens", "segment_ids", "positions")}
    batch |= {name: np.zeros((n, m), np.int32) for name in ("target_index", "targets")}
    batch["target_weights"] = np.zeros((n, m), np.float32)
    starts = np.zeros((len(items), 2), np.int32)
    for row, members in enumerate(rows):
        column = target = 0
        for segment, number in enumerate(members, start=1):
            tokens, targets = items[number]
            here, there = slice(column, column + len(tokens)), slice(target, target + len(targets))
            batch["tokens"][row, here] = tokens
            batch["segment_ids"][row, here] = segment
            batch["positions"][row, here] = np.arange(len(tokens))
            batch["target_index"][row, there] = column + targets
            batch["targets"][row, there] = tokens[targets + 1]
            batch["target_weights"][row, there] = 1
            starts[number] = row, column
            column, target = here.stop, there.stop
    return batch, starts


def prompt_places(prompts: Sequence[np.ndarray], starts: np.ndarray, ids: Sequence[int], size: int) -> Batch:
    """Where the last tokens of packed prompts stand.

    Args:
        prompts: the packed prompts.
        starts: the (row, column) at which each begins, int32 [len(prompts), 2].
        ids: their numbers in the prompt set.
        size: S; missing prompts are padding of weight 0.

    Returns:
        prompt_row, prompt_column (of the last token), prompt_index: int32 [S]; prompt_weights: float32 [S].
    """
    count = len(prompts)
    places = {name: np.zeros(size, np.int32) for name in ("prompt_row", "prompt_column", "prompt_index")}
    places["prompt_row"][:count] = starts[:, 0]
    places["prompt_column"][:count] = starts[:, 1] + [len(prompt) - 1 for prompt in prompts]
    places["prompt_index"][:count] = ids
    return places | {"prompt_weights": np.repeat(np.float32([1, 0]), [count, size - count])}


def pack_prompts(
    prompts: Sequence[np.ndarray],
    indices: Sequence[int],
    row_length: int,
    rows: int | None = None,
    size: int | None = None,
) -> Batch:
    """A batch of prompts alone.

    Args:
        prompts: the whole prompt set, int32 [n] each.
        indices: which of them.
        row_length: T, not below the longest.
        rows: N; None for as many as it takes.
        size: S; None for `len(indices)`.

    Returns:
        tokens, segment_ids, positions [N, T], and `prompt_places`.

    Raises:
        ValueError: a prompt longer than a row, or more rows needed than given.
    """
    chosen = [np.asarray(prompts[i], np.int32) for i in indices]
    lengths = [len(prompt) for prompt in chosen]
    packed = first_fit_decreasing(lengths, row_length)
    if max(lengths) > row_length or (rows is not None and len(packed) > rows):
        raise ValueError(
            f"{len(packed)} rows of {max(lengths)} tokens do not fit {rows} rows of {row_length}"
        )
    shape = Shape(len(packed) if rows is None else rows, row_length, 0)
    batch, starts = pack([prompt_item(prompt) for prompt in chosen], packed, shape)
    kept = {name: batch[name] for name in ("tokens", "segment_ids", "positions")}
    return kept | prompt_places(chosen, starts, indices, len(chosen) if size is None else size)


def prompt_batches(
    prompts: Sequence[np.ndarray], batch_size: int, *, row_multiple: int = 1, row_length: int | None = None
) -> list[Batch]:
    """A whole prompt set in order, `batch_size` a batch, in at most two shapes: the full batches' and the
    last one's.

    Args:
        prompts: int32 [n] each.
        batch_size: prompts a batch (S); the last batch may hold fewer, as in the published pass over D_h.
        row_multiple: the number of rows is a multiple of this.
        row_length: T; None for the one at which the pass costs least.
    """
    numbers = [list(range(i, min(i + batch_size, len(prompts)))) for i in range(0, len(prompts), batch_size)]
    lengths = [[len(prompts[i]) for i in batch] for batch in numbers]
    candidates = row_length_candidates(max(map(max, lengths))) if row_length is None else [row_length]

    def rows(length: int) -> list[int]:
        needs = [round_up(len(first_fit_decreasing(batch, length)), row_multiple) for batch in lengths]
        full = [len(batch) == len(lengths[0]) for batch in lengths]
        largest = max(need for need, whole in zip(needs, full, strict=True) if whole)
        return [largest if whole else need for need, whole in zip(needs, full, strict=True)]

    best = min(candidates, key=lambda length: sum(step_cost(Shape(n, length, 0)) for n in rows(length)))
    return [pack_prompts(prompts, batch, best, n) for batch, n in zip(numbers, rows(best), strict=True)]


def process_rows(batch: Batch, index: int, count: int) -> Batch:
    """One process's part of a global batch: its block of the rows; the arrays over prompts stay whole.

    The hook for runs of several hosts. Every process packs the same global batch (cheap, and no process has
    to know another's samples) and hands only its own rows to its devices. `row_multiple` must be a multiple
    of `count`.
    """
    size = len(batch["tokens"]) // count
    mine = slice(index * size, (index + 1) * size)
    return {name: value if name.startswith("prompt_") else value[mine] for name, value in batch.items()}
