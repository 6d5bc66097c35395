"""`safemoe generate`: answers the prompts of a file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from safemoe_jax.data.sources import Sample, SourceConfig
from safemoe_jax.errors import InputError
from safemoe_jax.evaluation import generate as generation
from safemoe_jax.evaluation.generate import ForcedRouting
from safemoe_jax.evaluation.records import write_jsonl
from safemoe_jax.model import Model
from safemoe_jax.models.quantised import Quantisation
from safemoe_jax.parallel.mesh import MeshConfig
from safemoe_jax.workflows.loading import Holding, load_aligned, load_model, prompt_tokens

ForceRouting = Literal["none", "last_token", "prompt"]


class Forcing(Holding, Protocol):
    """Whose routing is forced, and where: fields of a command's configuration."""

    force_routing: ForceRouting
    aligned: str | None


@dataclass(frozen=True)
class GenerateConfig:
    """Answers the prompts of a file, greedily or by sampling.

    Attributes:
        model: Hugging Face folder or hub id.
        output: the JSON Lines file to write, one object a prompt: prompt, answer, source, index, tokens,
            ended.
        prompts: what to answer; answers in the file are ignored.
        adapter: adapter folder in PEFT's format.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 is greedy; otherwise tokens are drawn from softmax(logits / temperature).
        seed: of the draws.
        batch_size: prompts computed together.
        force_routing: route the last_token of the prompt, or the whole prompt, as the aligned model does.
        aligned: folder or hub id of the aligned model for force_routing; null is the model without its
            adapter.
        dtype: type of the weights; null keeps bfloat16, and makes everything else float32.
        quantisation: int8, int4 or int4-64 holds the kernels of attention, experts and feed-forwards in 8 or
            4 bits, the aligned model's too; null in floats.
        mesh: devices to spread the model over.
    """

    model: str
    output: str
    prompts: SourceConfig
    adapter: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 32
    force_routing: ForceRouting = "none"
    aligned: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    quantisation: Quantisation | None = None
    mesh: MeshConfig = MeshConfig()


def generate(config: GenerateConfig) -> str:
    """Writes the answers and returns a summary for the terminal.

    Raises:
        InputError: model, adapter or prompts cannot be read, the output is already there, or a wrong number.
    """
    if Path(config.output).exists():
        raise InputError("the output is already there", where=config.output, expected="a new file name")
    model = load_model(config.model, config.adapter, config)
    samples, prompts = prompt_tokens(model, config.prompts)
    start = time.perf_counter()
    answers = generation.generate(
        model,
        prompts,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
        batch_size=config.batch_size,
        override=forced_routing(model, config),
        progress="generate",
    )
    seconds = time.perf_counter() - start
    rows = list(_rows(model, samples, answers, config.max_new_tokens))
    write_jsonl(config.output, rows)
    n_tokens = sum(len(answer) for answer in answers)
    shown = "\n".join(f"  {row['prompt'][:70]!r}\n    {row['answer'][:200]!r}" for row in rows[:3])
    speed = f"{n_tokens} tokens in {seconds:.1f} s, compilation included"
    return f"{shown}\n{len(rows)} answers, {speed}: {config.output}"


def forced_routing(model: Model, config: Forcing) -> ForcedRouting | None:
    """The override that a configuration asks for.

    Raises:
        InputError: it asks for one, but there is no aligned model to follow.
    """
    if config.force_routing == "none":
        return None
    source = load_aligned(model, config.aligned, config)
    if source is None:
        raise InputError(
            "there is no aligned model whose routing could be forced",
            where="force_routing",
            expected="aligned: a model, or an adapter on an aligned base model",
        )
    return ForcedRouting(source, config.force_routing)


def _rows(
    model: Model, samples: Sequence[Sample], answers: Sequence[list[int]], max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    texts = model.tokenizer.batch_decode(answers, skip_special_tokens=True)
    for sample, text, tokens in zip(samples, texts, answers, strict=True):
        yield {
            "prompt": sample.user,
            "answer": text.strip(),
            "source": sample.source,
            "index": sample.index,
            "tokens": len(tokens),
            "ended": len(tokens) < max_new_tokens,
        }
