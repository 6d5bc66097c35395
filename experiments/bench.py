"""Speed against transformers and PEFT on the same weights, the same batches and the same machine.

    python experiments/bench.py                        all of it
    python experiments/bench.py --only train generate  some of it; the other rows of the table stay
    python experiments/bench.py --lengths samsum.json --only samsum

writes experiments/bench.{json,md}. Each pair takes turns, and the ratio of the medians is what is reported:
seconds differ between machines, and between minutes on one machine; ratios much less. For every measurement
each library has a new process of its own: in one process each takes the memory that the other has just freed
and pays for new pages in every turn, and what a large measurement leaves behind slows down the next.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model

from safemoe_jax.data.chat import Encoded
from safemoe_jax.data.packing import prompt_batches
from safemoe_jax.data.pipeline import TrainPipeline
from safemoe_jax.defenses.context import RoutingTarget
from safemoe_jax.defenses.safemoe import RoutingLoss
from safemoe_jax.evaluation.generate import generate
from safemoe_jax.model import Model
from safemoe_jax.models import Compute, LoraConfig, ModelConfig, declare, initialise, split_trainable
from safemoe_jax.models.lora import add_adapters
from safemoe_jax.parallel.allocator import keep_freed_memory
from safemoe_jax.parallel.mesh import MeshConfig, make_mesh
from safemoe_jax.training.config import OptimizerConfig
from safemoe_jax.training.optimizer import hyper
from safemoe_jax.training.state import init_state, state_shardings
from safemoe_jax.training.step import PassStep, TaskConstants, TaskStep, compile_all

VOCABULARY, MAX_LENGTH, BATCH = 8192, 512, 32
CONFIG = ModelConfig(
    family="olmoe",
    vocab_size=VOCABULARY,
    d_model=512,
    n_layers=8,
    n_heads=8,
    n_kv_heads=8,
    head_dim=64,
    norm_eps=1e-5,
    n_experts=64,
    top_k=8,
    expert_dim=256,
    qk_norm="full",
)
EXPERT_IMPLEMENTATIONS = ("grouped_mm", "eager")
NAMES = ("train", "samsum", "pass", "generate")
HERE = Path(__file__).parent


class Ours:
    """Our compiled training step on one batch after another."""

    def __init__(self, params: dict[str, jax.Array]) -> None:
        self.config, adapted = add_adapters(CONFIG, params, LoraConfig(8, 8.0), jax.random.key(1))
        weights = split_trainable(self.config, adapted)
        self.mesh = make_mesh(MeshConfig())
        placed = state_shardings(self.config, weights.trainable, self.mesh)
        self.frozen, self.state = weights.frozen, init_state(weights.trainable, placed)
        self.scalars = hyper(OptimizerConfig(), 1e-4, 1.0)

    def train(self, batches: list[dict[str, np.ndarray]]) -> float:
        """Seconds for one step on each batch; compilation happens before the clock starts."""
        step = TaskStep(self.config, Compute(), self.mesh)
        return self._run(step, batches, TaskConstants())

    def align(self, batches: list[dict[str, np.ndarray]], constants: RoutingTarget) -> float:
        """Seconds for one routing pass."""
        return self._run(
            PassStep(self.config, Compute(), self.mesh, RoutingLoss("forward", "sum_layers")),
            batches,
            constants,
        )

    def _run(self, step: TaskStep | PassStep, batches: list, constants: object) -> float:
        wanted = [(step, batch, constants) for batch in batches]
        programs = compile_all(wanted, self.frozen, self.state)
        start = time.perf_counter()
        for program, batch in zip(programs, batches, strict=True):
            self.state, metrics = program(self.frozen, self.state, batch, self.scalars, constants)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start


class Theirs:
    """transformers with PEFT's LoRA, torch's AdamW and clipping: the step of a plain training loop."""

    def __init__(self, folder: Path) -> None:
        self.base = transformers.OlmoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
        lora = PeftLoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        self.model = get_peft_model(self.base, lora)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.01)
        self.trainable = trainable

    def train(self, implementation: str, batches: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> float:
        """Seconds for one step on each (tokens, attention mask, labels)."""
        self.base.set_experts_implementation(implementation)
        self.model.train()
        start = time.perf_counter()
        for tokens, mask, labels in batches:
            out = self.model(
                input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask), labels=torch.tensor(labels)
            )
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.perf_counter() - start

    def generate(self, implementation: str, prompts: np.ndarray, new_tokens: int) -> float:
        """Seconds of greedy generation, all tokens produced."""
        self.base.set_experts_implementation(implementation)
        self.model.eval()
        tokens = torch.tensor(prompts)
        start = time.perf_counter()
        with torch.no_grad(), self.model.disable_adapter():
            out = self.model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        assert out.shape[1] == prompts.shape[1] + new_tokens
        return time.perf_counter() - start


_theirs: Theirs | None = None


def _start(folder: Path) -> None:
    """Makes the model of torch's process."""
    global _theirs
    keep_freed_memory()  # as in our process
    torch.set_num_threads(os.cpu_count() or 1)
    _theirs = Theirs(folder)


