"""What a run reads (weights, references, data): fingerprints that tell whether it is still the same, and
whether the model knows its tokens."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from safemoe_jax.checkpoints.json_files import read_if_there
from safemoe_jax.checkpoints.reference import Reference
from safemoe_jax.errors import InputError
from safemoe_jax.training.config import TrainConfig

_INPUTS = {
    "model": ("the model's weights are not those", "unchanged weights in the model folder"),
    "references": ("the reference files are not those", "the unchanged reference files"),
    "data": ("the training data are not those", "unchanged data files and tokenizer"),
}


def check_inputs(config: TrainConfig, inputs: Mapping[str, Any]) -> None:
    """Refuses to continue a run whose files hold something else now, under the same paths. Nothing is
    written.

    Args:
        config: the run's configuration.
        inputs: what the files hold: fingerprints of "model", "references" and "data". What environment.json
            does not record (it is older) is not compared.

    Raises:
        InputError: says which of them has changed; or environment.json is damaged.
    """
    path = Path(config.output) / "environment.json"
    recorded = read_if_there(path)
    for name, (changed, right) in _INPUTS.items():
        if name in recorded and recorded[name] != inputs[name]:
            raise InputError(
                f"{changed} that this run began with",
                where=f"{path}, field {name}",
                expected=f"{right}, or a new output folder; nothing was changed",
            )


def hash_reference(reference: Reference) -> str:
    """SHA-256 over what a defence takes from a reference."""
    arrays = [reference.group, reference.router_logits]
    if reference.log_probs is not None:
        arrays += [getattr(reference.log_probs, f.name) for f in dataclasses.fields(reference.log_probs)]
    digest = hashlib.sha256(reference.prompts_hash.encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def check_vocabulary(
    vocab_size: int, tokens: Sequence[np.ndarray], references: Sequence[Reference], *, where: str
) -> None:
    """Refuses tokens that the model has no embedding for: computed with, they end as NaN.

    Args:
        vocab_size: the model's.
        tokens: of the samples.
        references: their prompts are looked at too.
        where: the model, for the message.

    Raises:
        InputError: names the largest token and the size of the vocabulary.
    """
    prompts = [prompt for reference in references for prompt in reference.prompts]
    largest = max((int(ids.max()) for ids in (*tokens, *prompts) if len(ids)), default=0)
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer gives token {largest}, the model's vocabulary has {vocab_size}",
            where=where,
            expected=f"the model's own tokenizer, with tokens up to {vocab_size - 1}",
        )
