"""Several samples in one row of a batch. Pure functions on numpy arrays; which rows and shapes:
`data/shapes.py`.

Padding every sample to the longest wastes most of a batch. Samples share a row instead, kept apart by segment
ids (attention) and positions (from 0 in every segment).

Shapes: N rows, T row length, M targets per row, S prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from safemoe_jax.data.chat import Encoded
from safemoe_jax.data.shapes import (
    Capacity,
    Shape,
    first_fit_decreasing,
    round_up,
    row_length_candidates,
    step_cost,
)

Batch = dict[str, np.ndarray]


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
    packed = _prompt_rows(lengths, row_length)
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
        needs = [round_up(len(_prompt_rows(batch, length)), row_multiple) for batch in lengths]
        full = [len(batch) == len(lengths[0]) for batch in lengths]
        largest = max(need for need, whole in zip(needs, full, strict=True) if whole)
        return [largest if whole else need for need, whole in zip(needs, full, strict=True)]

    best = min(candidates, key=lambda length: sum(step_cost(Shape(n, length, 0)) for n in rows(length)))
    return [pack_prompts(prompts, batch, best, n) for batch, n in zip(numbers, rows(best), strict=True)]


def _prompt_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    return first_fit_decreasing(lengths, [0] * len(lengths), Capacity(row_length, 0))


def process_rows(batch: Batch, index: int, count: int) -> Batch:
    """One process's part of a global batch: its block of the rows; the arrays over prompts stay whole.

    The hook for runs of several hosts. Every process packs the same global batch (cheap, and no process has
    to know another's samples) and hands only its own rows to its devices. `row_multiple` must be a multiple
    of `count`.
    """
    size = len(batch["tokens"]) // count
    mine = slice(index * size, (index + 1) * size)
    return {name: value if name.startswith("prompt_") else value[mine] for name, value in batch.items()}
