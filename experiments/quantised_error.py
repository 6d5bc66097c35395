"""What rounding the weights to 8 or 4 bits changes, for a small random network of every MoE family.

    python experiments/quantised_error.py            minutes; writes experiments/quantised_error.{json,md}
    python experiments/quantised_error.py --families olmoe gpt_oss --output FOLDER

Every network is drawn at random in float32 (kernels with standard deviation 1 / sqrt(width), so that router
logits have one near 1), rounded as `--quantisation` rounds a checkpoint, and computes the same random tokens
before and after. Figures are means over seeds, each of which draws weights and tokens.

    logits          root mean square of the difference, divided by that of the float32 logits
    router KL       KL(float32 routing || rounded routing) at temperature 1, nats, mean over tokens: the mean
                    over MoE layers and the last of them; every layer is in the JSON file
    experts         Jaccard index of the experts chosen, mean over layers and tokens
    tokens          share of positions whose likeliest next token is the same
    MB              bytes of all parameters, embeddings and routers included, which stay float32

This is a fact about rounding and about how it spreads through a family's layers, not about the quality of a
trained model, whose weights, routing and margins are other ones. Families differ by their rules: phimoe's
combine weights jump where two router logits come near enough to each other, which makes large errors of small
ones; granitemoe's published multipliers let the embedding outweigh the layers.
"""

from __future__ import annotations

import argparse
import json
import platform
import typing
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import jax
import jax.numpy as jnp

from safemoe_jax.families import family_of
from safemoe_jax.model import Model
from safemoe_jax.models.config import ModelConfig
from safemoe_jax.models.params import initialise
from safemoe_jax.models.quantisation import quantise_params
from safemoe_jax.models.quantised import Quantisation
from safemoe_jax.models.transformer import Output, chosen_experts, declare
from safemoe_jax.routing import drift, top_k_overlap

HERE = Path(__file__).parent
METHODS: tuple[Quantisation, ...] = typing.get_args(Quantisation)
ROWS, LENGTH, SEEDS = 8, 64, 3

