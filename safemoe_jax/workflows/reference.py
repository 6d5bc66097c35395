"""`safemoe reference`: records how the aligned model routes a set of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from safemoe_jax.checkpoints.reference import Reference, read_reference, write_reference
from safemoe_jax.data.sources import Sample, SourceConfig
from safemoe_jax.errors import InputError
from safemoe_jax.evaluation import readout
from safemoe_jax.models.quantised import Quantisation
from safemoe_jax.parallel.mesh import MeshConfig
from safemoe_jax.workflows.loading import load_model, prompt_tokens


@dataclass(frozen=True)
class ReferenceConfig:
    """Records how an aligned model routes prompts at their last token, before it is fine-tuned.

    Attributes:
        model: Hugging Face folder or hub id of the aligned model.
        output: the file to write, ending in .safetensors.
        prompts: harmful prompts (the method's D_h; published: the first 100 of SafeInstr). Answers are
            ignored.
        benign: benign prompts, recorded as a second group of the same file (wanted by safemoe_anchored).
        log_probs: also record next-token log-probabilities at the last prompt token (wanted by
            safemoe_anchored).
        batch_size: prompts computed together.
        dtype: type of the weights; null keeps bfloat16, and makes everything else float32.
        quantisation: int8, int4 or int4-64 holds the kernels of attention, experts and feed-forwards in 8 or
            4 bits; null in floats, which is right for a run with a quantised base too.
        mesh: devices to spread the model over.
    """

    model: str
    output: str
    prompts: SourceConfig
    benign: SourceConfig | None = None
    log_probs: bool = False
    batch_size: int = 32
    dtype: Literal["float32", "bfloat16"] | None = None
    quantisation: Quantisation | None = None
    mesh: MeshConfig = MeshConfig()


def extract_reference(config: ReferenceConfig) -> str:
    """Writes the file and returns one line for the terminal.

    Raises:
        InputError: model or prompts cannot be read, the tokenizer has no chat template, or the output is
            there and records something else.
    """
    _check_output(config.output)
    model = load_model(config.model, None, config)
    harmful_samples, harmful = prompt_tokens(model, config.prompts)
    benign_samples, benign = prompt_tokens(model, config.benign)
    reference = readout.extract_reference(
        model,
        harmful,
        benign=benign,
        log_probs=config.log_probs,
        system_prompt=_system_prompts([*harmful_samples, *benign_samples]),
        batch_size=config.batch_size,
        progress="reference",
    )
    _check_same(config.output, reference)
    write_reference(config.output, reference)
    layers, n_prompts, experts = reference.router_logits.shape
    size = Path(config.output).stat().st_size / 1e6
    return (
        f"{n_prompts} prompts ({len(harmful)} harmful, {len(benign)} benign), {layers} layers, "
        f"{experts} experts{', log-probabilities' if config.log_probs else ''}: "
        f"{config.output} ({size:.1f} MB)"
    )


def _system_prompts(samples: Sequence[Sample]) -> str:
    """The system messages, each once."""
    return "\n---\n".join(dict.fromkeys(sample.system for sample in samples if sample.system))


def _check_output(output: str) -> None:
    if Path(output).suffix != ".safetensors":
        raise InputError("the output is no .safetensors file", where=output, expected="NAME.safetensors")
    if Path(output).exists():
        read_reference(output)


def _check_same(output: str, reference: Reference) -> None:
    """Only the same recording, or one with log-probabilities besides, may take the place of an older one."""
    if not Path(output).exists():
        return
    before = read_reference(output)
    same = ("model_fingerprint", "tokenizer_fingerprint", "prompts_hash", "system_prompt")
    differing = [field for field in same if getattr(before, field) != getattr(reference, field)]
    others = [field.replace("_", " ") for field in differing]
    if not np.array_equal(before.group, reference.group):
        others.append("groups of prompts")
    if before.log_probs is not None and reference.log_probs is None:
        others.append("log-probabilities, which would be lost")
    if others:
        raise InputError(
            f"the output is there and records something else: {', '.join(others)}",
            where=output,
            expected="another file name; nothing was changed",
        )
