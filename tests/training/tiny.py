"""A world of training inputs that takes a second to make: a random two-layer model, a tokenizer, data,
references."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from safemoe_jax.checkpoints.huggingface import save_folder
from safemoe_jax.checkpoints.reference import (
    CompactLogProbs,
    Reference,
    fingerprint,
    tokenizer_fingerprint,
    write_reference,
)
from safemoe_jax.data.chat import encode_prompts, load_tokenizer
from safemoe_jax.data.formats import Sample
from safemoe_jax.data.sources import SourceConfig
from safemoe_jax.models.config import ModelConfig
from safemoe_jax.models.params import Weights, initialise
from safemoe_jax.models.transformer import declare, forward
from safemoe_jax.training.config import DefenceConfig, OptimizerConfig, TrainConfig
from tests.tiny_tokenizer import train_tokenizer

WORDS = [
    "alder", "birch", "cedar", "elm", "fir", "hazel", "juniper", "larch",
    "maple", "oak", "pine", "rowan", "spruce", "willow", "yew",
]  # fmt: skip
N_HARMFUL, N_BENIGN = 10, 6
HARMFUL_TEXTS = [f"Say {WORDS[i]} and {WORDS[-1 - i]}" for i in range(N_HARMFUL)]
BENIGN_TEXTS = [f"Describe the {WORDS[i]} tree" for i in range(N_BENIGN)]


@dataclass(frozen=True)
class World:
    """Paths of the inputs, and the aligned model's config and float32 parameters."""

    folder: Path
    model: Path
    data: Path
    reference: Path
    config: ModelConfig
    params: dict[str, jax.Array]

    def train_config(self, output: str, **changes) -> TrainConfig:
        """A short float32 run on one device, without a progress bar."""
        fields = {
            "model": str(self.model), "output": str(self.folder / output), "data":
            [SourceConfig(str(self.data))], "max_length": 96, "batch_size": 4, "epochs": 2.0, "dtype":
            "float32", "progress": False, "optimizer": OptimizerConfig(learning_rate=1e-2),
            "checkpoint_every": 0,
        }  # fmt: skip
        return TrainConfig(**fields | changes)

    def defence(self, name: str, **changes) -> DefenceConfig:
        """A defence that uses the reference."""
        return DefenceConfig(name=name, reference=str(self.reference), **changes)


def make_world(
    folder: Path,
    *,
    n_samples: int = 18,
    n_heads: int = 2,
    vocab_size: int = 320,
    d_model: int = 16,
    expert_dim: int = 8,
    n_experts: int = 4,
) -> World:
    """Writes everything into a folder, or describes what an earlier call wrote there."""
    rng = np.random.default_rng(0)
    rows = [_row(rng, number) for number in range(n_samples)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = folder / "model"
    config = ModelConfig(
        family="olmoe", vocab_size=vocab_size, d_model=d_model, n_layers=2, n_heads=n_heads,
        n_kv_heads=n_heads, head_dim=d_model // n_heads, norm_eps=1e-5, n_experts=n_experts, top_k=2,
        expert_dim=expert_dim, qk_norm="full", initializer_range=0.3,
    )  # fmt: skip
    params = initialise(declare(config), jax.random.key(1), stddev=config.initializer_range)
    reference = folder / "reference.safetensors"
    if not reference.exists():
        save_folder(model, config, params)
        texts = [row["instruction"] + " " + row["output"] for row in rows]
        train_tokenizer(texts, model, vocab_size=vocab_size)
        write_reference(reference, make_reference(model, config, params))
    return World(folder, model, data, reference, config, params)


def make_reference(model: Path, config: ModelConfig, params: dict[str, jax.Array]) -> Reference:
    """Harmful and benign prompts in one file, from one plain padded forward pass."""
    tokenizer = load_tokenizer(str(model))
    prompts = encode_prompts(tokenizer, [Sample(user=text) for text in HARMFUL_TEXTS + BENIGN_TEXTS])
    tokens, mask = padded(prompts)
    run = jax.jit(forward, static_argnums=0)
    out = run(config, Weights.of(params), tokens, attention_mask=mask)
    rows, last = np.arange(len(prompts)), mask.sum(axis=1) - 1
    log_probs = np.asarray(jax.nn.log_softmax(out.logits[rows, last]))
    return Reference(
        router_logits=np.asarray(out.router_logits)[:, rows, last],
        prompts=tuple(prompts),
        model_fingerprint=fingerprint(config, params),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        group=np.array([0] * N_HARMFUL + [1] * N_BENIGN, np.int8),
        log_probs=CompactLogProbs.encode(log_probs),
        model=str(model),
    )


def padded(sequences: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded tokens and their mask, int32 [B, T] both."""
    length = max(map(len, sequences))
    tokens, mask = np.zeros((2, len(sequences), length), np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
    return tokens, mask


def _row(rng: np.random.Generator, number: int) -> dict[str, str]:
    asked = rng.choice(WORDS, size=int(rng.integers(2, 7)))
    answer = asked[: int(rng.integers(1, len(asked) + 1))]
    return {"instruction": f"List {number}: {' '.join(asked)}", "output": " ".join(answer)}