# Every width is a multiple of 64, so that both block sizes of 4 bits divide it.
WIDTH = 128
TINY = {
    "vocab_size": 512,
    "hidden_size": WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
# The expert width, the number of experts and of those chosen, as most families call them.
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4}
LOCAL = {"num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 64}
NARROW = {**EXPERTS, "moe_intermediate_size": 64, "intermediate_size": 256}
DEEPSEEK = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 64,
    "intermediate_size": 256,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
CONFIGS: dict[str, dict] = {
    "olmoe": {**EXPERTS, "intermediate_size": 64, "num_key_value_heads": 4},
    "qwen2_moe": {**NARROW, "shared_expert_intermediate_size": 128},
    "qwen3_moe": {**NARROW, "norm_topk_prob": True},
    "deepseek_v2": {**DEEPSEEK, **LATENT, "q_lora_rank": None},
    "deepseek_v3": {**DEEPSEEK, **LATENT, "q_lora_rank": 64, "topk_group": 2, "n_group": 4},
    "mixtral": {**LOCAL, "num_local_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {**LOCAL, "sliding_window": 16},
    "phimoe": {**LOCAL, "num_experts_per_tok": 2},
    "llama4_text": {**LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 128},
    "glm4_moe": {**DEEPSEEK, "attention_bias": True},
    "dots1": DEEPSEEK,
    "granitemoe": {
        **LOCAL,
        "attention_multiplier": 1 / 32,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 16,
        "moe_k": 4,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_intermediate_size": 64,
        "intermediate_size": 256,
    },
}
"""Model type -> what its config.json says besides `TINY`."""


def network(family: str) -> ModelConfig:
    """The small network of a family, by its own translation of config.json."""
    return family_of(family).read_config({**TINY, **CONFIGS[family], "model_type": family})


def draw(config: ModelConfig, seed: int) -> tuple[Model, jax.Array]:
    """A random float32 model and tokens [B, T]."""
    weights, tokens = jax.random.split(jax.random.key(seed))
    model = Model(config, initialise(declare(config), weights, stddev=WIDTH**-0.5))
    return model, jax.random.randint(tokens, (ROWS, LENGTH), 0, config.vocab_size)


def compare(floats: Model, rounded: Model, tokens: jax.Array) -> dict[str, float | list[float]]:
    """What the rounded model computes against the floats it was rounded from."""
    want, found = floats(tokens), rounded(tokens)
    error = jnp.sqrt(jnp.mean((found.logits - want.logits) ** 2) / jnp.mean(want.logits**2))
    routing = [_by_token(output) for output in (found, want)]
    chosen = [chosen_experts(m.config, m.weights, r) for m, r in zip((rounded, floats), routing, strict=True)]
    same = found.logits.argmax(-1) == want.logits.argmax(-1)
    return {
        "logits": float(error),
        "router_kl_by_layer": drift(*routing).tolist(),
        "experts": float(top_k_overlap(*chosen).mean()),
        "tokens": float(same.mean()),
        "megabytes": megabytes(rounded),
    }


def _by_token(output: Output) -> jax.Array:
    """Router logits [L, B * T, E]."""
    layers, *_, experts = output.router_logits.shape
    return output.router_logits.reshape(layers, -1, experts)


def megabytes(model: Model) -> float:
    """Bytes of all parameters / 10^6."""
    return sum(value.nbytes for value in model.params.values()) / 1e6


def measure(family: str, seeds: int) -> list[dict]:
    """One row a method: means over the seeds."""
    found: dict[str, list[dict]] = {method: [] for method in METHODS}
    for seed in range(seeds):
        floats, tokens = draw(network(family), seed)
        for method in METHODS:
            rounded = Model(*quantise_params(floats.config, floats.params, method))
            found[method].append(compare(floats, rounded, tokens))
    held = {"family": family, "float32_megabytes": megabytes(floats)}
    return [{**held, "method": method, **_mean(runs)} for method, runs in found.items()]


def _mean(runs: Sequence[dict]) -> dict:
    """Means of numbers, and of lists place by place."""
    return {
        key: [fmean(places) for places in zip(*(run[key] for run in runs), strict=True)]
        if isinstance(value, list)
        else fmean(run[key] for run in runs)
        for key, value in runs[0].items()
    }


def table(results: dict) -> str:
    """The results as Markdown."""
    lines = [
        "# Error of quantised weights",
        "",
        "`python experiments/quantised_error.py` wrote this file; its docstring says what the columns are.",
        "",
        f"Small networks with random weights (width {WIDTH}, {TINY['num_hidden_layers']} layers), rounded, "
        f"against themselves in float32; means over {results['seeds']} seeds, {ROWS * LENGTH} tokens each. "
        "A fact about rounding, not about the quality of a real model: nothing here is trained.",
        "",
        "| family | weights | logits | router KL, mean | router KL, last | experts | tokens | MB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results["measurements"]:
        if row["method"] == METHODS[0]:
            lines.append(
                f"| {row['family']} | float32 | 0 | 0 | 0 | 1 | 1 | {row['float32_megabytes']:.2f} |"
            )
        kl = row["router_kl_by_layer"]
        lines.append(
            f"| | {row['method']} | {row['logits']:.4f} | {fmean(kl):.5f} | {kl[-1]:.5f} "
            f"| {row['experts']:.3f} | {row['tokens']:.3f} | {row['megabytes']:.2f} |"
        )
    return "\n".join([*lines, "", ", ".join(f"{k} {v}" for k, v in results["environment"].items()), ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures every family and writes quantised_error.json and quantised_error.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--output", type=Path, default=HERE)
    given = parser.parse_args(arguments)
    rows = []
    for family in given.families:
        rows += measure(family, given.seeds)
        print(json.dumps(rows[-len(METHODS) :]), flush=True)
    environment = {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }
    results = {"environment": environment, "seeds": given.seeds, "measurements": rows}
    (given.output / "quantised_error.json").write_text(json.dumps(results, indent=1) + "\n")
    (given.output / "quantised_error.md").write_text(table(results))


if __name__ == "__main__":
    main()