def _call(method: str, arguments: tuple) -> float:
    return getattr(_theirs, method)(*arguments)


class InOwnProcess:
    """`Theirs`, called in another process that ends with the `with`; what is timed there is the same."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, context, initializer=_start, initargs=(folder,))

    def __enter__(self) -> InOwnProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()

    def train(self, *arguments: object) -> float:
        """As `Theirs.train`."""
        return self.pool.submit(_call, "train", arguments).result()

    def generate(self, *arguments: object) -> float:
        """As `Theirs.generate`."""
        return self.pool.submit(_call, "generate", arguments).result()


def sample(rng: np.random.Generator, length: int, answer: int) -> Encoded:
    """Random tokens with the loss on the last `answer` of them."""
    tokens = rng.integers(1, VOCABULARY, length).astype(np.int32)
    return Encoded(tokens, np.arange(length) >= length - answer, False)


def samsum_like_lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    """Lengths with SAMSum's mean (207 tokens) and cut (512): log-normal, rescaled until the cut mean fits."""
    raw = rng.lognormal(0.0, 0.6, 20_000)
    scale = 150.0
    for _ in range(50):
        scale *= 207 / np.clip(raw * scale, 16, MAX_LENGTH).mean()
    return np.clip(rng.choice(raw, count) * scale, 16, MAX_LENGTH).astype(int)


