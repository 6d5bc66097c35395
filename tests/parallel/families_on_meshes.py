"""Run with eight CPU devices: unlike networks on one device and on two meshes; differences, as JSON.

Three with float weights, all of which train, and one that is read into 8 and 4 bits, under adapters.

Logits, loss and the gradient of every parameter in one step on packed rows. A difference is relative to the
largest number of the array that one device computes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from safemoe_jax.model import Model, load_pretrained
from safemoe_jax.models import (
    Compute,
    LayerConfig,
    LoraConfig,
    MlaConfig,
    ModelConfig,
    RopeConfig,
    RoutingConfig,
    Weights,
    declare,
    split_trainable,
)
from safemoe_jax.models.lora import add_adapters
from safemoe_jax.models.params import ParamSpec, shardings
from safemoe_jax.models.quantised import Quantisation
from safemoe_jax.models.transformer import unembed
from safemoe_jax.parallel.mesh import MeshConfig, make_mesh
from safemoe_jax.training.step import TaskConstants, TaskStep, batch_shardings
from tests.models import quantisable
from tests.models.quantisable import OLMOE

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
DATA = "data 2, fsdp 2, tensor 2"
MESHES = {
    DATA: MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp 2, expert 2, tensor 2": MeshConfig(fsdp=2, expert=2, tensor=2),
}
# Every kind of attention and of expert meets fsdp, expert and tensor on the second mesh. Data splits rows, as
# fsdp does, whatever is computed of them: for it one network in floats and each container are enough.
ON_DATA = ("sinks, windows, biases", "int8, adapters on down", "int4, adapters on gate and up")

# A device gets its part of each weight as it is rounded, and of an adapted one its parts of the factors too:
# either container with and without them. The width that devices cut is that of the inputs of down: its blocks
# of 4 bits are here without factors, and with them in the runs of `tests/training/children.py`.
ROUNDED = {
    "int8, adapters on down": ("int8", LoraConfig(4, 8.0, ("v_proj", "mlp.experts.down_proj"))),
    "int4, adapters on gate and up": (
        "int4",
        LoraConfig(4, 8.0, ("q_proj", "o_proj", "mlp.experts.gate_up_proj")),
    ),
}
# The experts' width is three blocks of 4 bits, which two devices share. As there are many experts, each gets
# few rows: the kernel has one size of block to compile, not three.
THREE_BLOCKS = replace(OLMOE, expert_dim=96, n_experts=32)


def cases(networks: Iterable[str]) -> list[tuple[str, str]]:
    """Each network with each mesh that it is computed on."""
    return [(network, mesh) for network in networks for mesh in MESHES if mesh != DATA or network in ON_DATA]


def parameters(config: ModelConfig) -> dict[str, np.ndarray]:
    """Random parameters; those that start as zeros or ones are random too."""
    rng, stddev = np.random.default_rng(2), config.initializer_range

    def draw(spec: ParamSpec) -> np.ndarray:
        noise = rng.normal(size=spec.shape).astype(np.float32)
        return stddev * noise if spec.init == "normal" else 0.3 * noise + (spec.init == "ones")

    return {name: draw(spec) for name, spec in declare(config).items()}


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


def computed(config: ModelConfig, weights: Weights, mesh: Mesh) -> dict[str, np.ndarray]:
    """Logits, losses and gradients by name, on weights that lie on the mesh."""
    batch = packed_batch(config.vocab_size)
    compute = Compute(mesh=mesh if mesh.size > 1 else None)
    step = TaskStep(config, compute, mesh, router_aux_coef=0.1, loss_term=logits_beside)
    placed = jax.device_put(batch, batch_shardings(batch, mesh))
    gradient, metrics = jax.jit(step.gradient)(weights.frozen, weights.trainable, placed, TaskConstants())
    return {name: np.asarray(value) for name, value in {**metrics, **gradient}.items()}


def drawn(config: ModelConfig, mesh: Mesh) -> Weights:
    """Random weights on the mesh, all of which train."""
    return Weights({}, jax.device_put(parameters(config), shardings(declare(config), mesh)))


def rounded(
    folder: Path, quantisation: Quantisation, lora: LoraConfig, mesh: Mesh
) -> tuple[ModelConfig, Weights]:
    """A checkpoint in 8 or 4 bits on the mesh; its adapters change something."""
    model = load_pretrained(folder, mesh=mesh if mesh.size > 1 else None, quantisation=quantisation)
    config, params = add_adapters(model.config, model.params, lora, jax.random.key(1), mesh)
    weights = split_trainable(config, params)
    factors = {k: v + 0.05 if k.endswith("lora_b") else v for k, v in weights.trainable.items()}
    return config, Weights(weights.frozen, factors)


def spread(weights: Weights) -> int:
    """Over how many places the experts are spread."""
    names = "moe.experts.gate", "moe.experts.gate.values"
    params = weights.frozen | weights.trainable
    experts = next(value for name, value in params.items() if name.endswith(names))
    return len({str(shard.index) for shard in experts.addressable_shards})


def differences(one: dict[str, np.ndarray], many: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest of each array, relative to what one device computes."""
    assert one.keys() == many.keys()
    off = {name: np.abs(many[name] - value).max() for name, value in one.items()}
    return {name: float(off[name] / max(np.abs(value).max(), 1e-30)) for name, value in one.items()}


def main() -> None:
    """By network and mesh: differences, how the experts were spread, which frozen weights are unequal."""
    report = {"shards": {}, "differences": {}, "unequal": {}}
    whole, meshes = make_mesh(MeshConfig()), {name: make_mesh(sizes) for name, sizes in MESHES.items()}
    for network, config in NETWORKS.items():
        one = computed(config, drawn(config, whole), whole)
        for _, name in cases([network]):
            mesh, case = meshes[name], f"{network}; {name}"
            weights = drawn(config, mesh)
            report["shards"][case] = spread(weights)
            report["differences"][case] = differences(one, computed(config, weights, mesh))
    with tempfile.TemporaryDirectory() as folder:
        Model(THREE_BLOCKS, quantisable.drawn(THREE_BLOCKS)).save_pretrained(folder)
        for network, how in ROUNDED.items():
            config, held = rounded(Path(folder), *how, whole)
            one = computed(config, held, whole)
            for _, name in cases([network]):
                mesh, case = meshes[name], f"{network}; {name}"
                _, weights = rounded(Path(folder), *how, mesh)
                report["shards"][case] = spread(weights)
                report["differences"][case] = differences(one, computed(config, weights, mesh))
                pairs = {key: (value, weights.frozen[key]) for key, value in held.frozen.items()}
                report["unequal"][case] = [key for key, pair in pairs.items() if not np.array_equal(*pair)]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
