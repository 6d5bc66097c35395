"""Times the experts' feed-forward on this machine: kernels, training and decoding sizes, growth with E.

    python experiments/bench_experts.py [--repeats 9]

Pairs are timed in turns within one process; the least time and the median are printed, in milliseconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from safemoe_jax.models.grouped_matmul import choose_kernel, expert_ffn


def problem(tokens: int, d: int, f: int, n_experts: int, top_k: int) -> tuple[jax.Array, ...]:
    """Random tokens, router choices and expert weights, float32."""
    keys = jax.random.split(jax.random.key(0), 5)
    logits = jax.random.normal(keys[0], (tokens, n_experts))
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits), top_k)
    shapes = [(tokens, d), (n_experts, d, f), (n_experts, d, f), (n_experts, f, d)]
    x, gate, up, down = (
        jax.random.normal(k, s) / s[-2] ** 0.5 for k, s in zip(keys[1:], shapes, strict=True)
    )
    return x, weights, experts, gate, up, down


def forward(shape: dict[str, int], kernel: str) -> Callable[[], object]:
    """The forward pass alone."""
    arrays = problem(**shape)
    ffn = jax.jit(lambda *a: expert_ffn(*a, first_group=0, n_experts=shape["n_experts"], kernel=kernel))
    return lambda: ffn(*arrays)


def forward_and_backward(shape: dict[str, int], kernel: str, trainable: bool = False) -> Callable[[], object]:
    """Output and gradients of the tokens and combine weights; of the expert weights too if trainable."""
    arrays = problem(**shape)

    @jax.jit
    def both(x, weights, experts, *stack):
        def ffn(x, weights, *changed):
            return expert_ffn(
                x,
                weights,
                experts,
                *(changed or stack),
                first_group=0,
                n_experts=shape["n_experts"],
                kernel=kernel,
            )

        y, pullback = jax.vjp(ffn, x, weights, *(stack if trainable else ()))
        return y, pullback(y)

    return lambda: both(*arrays)


def time_in_turns(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Least milliseconds of each; prints them with the medians."""
    for run in runs.values():
        jax.block_until_ready(run())
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(1e3 * (time.perf_counter() - start))
    for name, values in times.items():
        print(f"{name:44s} least {min(values):9.2f}   median {np.median(values):9.2f}", flush=True)
    return {name: min(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    training = {"tokens": 2048, "d": 512, "f": 256, "n_experts": 64, "top_k": 8}
    few, decoding = {**training, "n_experts": 8}, {**training, "tokens": 32}
    flops = 6 * 2048 * 8 * 512 * 256

    print(f"T 2048, D 512, F 256, E 64, top-8, float32 ({flops / 1e9:.1f} GFLOP forward)")
    left = jax.random.normal(jax.random.key(1), (2048 * 8, 512))
    square = jnp.eye(512)
    product = jax.jit(jnp.matmul)
    times = time_in_turns(
        {
            "blocks, forward": forward(training, "blocks"),
            "blocks, forward + gradients, frozen": forward_and_backward(training, "blocks"),
            "blocks, forward + gradients, trainable": forward_and_backward(
                training, "blocks", trainable=True
            ),
            "dense, forward": forward(training, "dense"),
            "one large product of the same FLOP / 1.5": lambda: product(left, square),
        },
        repeats,
    )
    print(f"blocks forward: {flops / times['blocks, forward'] / 1e6:.0f} GFLOP/s")

    print("decoding, T 32 (100 MB of weights read)")
    time_in_turns({"blocks, forward": forward(decoding, "blocks")}, 5 * repeats)

    print("E 8 -> 64 at top-8, T 2048")
    steps = time_in_turns(
        {f"E {s['n_experts']}": forward_and_backward(s, "blocks") for s in (few, training)}, repeats
    )
    print(f"cost ratio E 64 / E 8: {steps['E 64'] / steps['E 8']:.2f}")

    print("tiny models: the choice and both kernels")
    for tokens, d, f, n_experts, top_k in ((32, 64, 8, 32, 4), (4096, 64, 8, 32, 4), (2048, 64, 32, 4, 2)):
        shape = {"tokens": tokens, "d": d, "f": f, "n_experts": n_experts, "top_k": top_k}
        print(shape, "->", choose_kernel("cpu", **shape))
        time_in_turns({k: forward_and_backward(shape, k) for k in ("dense", "blocks")}, repeats)


if __name__ == "__main__":
    main()
