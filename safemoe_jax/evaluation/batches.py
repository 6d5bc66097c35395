"""Prompts of many lengths in few shapes: sorted by length, padded on the right to a bucket.

Each shape costs a compilation, each padded token costs computation; buckets a third to a half apart keep
both small.

Shapes: S prompts, B rows, T row length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from safemoe_jax.errors import InputError

SMALLEST_LENGTH = 16
ROW_MULTIPLE = 8


class PromptBatch(NamedTuple):
    """Prompts of one shape. Rows beyond the real ones hold a single token and no prompt.

    index: which prompts these are, int ``[n]`` with n <= B.
    tokens: int32 ``[B, T]``, right-padded. mask: int32 ``[B, T]``, 1 for prompt tokens.
    """

    index: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray


def length_bucket(length: int) -> int:
    """The row length for prompts of this many tokens: 16, 32, 64, 96, 128, 192, 256, 384, ..."""
    bucket = SMALLEST_LENGTH
    while bucket < length:
        bucket *= 2
    three_quarters = bucket * 3 // 4
    return three_quarters if bucket > 64 and length <= three_quarters else bucket


def batch_prompts(prompts: Sequence[np.ndarray], batch_size: int, multiple: int = 1) -> list[PromptBatch]:
    """Cuts prompts, sorted by length, into batches of nearly equal size.

    Args:
        prompts: int32 token ids of each prompt.
        batch_size: most prompts in a batch.
        multiple: the number of rows is divisible by this (devices that share the rows).

    Raises:
        InputError: no prompt, an empty one, or a batch size below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}", where="batch_size", expected="at least 1")
    if not prompts:
        raise InputError("there are no prompts", where="prompts", expected="at least one prompt")
    lengths = np.array([len(prompt) for prompt in prompts])
    if lengths.min() < 1:
        raise InputError(
            "a prompt is empty", where=f"prompt {lengths.argmin()}", expected="at least one token"
        )
    n_batches = -(-len(prompts) // batch_size)
    per_batch = -(-len(prompts) // n_batches)
    rows = _rounded_up(per_batch, ROW_MULTIPLE) if per_batch > ROW_MULTIPLE else per_batch
    rows = _rounded_up(min(rows, batch_size), multiple)
    # Longest first: whoever watches sees the worst of the time and memory at once.
    order = np.argsort(-lengths, kind="stable")
    chunks = [order[start : start + per_batch] for start in range(0, len(prompts), per_batch)]
    return [_pad(prompts, index, rows, length_bucket(lengths[index].max())) for index in chunks]


def _pad(prompts: Sequence[np.ndarray], index: np.ndarray, rows: int, length: int) -> PromptBatch:
    tokens, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    mask[:, 0] = 1
    for row, prompt in enumerate(index):
        n = len(prompts[prompt])
        tokens[row, :n], mask[row, :n] = prompts[prompt], 1
    return PromptBatch(index, tokens, mask)


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
