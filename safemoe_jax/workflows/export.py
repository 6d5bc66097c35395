"""`safemoe export`: a model and its adapter as a folder that other programs load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safemoe_jax.model import load_pretrained
from safemoe_jax.models.lora import describe


@dataclass(frozen=True)
class ExportConfig:
    """Writes a checkpoint, merged with its adapter, or the adapter alone, in published formats.

    An adapter that was trained on quantised weights is merged into the checkpoint's own, in floats.

    Attributes:
        model: Hugging Face folder (config.json, safetensors) or hub id of the base model.
        output: a new or empty folder; it appears whole or not at all.
        adapter: adapter folder in PEFT's format (`adapter/` of a run folder); null exports the model alone.
        format: merged writes a Hugging Face folder with the adapter added to the weights; adapter writes the
            adapter alone, checked against the model, for PEFT and vLLM.
        dtype: type of the weights; null keeps bfloat16, and makes everything else float32.
    """

    model: str
    output: str
    adapter: str | None = None
    format: Literal["merged", "adapter"] = "merged"
    dtype: Literal["float32", "bfloat16"] | None = None


def export(config: ExportConfig) -> str:
    """Writes the folder and returns one line for the terminal.

    Raises:
        InputError: model or adapter cannot be read or do not belong together, there is no adapter to write,
            or the output folder is not empty.
    """
    model = load_pretrained(config.model, dtype=config.dtype, adapter=config.adapter)
    if config.format == "adapter":
        model.save_adapter(config.output)
        return f"adapter ({describe(model.config)}) written to {config.output}"
    model.save_pretrained(config.output)
    return f"model written to {config.output}"
