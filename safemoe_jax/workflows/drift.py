"""`safemoe drift`: how far a model's routing has moved from the aligned model's, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from safemoe_jax.checkpoints.json_files import write_json
from safemoe_jax.checkpoints.reference import check_matches, read_reference
from safemoe_jax.data.sources import SourceConfig
from safemoe_jax.errors import InputError
from safemoe_jax.evaluation.readout import compare_routing, read_routing
from safemoe_jax.model import Model
from safemoe_jax.models.quantised import Quantisation
from safemoe_jax.parallel.mesh import MeshConfig
from safemoe_jax.workflows.loading import load_aligned, load_model, prompt_tokens

SETS = ("harmful", "benign", "task")


@dataclass(frozen=True)
class DriftConfig:
    """Compares the routing of two models at the last token of the same prompts: mean KL at temperature 1 (the
    paper's drift) and overlap of the chosen experts, for each layer.

    Attributes:
        model: Hugging Face folder or hub id.
        output: JSON file to write.
        adapter: adapter folder in PEFT's format.
        against: what to compare with: a reference file (`safemoe reference`, with its own prompts), or the
            folder or hub id of another model; null is the model without its adapter.
        harmful: harmful prompts.
        benign: benign prompts of the same topics, to see whether drift is particular to harm.
        task: prompts of the fine-tuning task.
        batch_size: prompts computed together.
        dtype: type of the weights; null keeps bfloat16, and makes everything else float32.
        quantisation: int8, int4 or int4-64 holds the kernels of attention, experts and feed-forwards in 8 or
            4 bits, those of both models; null in floats. Against a reference
            file made in floats, rounding is part of the drift.
        mesh: devices to spread the model over.
    """

    model: str
    output: str
    adapter: str | None = None
    against: str | None = None
    harmful: SourceConfig | None = None
    benign: SourceConfig | None = None
    task: SourceConfig | None = None
    batch_size: int = 32
    dtype: Literal["float32", "bfloat16"] | None = None
    quantisation: Quantisation | None = None
    mesh: MeshConfig = MeshConfig()


def drift(config: DriftConfig) -> str:
    """Writes the figures and returns a table for the terminal.

    Raises:
        InputError: a model or file cannot be read, the two do not belong together, there are no prompts to
            compare on, or the output is already there.
    """
    if Path(config.output).exists():
        raise InputError("the output is already there", where=config.output, expected="a new file name")
    against_file = config.against is not None and Path(config.against).is_file()
    given = [name for name in SETS if getattr(config, name) is not None]
    if against_file == bool(given):
        raise InputError(
            "prompts are given twice" if given else "there are no prompts to compare on",
            where=", ".join(given) or "harmful, benign, task",
            expected="prompt files and a model in `against`, or a reference file there, with its own prompts",
        )
    model = load_model(config.model, config.adapter, config)
    compare = _against_reference if against_file else _against_model
    sets = compare(model, config)
    layers = model.config.moe_layers
    write_json(
        config.output,
        {
            "model": config.model,
            "adapter": config.adapter,
            "against": config.against,
            "moe_layers": list(layers),
            "sets": sets,
        },
    )
    return f"{table(layers, sets)}\n{config.output}"


def _against_reference(model: Model, config: DriftConfig) -> dict[str, Any]:
    reference = read_reference(config.against)
    check_matches(reference, config=model.config, tokenizer=model.tokenizer, where=config.against)
    here_LSE = read_routing(model, reference.prompts, batch_size=config.batch_size, progress="routing")
    sets = {}
    for number, name in enumerate(("harmful", "benign")):
        chosen = np.flatnonzero(reference.group == number)
        if chosen.size:
            there_LSE = reference.router_logits[:, chosen]
            sets[name] = compare_routing(here_LSE[:, chosen], there_LSE, model)
    return sets


def _against_model(model: Model, config: DriftConfig) -> dict[str, Any]:
    other = load_aligned(model, config.against, config)
    if other is None:
        raise InputError(
            "there is nothing to compare with",
            where="against",
            expected="a model, a reference file, or an adapter",
        )
    sets = {}
    for name in SETS:
        if getattr(config, name) is not None:
            _, prompts = prompt_tokens(model, getattr(config, name))
            here, there = (
                read_routing(m, prompts, batch_size=config.batch_size, progress=f"routing, {name}")
                for m in (model, other)
            )
            sets[name] = compare_routing(here, there, model, other)
    return sets


def table(layers: tuple[int, ...], sets: dict[str, Any]) -> str:
    """Drift (KL, nats) and overlap (Jaccard) of each layer and their means, the sets side by side."""
    head = ["layer", *(f"{name} {what}" for name in sets for what in ("KL", "overlap"))]
    rows = [
        [str(layer), *(f"{found[f'{what}_by_layer'][i]:.5f}" for found in sets.values() for what in _COLUMNS)]
        for i, layer in enumerate(layers)
    ]
    rows.append(["mean", *(f"{found[what]:.5f}" for found in sets.values() for what in _COLUMNS)])
    rows.append(["n", *(str(found["n"]) for found in sets.values() for _ in _COLUMNS)])
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)
    )


_COLUMNS = ("drift", "overlap")
