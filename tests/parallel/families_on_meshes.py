"""Run with eight CPU devices: three unlike networks on one device and on two meshes; differences, as JSON.

Logits, loss and the gradient of every parameter in one step on packed rows. A difference is relative to the
largest number of the array that one device computes.
"""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from safemoe_jax.models import (
    Compute,
    LayerConfig,
    MlaConfig,
    ModelConfig,
    RopeConfig,
    RoutingConfig,
    declare,
    initialise,
)
from safemoe_jax.models.params import Params, shardings
from safemoe_jax.models.transformer import unembed
from safemoe_jax.parallel.mesh import MeshConfig, make_mesh
from safemoe_jax.training.step import TaskConstants, TaskStep, batch_shardings

ROWS, LENGTH, TARGETS = 8, 12, 5
BASE = ModelConfig(
    family="any", vocab_size=24, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, norm_eps=0.02,
    n_experts=4, top_k=2, expert_dim=8, initializer_range=0.4,
)  # fmt: skip
NETWORKS = {
    "latent attention, groups, a dense layer": replace(
        BASE,
        n_kv_heads=4,
        rope=RopeConfig(interleaved=True),
        mla=MlaConfig(q_rank=6, kv_rank=10, nope_dim=6, rope_dim=4, v_dim=8),
        routing=RoutingConfig(
            "sigmoid", correction_bias=True, groups=2, top_groups=1, group_score="top2", scale=2.5
        ),
        norm_topk_prob=True,
        shared_dim=8,
        dense_dim=12,
        layers=(LayerConfig(kind="dense"), LayerConfig(), LayerConfig()),
    ),
    "chunks, layers without rotation, scaled inputs": replace(
        BASE,
        top_k=1,
        qk_norm="l2_after_rope",
        query_temperature=(0.5, 3.0),
        routing=RoutingConfig("sigmoid_input"),
        shared_dim=8,
        layers=(
            LayerConfig(chunk=4),
            LayerConfig(rope=False, temperature=True),
            LayerConfig(chunk=4),
        ),
    ),
    "sinks, windows, biases": replace(
        BASE,
        sinks=True,
        attention_bias=True,
        output_bias=True,
        activation="clamped",
        expert_bias=True,
        routing=RoutingConfig("softmax_chosen", bias=True),
        layers=(LayerConfig(window=3), LayerConfig(), LayerConfig(window=3)),
    ),
}
MESHES = {
    "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp 2, expert 2, tensor 2": MeshConfig(fsdp=2, expert=2, tensor=2),
}


def parameters(config: ModelConfig) -> Params:
    """Random parameters; those that start as zeros or ones are random too."""
    specs = declare(config)
    params = initialise(specs, jax.random.key(1), stddev=config.initializer_range)
    rng = np.random.default_rng(2)
    for name, spec in specs.items():
        if spec.init in ("zeros", "ones"):
            params[name] = params[name] + 0.3 * rng.normal(size=spec.shape).astype(np.float32)
    return params


def packed_batch(vocab_size: int) -> dict[str, np.ndarray]:
    """Rows of two samples each and some padding."""
    rng = np.random.default_rng(3)
    cut, end = rng.integers(4, 7, (ROWS, 1)), rng.integers(9, LENGTH + 1, (ROWS, 1))
    columns = np.arange(LENGTH)
    segments = np.where(columns < cut, 1, np.where(columns < end, 2, 0))
    return {
        "tokens": rng.integers(0, vocab_size, (ROWS, LENGTH)).astype(np.int32),
        "segment_ids": segments.astype(np.int32),
        "positions": np.where(columns < cut, columns, columns - cut).astype(np.int32),
        "target_index": np.sort(rng.integers(0, 9, (ROWS, TARGETS))).astype(np.int32),
        "targets": rng.integers(0, vocab_size, (ROWS, TARGETS)).astype(np.int32),
        "target_weights": (rng.random((ROWS, TARGETS)) < 0.8).astype(np.float32),
    }


def logits_beside(config, weights, output, batch, constants):
    """No term in the loss: the logits of real tokens, and the router logits, among the step's metrics."""
    real_NT1 = batch["segment_ids"][..., None] > 0
    logits = jnp.where(real_NT1, unembed(config, weights, output.hidden), 0)
    return 0.0, {"logits": logits, "router_logits": jnp.where(real_NT1, output.router_logits, 0)}


def computed(config: ModelConfig, sizes: MeshConfig) -> tuple[dict[str, np.ndarray], int]:
    """Logits, losses and gradients by name on one mesh, and over how many places the experts are spread."""
    mesh = make_mesh(sizes)
    batch = packed_batch(config.vocab_size)
    params = jax.device_put(parameters(config), shardings(declare(config), mesh))
    compute = Compute(mesh=mesh if mesh.size > 1 else None)
    step = TaskStep(config, compute, mesh, router_aux_coef=0.1, loss_term=logits_beside)
    placed = jax.device_put(batch, batch_shardings(batch, mesh))
    gradient, metrics = jax.jit(step.gradient)({}, params, placed, TaskConstants())
    experts = next(value for name, value in params.items() if name.endswith("moe.experts.gate"))
    places = {str(shard.index) for shard in experts.addressable_shards}
    return {name: np.asarray(value) for name, value in {**metrics, **gradient}.items()}, len(places)


def main() -> None:
    """Largest relative difference of each array, by network and mesh; how the experts were spread."""
    report = {"shards": {}, "differences": {}}
    for network, config in NETWORKS.items():
        one, _ = computed(config, MeshConfig())
        for mesh, sizes in MESHES.items():
            many, shards = computed(config, sizes)
            assert one.keys() == many.keys()
            report["shards"][f"{network}; {mesh}"] = shards
            report["differences"][f"{network}; {mesh}"] = {
                name: float(np.abs(many[name] - one[name]).max() / max(np.abs(one[name]).max(), 1e-30))
                for name in one
            }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
