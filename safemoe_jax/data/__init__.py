"""Data: files and hub ids -> samples -> tokens -> packed batches."""

from safemoe_jax.data.chat import (
    Encoded,
    check_tokenizer,
    encode_prompt,
    encode_prompts,
    encode_sample,
    encode_samples,
)
from safemoe_jax.data.mixture import mix
from safemoe_jax.data.packing import Batch, pack_prompts, process_rows, prompt_batches
from safemoe_jax.data.pipeline import TrainPipeline
from safemoe_jax.data.shapes import Shape
from safemoe_jax.data.sources import FORMATS, Sample, SourceConfig, read_prompts, read_source

__all__ = [
    "FORMATS",
    "Batch",
    "Encoded",
    "Sample",
    "Shape",
    "SourceConfig",
    "TrainPipeline",
    "check_tokenizer",
    "encode_prompt",
    "encode_prompts",
    "encode_sample",
    "encode_samples",
    "mix",
    "pack_prompts",
    "process_rows",
    "prompt_batches",
    "read_prompts",
    "read_source",
]
