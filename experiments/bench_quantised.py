"""Time and memory of a training step whose base is held in 8 or 4 bits, against float32.

    python experiments/bench_quantised.py            minutes; writes experiments/bench_quantised.{json,md}
    python experiments/bench_quantised.py --layers 1 --repeats 1 --output FOLDER

An OLMoE-like network with random weights, adapters of rank 8 on queries and values, one optimizer step on
8 x 256 tokens with the loss on all of them. The steps take turns in one process.

    ms         median of a step; a turn runs twice and times the second, whose memory is warm
    ratio      median of the turns' ratios to the float32 step of the same turn
    weights    MB of the frozen parameters; embeddings, router and norms stay float32
    arguments, temporary   MB that the compiled step takes, as the compiler gives them
    bound      MB of both that the step may take: 1.15 x its weights, and what the float32 step takes for
               activations, which are its temporaries
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import typing
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from safemoe_jax.data.chat import Encoded
from safemoe_jax.data.pipeline import TrainPipeline
from safemoe_jax.models import Compute, LoraConfig, ModelConfig, declare, initialise, split_trainable
from safemoe_jax.models.lora import add_adapters
from safemoe_jax.models.params import Params
from safemoe_jax.models.quantisation import quantise_params
from safemoe_jax.models.quantised import Quantisation
from safemoe_jax.parallel.allocator import keep_freed_memory
from safemoe_jax.parallel.mesh import MeshConfig, make_mesh
from safemoe_jax.training.config import OptimizerConfig
from safemoe_jax.training.optimizer import hyper
from safemoe_jax.training.state import init_state, state_shardings
from safemoe_jax.training.step import TaskConstants, TaskStep, compile_all

METHODS: tuple[Quantisation, ...] = typing.get_args(Quantisation)
ROWS, LENGTH, LAYERS, REPEATS = 8, 256, 4, 9
HERE = Path(__file__).parent


def network(layers: int) -> ModelConfig:
    """The network of experiments/bench.py with this many layers."""
    return ModelConfig(
        family="olmoe",
        vocab_size=8192,
        d_model=512,
        n_layers=layers,
        n_heads=8,
        n_kv_heads=8,
        head_dim=64,
        norm_eps=1e-5,
        n_experts=64,
        top_k=8,
        expert_dim=256,
        qk_norm="full",
    )


def random_batch(vocab_size: int) -> dict[str, np.ndarray]:
    """Full rows of random tokens, loss on all of them."""
    rng = np.random.default_rng(0)
    rows = rng.integers(1, vocab_size, (ROWS, LENGTH)).astype(np.int32)
    samples = [Encoded(row, np.ones(LENGTH, bool), False) for row in rows]
    return TrainPipeline.build(samples, ROWS, row_length=LENGTH).batch(0)


class Training:
    """A compiled step and what it works on."""

    def __init__(self, config: ModelConfig, params: Params, method: Quantisation | None) -> None:
        if method is not None:
            config, params = quantise_params(config, params, method)
        config, params = add_adapters(config, params, LoraConfig(8, 8.0), jax.random.key(1))
        weights, mesh = split_trainable(config, params), make_mesh(MeshConfig())
        placed = state_shardings(config, weights.trainable, mesh)
        self.batch, self.constants = random_batch(config.vocab_size), TaskConstants()
        self.scalars = hyper(OptimizerConfig(), 1e-4, 1.0)
        self.frozen, self.state = weights.frozen, init_state(weights.trainable, placed)
        wanted = [(TaskStep(config, Compute(), mesh), self.batch, self.constants)]
        self.program = compile_all(wanted, self.frozen, self.state)[0]

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        arguments = self.frozen, self.state, self.batch, self.scalars, self.constants
        self.state, metrics = self.program(*arguments)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start

    def megabytes(self) -> dict[str, float]:
        """What the frozen weights and the compiled step take."""
        memory = self.program.memory_analysis()
        return {
            "weights": sum(value.nbytes for value in self.frozen.values()) / 1e6,
            "arguments": memory.argument_size_in_bytes / 1e6,
            "temporary": memory.temp_size_in_bytes / 1e6,
        }


def in_turns(runs: dict[str, Training], repeats: int) -> dict[str, list[float]]:
    """Seconds of every run's steps, turn by turn."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            run.step()
            taken[name].append(run.step())
        print({name: round(1e3 * seconds[-1]) for name, seconds in taken.items()}, flush=True)
    return taken


def measure(layers: int, repeats: int) -> list[dict]:
    """One row for float32 and for every method."""
    config = network(layers)
    params = initialise(declare(config), jax.random.key(0))
    runs = {method or "float32": Training(config, params, method) for method in (None, *METHODS)}
    taken = in_turns(runs, repeats)
    memory = {name: run.megabytes() for name, run in runs.items()}
    activations, rows = memory["float32"]["temporary"], []
    for name, seconds in taken.items():
        ratios = [own / other for own, other in zip(seconds, taken["float32"], strict=True)]
        row = {"weights_held": name, "ms": 1e3 * statistics.median(seconds)}
        row |= {"ratio": statistics.median(ratios), **memory[name]}
        rows.append(row | {"bound": 1.15 * row["weights"] + activations})
    return rows


def table(results: dict) -> str:
    """The results as Markdown."""
    lines = [
        "# A training step on quantised weights",
        "",
        "`python experiments/bench_quantised.py` wrote this file; its docstring says what the columns are.",
        "",
        f"{results['layers']} layers, width 512, 64 experts of width 256, 8 a token, LoRA r 8 on q_proj and "
        f"v_proj, {ROWS} x {LENGTH} tokens; {results['repeats']} turns.",
        "",
        "| base | ms | ratio | weights, MB | arguments, MB | temporary, MB | both | bound |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results["measurements"]:
        both = row["arguments"] + row["temporary"]
        lines.append(
            f"| {row['weights_held']} | {row['ms']:.0f} | {row['ratio']:.2f} | {row['weights']:.1f} "
            f"| {row['arguments']:.1f} | {row['temporary']:.1f} | {both:.1f} | {row['bound']:.1f} |"
        )
    return "\n".join([*lines, "", ", ".join(f"{k} {v}" for k, v in results["environment"].items()), ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes bench_quantised.json and bench_quantised.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--output", type=Path, default=HERE)
    given = parser.parse_args(arguments)
    keep_freed_memory()  # as every command does
    environment = {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    results = {"environment": environment, "layers": given.layers, "repeats": given.repeats}
    results["measurements"] = measure(given.layers, given.repeats)
    (given.output / "bench_quantised.json").write_text(json.dumps(results, indent=1) + "\n")
    (given.output / "bench_quantised.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
