"""What several commands do first: load a model onto a mesh, read and tokenise prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from safemoe_jax.data.chat import encode_prompts
from safemoe_jax.data.sources import Sample, SourceConfig, read_prompts
from safemoe_jax.model import Model, load_pretrained
from safemoe_jax.models.params import is_adapter
from safemoe_jax.models.quantised import Quantisation
from safemoe_jax.parallel.mesh import MeshConfig, make_mesh


class Holding(Protocol):
    """How a command holds a model's weights: fields of its configuration."""

    dtype: str | None
    quantisation: Quantisation | None
    mesh: MeshConfig


def load_model(path: str, adapter: str | None, how: Holding) -> Model:
    """A checkpoint with its adapter on a mesh (none for a mesh of one device)."""
    mesh = make_mesh(how.mesh) if how.mesh.size > 1 else None
    return load_pretrained(path, mesh=mesh, dtype=how.dtype, adapter=adapter, quantisation=how.quantisation)


def without_adapter(model: Model) -> Model:
    """The model as it was before fine-tuning; the base parameters are shared, not copied."""
    base = {name: value for name, value in model.params.items() if not is_adapter(name)}
    return replace(model, config=replace(model.config, lora=None), params=base)


def load_aligned(model: Model, aligned: str | None, how: Holding) -> Model | None:
    """The aligned model: the one named, else the model without its adapter, None where it has none."""
    if aligned is not None:
        return load_model(aligned, None, how)
    return without_adapter(model) if model.config.lora is not None else None


def prompt_tokens(model: Model, source: SourceConfig | None) -> tuple[Sequence[Sample], list[np.ndarray]]:
    """Prompts of a source and their tokens, generation prompt included; nothing for no source."""
    samples = [] if source is None else read_prompts(source)
    return samples, encode_prompts(model.tokenizer, samples) if samples else []
