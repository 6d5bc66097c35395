"""The stream of training batches: shuffled, repeated, packed, the same for every run of a configuration.

Built on grain: sample numbers -> shuffle (another order each epoch) -> repeat -> batch -> pack. Up to the
    packing
everything is random access, so the state of the stream is one number, the step, and a run can resume at any
step.
The order of all steps is read once at the start; from it come the shapes (`data/shapes.py`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import grain
import numpy as np
from grain.experimental import set_next_index

from safemoe_jax.data.chat import Encoded
from safemoe_jax.data.packing import Batch, Item, item_of, pack, prompt_item, prompt_places
from safemoe_jax.data.shapes import (
    Capacity,
    Lengths,
    Shape,
    choose_capacity,
    first_fit_decreasing,
    fitting_shape,
    plan_shapes,
    row_length_candidates,
    rows_and_targets,
)
from safemoe_jax.errors import InputError

_PROBED_SAMPLES = 4096  # in the steps looked at to choose the capacity of rows
_PREFETCHED_BATCHES = 4
_LAYOUT_VERSION = 1  # part of the fingerprint: raise it when the same samples would be packed differently


@dataclass(frozen=True, eq=False)
class TrainPipeline:
    """Batches of a run. Make it with `build`.

    Attributes:
        items: the samples that have something to learn, in the order given.
        item_ids: their numbers in the list given to `build`, int32 [items].
        order: which items each step holds, int32 [total_steps, batch_size].
        prompts: prompts that ride in the task batches, int32 [n] each.
        prompt_order: which prompts each step holds.
        batch_size: samples an optimizer step.
        seed: of the order.
        capacity: what a row has room for: its length T, and a number of targets.
        shapes: the planned (N, T, M), at most four.
        needs: (rows, largest number of targets in a row) of each step.
        truncated, untrained_turns: counts over the samples given.
        dropped: samples given that have nothing to learn, their prompt alone filling `max_length`.
    """

    items: list[Item]
    item_ids: np.ndarray
    order: np.ndarray
    prompts: list[np.ndarray]
    prompt_order: list[list[int]]
    batch_size: int
    seed: int
    capacity: Capacity
    shapes: tuple[Shape, ...]
    needs: list[tuple[int, int]]
    truncated: int
    untrained_turns: int
    dropped: int

    @staticmethod
    def build(
        encoded_samples: Sequence[Encoded],
        batch_size: int,
        epochs: float = 1,
        seed: int = 0,
        row_multiple: int = 1,
        *,
        total_steps: int | None = None,
        row_length: int | None = None,
        prompts: Sequence[np.ndarray] | None = None,
        prompts_for_step: Callable[[int], Sequence[int]] | None = None,
    ) -> TrainPipeline:
        """Plans a run.

        Args:
            encoded_samples: the samples of one epoch.
            batch_size: samples an optimizer step, exactly.
            epochs: passes over the samples; the run has the whole steps in them. May be a fraction.
            seed: of the order, 0 .. 2^32 - 1.
            row_multiple: rows of every batch are a multiple of this (data x fsdp x accumulation).
            total_steps: number of steps instead of `epochs`.
            row_length: T; None for the one at which the run costs least, see `shapes.choose_capacity`. A row
                holds several samples and may be longer than any; `encode_samples` has cut each to its length.
            prompts: prompts for a loss term, int32 [n] each; they are packed into the task batches.
            prompts_for_step: which prompts a step holds; None for all of them in every step.

        Raises:
            InputError: nothing to learn in any sample, less than one batch, a sample longer than a row.
        """
        kept = [number for number, encoded in enumerate(encoded_samples) if encoded.loss_mask[1:].any()]
        items = [item_of(encoded_samples[number]) for number in kept]
        steps = _total_steps(len(items), len(encoded_samples), batch_size, epochs, total_steps)
        order = _order(len(items), batch_size, steps, seed)
        prompts = [np.asarray(prompt, np.int32) for prompt in prompts or ()]
        ride = prompts_for_step or (lambda step: range(len(prompts)))
        prompt_order = [list(ride(step)) if prompts else [] for step in range(steps)]

        sizes = _Sizes(items, order, prompts, prompt_order)
        capacity = _capacity(sizes, row_multiple, row_length)
        needs = [rows_and_targets(sizes.of(step), capacity) for step in range(steps)]
        first_epoch = max(1, len(items) // batch_size)
        return TrainPipeline(
            items=items, item_ids=np.asarray(kept, np.int32), order=order,
            prompts=prompts, prompt_order=prompt_order,
            batch_size=batch_size, seed=seed, capacity=capacity, needs=needs,
            shapes=plan_shapes(needs, capacity.tokens, row_multiple, first_steps=first_epoch),
            truncated=sum(encoded.truncated for encoded in encoded_samples),
            untrained_turns=sum(encoded.untrained_turns for encoded in encoded_samples),
            dropped=len(encoded_samples) - len(items),
        )  # fmt: skip

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return len(self.order)

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in an epoch, at least 1. A step may reach over the end of an epoch."""
        return max(1, len(self.items) // self.batch_size)

    def sample_ids(self, step: int) -> list[int]:
        """The samples of a step, as numbers in the list given to `build`."""
        return self.item_ids[self.order[step]].tolist()

    def batch(self, step: int) -> Batch:
        """The batch of a step: `packing.pack`, and with prompts `packing.prompt_places`."""
        chosen = self.prompt_order[step]
        items = [self.items[i] for i in self.order[step]] + [prompt_item(self.prompts[i]) for i in chosen]
        lengths, targets = [len(item.tokens) for item in items], [len(item.target_columns) for item in items]
        rows = first_fit_decreasing(lengths, targets, self.capacity)
        batch, starts = pack(items, rows, fitting_shape(self.shapes, *self.needs[step]))
        if not self.prompts:
            return batch
        riding = [self.prompts[i] for i in chosen]
        size = max(map(len, self.prompt_order))
        return batch | prompt_places(riding, starts[self.batch_size :], chosen, size)

    def iter(self, start: int = 0) -> grain.DatasetIterator:
        """The batches from a step on, as a grain iterator.

        Its `get_state` and `set_state` hold the step, also for iterators made with another `start`. Packing
        runs in a thread ahead of training. Every process sees the global batch; `packing.process_rows` takes
        one process's rows.
        """
        steps = grain.MapDataset.range(self.total_steps).map(self.batch)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES)
        iterator = iter(steps.to_iter_dataset(options))
        set_next_index(iterator, start)
        return iterator

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides the stream: an iterator's state is only valid for the same one."""
        digest = hashlib.sha256(repr((_LAYOUT_VERSION, self.shapes, self.prompt_order)).encode())
        for array in (self.order, self.item_ids, *(a for item in self.items for a in item), *self.prompts):
            digest.update(len(array).to_bytes(8, "little") + array.tobytes())
        return digest.hexdigest()

    def report(self) -> dict[str, Any]:
        """Counts for the log: samples, truncated, dropped, steps, tokens an epoch, padding share, shapes."""
        tokens = np.array([len(item.tokens) for item in self.items])
        targets = np.array([len(item.target_columns) for item in self.items])
        padded = [fitting_shape(self.shapes, *need) for need in self.needs]
        riding = sum(len(self.prompts[i]) for step in self.prompt_order for i in step)
        real = int(tokens[self.order].sum()) + riding
        real_targets = int(targets[self.order].sum())
        return {
            "samples": len(self.items),
            "truncated": self.truncated,
            "dropped": self.dropped,
            "untrained_turns": self.untrained_turns,
            "steps": self.total_steps,
            "steps_per_epoch": self.steps_per_epoch,
            "tokens_per_epoch": int(tokens.sum()),
            "targets_per_epoch": int(targets.sum()),
            "tokens_per_step": real / self.total_steps,
            "padding_share": 1 - real / sum(shape.rows * shape.length for shape in padded),
            "target_padding_share": 1 - real_targets / sum(shape.rows * shape.targets for shape in padded),
            "shapes": [shape._asdict() for shape in self.shapes],
        }