def padded(samples: list[Encoded], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The batch as the published code makes it: every sample padded to `length`."""
    tokens = np.zeros((len(samples), length), np.int64)
    mask, labels = np.zeros_like(tokens), np.full_like(tokens, -100)
    for row, one in enumerate(samples):
        n = len(one.tokens)
        tokens[row, :n], mask[row, :n] = one.tokens, 1
        labels[row, :n] = np.where(one.loss_mask, one.tokens, -100)
    return tokens, mask, labels


def alternate(repeats: int, runs: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Median seconds of each run, taken in turns. A turn runs twice and times the second: the first
    finds its memory cold after the turns of the others, and takes up to a third longer, theirs as ours."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            cold, warm = run(), run()
            taken[name].append(warm)
            print(f"  {name:<28}{warm:9.3f} s (before: {cold:.3f} s)", flush=True)
    return {name: statistics.median(values) for name, values in taken.items()}


def compare(seconds: dict[str, float], target: float) -> dict[str, object]:
    """Ours against the best of theirs."""
    best = min((s, name) for name, s in seconds.items() if name != "safemoe_jax")
    return {
        "seconds": seconds,
        "best_other": best[1],
        "ratio": best[0] / seconds["safemoe_jax"],
        "target": target,
    }


def bench_train(ours: Ours, theirs: InOwnProcess, repeats: int, rng: np.random.Generator) -> dict:
    """One step on 8 x 256 tokens, loss on all of them."""
    samples = [sample(rng, 256, 256) for _ in range(8)]
    batch = TrainPipeline.build(samples, 8, row_length=256).batch(0)
    runs = {"safemoe_jax": lambda: ours.train([batch])}
    for name in EXPERT_IMPLEMENTATIONS:
        runs[name] = lambda name=name: theirs.train(name, [padded(samples, 256)])
    return compare(alternate(repeats, runs), 1.1)


def samsum_batches(rng: np.random.Generator, lengths_file: Path | None, steps: int) -> tuple[list, list]:
    """Packed batches of ours, and the same samples padded to 512."""
    if lengths_file is None:
        lengths = samsum_like_lengths(rng, BATCH * steps)
    else:
        lengths = np.clip(np.asarray(json.loads(lengths_file.read_text())), 16, MAX_LENGTH)
        lengths = rng.choice(lengths, BATCH * steps, replace=False)
    samples = [sample(rng, int(n), min(25, int(n) - 8)) for n in lengths]
    pipeline = TrainPipeline.build(samples, BATCH, total_steps=steps)
    print("  mean length", float(np.mean(lengths)), "packing", pipeline.report()["shapes"])
    groups = [[samples[i] for i in pipeline.sample_ids(step)] for step in range(steps)]
    return [pipeline.batch(step) for step in range(steps)], [padded(group, MAX_LENGTH) for group in groups]


def bench_samsum(
    ours: Ours,
    theirs: InOwnProcess,
    repeats: int,
    rng: np.random.Generator,
    lengths: Path | None,
    implementations: tuple[str, ...],
) -> dict:
    """A step on 32 samples of SAMSum's lengths, packed here, padded to 512 there."""
    packed, full = samsum_batches(rng, lengths, 1)
    runs = {"safemoe_jax": lambda: ours.train(packed)}
    for name in implementations:
        runs[name] = lambda name=name: theirs.train(name, full)
    return compare(alternate(max(1, repeats // 2), runs), 2.5)


def bench_pass(ours: Ours, repeats: int, rng: np.random.Generator, lengths: Path | None) -> dict:
    """The routing pass over 100 prompts against an epoch of 5,500 samples (from four task steps)."""
    sizes = np.clip(rng.normal(54, 12, 100), 30, 90).astype(int)
    prompts = [rng.integers(1, VOCABULARY, n).astype(np.int32) for n in sizes]
    batches = prompt_batches(prompts, BATCH)
    reference = rng.normal(size=(CONFIG.n_layers, 100, CONFIG.n_experts)).astype(np.float32)
    constants = RoutingTarget(reference, np.ones(CONFIG.n_layers, np.float32), np.float32(0.1))
    steps = 4
    packed, _ = samsum_batches(rng, lengths, steps)
    runs = {"pass": lambda: ours.align(batches, constants), "task steps": lambda: ours.train(packed)}
    seconds = alternate(repeats, runs)
    epoch = seconds["task steps"] / steps * 5500 / BATCH
    return {
        "seconds": seconds,
        "mean_prompt": float(sizes.mean()),
        "share": seconds["pass"] / epoch,
        "target": 0.006,
    }


def bench_generate(model: Model, theirs: InOwnProcess, repeats: int, rng: np.random.Generator) -> dict:
    """32 prompts of 64 tokens, 64 new tokens, greedy; no end-of-sequence token is ever produced."""
    prompts = rng.integers(1, VOCABULARY, (32, 64)).astype(np.int32)

    def ours() -> float:
        start = time.perf_counter()
        answers = generate(model, list(prompts), max_new_tokens=64, batch_size=32, stop_tokens=())
        assert all(len(answer) == 64 for answer in answers)
        return time.perf_counter() - start

    runs = {"safemoe_jax": ours}
    # Its third form, batched_mm, copies the chosen experts for every token: 17 GB for these prompts.
    for name in EXPERT_IMPLEMENTATIONS:
        runs[name] = lambda name=name: theirs.generate(name, prompts, 64)
    result = compare(alternate(repeats, runs), 2.0)
    result["tokens_per_second"] = {name: 32 * 64 / s for name, s in result["seconds"].items()}
    return result


def table(results: dict) -> str:
    """The results as Markdown."""
    lines = [
        "# Speed",
        "",
        "`make bench` wrote this file; the pairs take turns, each in its own process; medians are compared.",
        "",
        "| measurement | safemoe_jax | best of transformers + PEFT | ratio | wanted |",
        "|---|---|---|---|---|",
    ]
    for name, result in results["measurements"].items():
        seconds = result["seconds"]
        if name == "pass":
            lines.append(
                f"| SafeMoE pass, share of an epoch | {seconds['pass']:.2f} s | | {result['share']:.2%} "
                f"| at most {result['target']:.1%} |"
            )
        else:
            other = result["best_other"]
            lines.append(
                f"| {name} | {seconds['safemoe_jax']:.2f} s | {seconds[other]:.2f} s ({other}) "
                f"| {result['ratio']:.2f} x | at least {result['target']} x |"
            )
    versions = ", ".join(f"{k} {v}" for k, v in results["environment"].items())
    return "\n".join([*lines, "", versions, ""])


def measure(name: str, before: dict[str, dict], arguments: argparse.Namespace) -> dict:
    """One measurement; `before` holds those that are done."""
    keep_freed_memory()  # as every command does
    rng, repeats = np.random.default_rng(0), arguments.repeats
    params = initialise(declare(CONFIG), jax.random.key(0))
    model = Model(CONFIG, params)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with InOwnProcess(Path(folder)) as theirs:
            if name == "generate":
                return bench_generate(model, theirs, repeats, rng)
            ours = Ours(params)
            if name == "train":
                return bench_train(ours, theirs, repeats, rng)
            if name == "pass":
                return bench_pass(ours, repeats, rng, arguments.lengths)
            # A padded step takes minutes: what was slower on the small step is not run on the large one.
            best = (before["train"]["best_other"],) if "train" in before else EXPERT_IMPLEMENTATIONS
            return bench_samsum(ours, theirs, repeats, rng, arguments.lengths, best)


def environment() -> dict[str, object]:
    """What the figures depend on."""
    return {
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "cores": os.cpu_count(),
    }


def processor() -> str:
    """The processor's name and, because the products of both libraries depend on them, its widest vectors."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    text = info.read_text()
    name = next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name"))
    return f"{name} ({'AVX-512' if 'avx512f' in text else 'no AVX-512'})"


def write_results(measured: dict[str, dict]) -> None:
    """Puts the new measurements into the files; old ones stay if they were made in the same environment."""
    path, results = HERE / "bench.json", {"environment": environment(), "measurements": {}}
    if path.exists():
        old = json.loads(path.read_text())
        if old["environment"] == results["environment"]:
            results["measurements"] = old["measurements"]
    known = results["measurements"] | measured
    results["measurements"] = {name: known[name] for name in NAMES if name in known}
    path.write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "bench.md").write_text(table(results))


def main() -> None:
    """Runs the chosen measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--lengths", type=Path, help="JSON list of sample lengths in tokens, instead of drawn ones"
    )
    arguments = parser.parse_args()
    measured: dict[str, dict] = {}
    for name in arguments.only:
        print(name, flush=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            measured[name] = pool.submit(measure, name, measured, arguments).result()
        print(json.dumps(measured[name], indent=1), flush=True)
    write_results(measured)


if __name__ == "__main__":
    main()