@dataclass(frozen=True, eq=False)
class _Sizes:
    """Lengths and target counts of the items of each step, prompts behind the samples."""

    items: list[Item]
    order: np.ndarray
    prompts: list[np.ndarray]
    prompt_order: list[list[int]]

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.array([len(item.tokens) for item in self.items])

    @cached_property
    def targets(self) -> np.ndarray:
        return np.array([len(item.target_columns) for item in self.items])

    @cached_property
    def longest(self) -> int:
        riding = [len(self.prompts[i]) for i in {i for step in self.prompt_order for i in step}]
        return max([int(self.lengths.max()), *riding])

    def of(self, step: int) -> Lengths:
        chosen = self.order[step]
        riding = [len(self.prompts[i]) for i in self.prompt_order[step]]
        return self.lengths[chosen].tolist() + riding, self.targets[chosen].tolist() + [0] * len(riding)


def _total_steps(items: int, given: int, batch_size: int, epochs: float, total_steps: int | None) -> int:
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}", where="batch_size", expected="1 or more")
    if not items:
        raise InputError(
            f"none of {given} samples has an answer token to learn",
            where="data",
            expected="samples with answers, and a max_length above the length of their prompts",
        )
    if total_steps is not None and total_steps < 1:
        raise InputError(
            f"steps is {total_steps}", where="steps", expected="1 or more, or none for whole epochs"
        )
    steps = int(epochs * items) // batch_size if total_steps is None else total_steps
    if steps < 1:
        raise InputError(
            f"{items} samples x {epochs:g} epochs are less than one batch of {batch_size}",
            where="batch_size, epochs",
            expected=f"batch_size at most {int(epochs * items)}, or more epochs or samples",
        )
    return steps


def _order(items: int, batch_size: int, steps: int, seed: int) -> np.ndarray:
    """Which items each step holds, int32 [steps, batch_size]; grain's shuffle reorders every epoch."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}", where="seed", expected="0 .. 4294967295")
    epochs = math.ceil(steps * batch_size / items)
    stream = grain.MapDataset.range(items).seed(seed).shuffle().repeat(epochs)
    numbers = np.fromiter((stream[i] for i in range(steps * batch_size)), np.int32, steps * batch_size)
    return numbers.reshape(steps, batch_size)


def _capacity(sizes: _Sizes, row_multiple: int, row_length: int | None) -> Capacity:
    if row_length is not None and row_length < sizes.longest:
        raise InputError(
            f"a row of {row_length} tokens cannot hold a sample of {sizes.longest}",
            where="row_length",
            expected=f"{sizes.longest} or more",
        )
    candidates = row_length_candidates(sizes.longest) if row_length is None else [row_length]
    total = len(sizes.order)
    probes = min(total, max(4, _PROBED_SAMPLES // sizes.order.shape[1]))
    probed = np.unique(np.linspace(0, total - 1, probes).astype(int))
    return choose_capacity([sizes.of(step) for step in probed], row_multiple, candidates)
