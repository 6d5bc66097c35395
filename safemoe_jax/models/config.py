"""What the network is (`ModelConfig`) and how it is computed (`Compute`): frozen, static under jit."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import jax.numpy as jnp
from jax.sharding import Mesh

from safemoe_jax.errors import InputError
from safemoe_jax.parallel.mesh import mesh_axis_sizes


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA) on named projections.

    Attributes:
        rank: rank of the update.
        alpha: the update is scaled by alpha / rank.
        targets: projections that get an adapter: q_proj, k_proj, v_proj, o_proj, gate (the router, only when
            named), mlp.experts.gate_up_proj, mlp.experts.down_proj.
    """

    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    @property
    def scale(self) -> float:
        """Factor of the low-rank update."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base frequency; pairs are (i, i + head_dim / 2)."""

    theta: float = 10000.0


@dataclass(frozen=True)
class Segment:
    """Layers that one scan computes: `pattern` (the kinds of layer in one repeat) times `repeats`."""

    pattern: tuple[str, ...]
    repeats: int
    first_layer: int


@dataclass(frozen=True)
class ModelConfig:
    """One MoE decoder. Read from a checkpoint by `families`; never built from a family's defaults.

    Attributes:
        family: Hugging Face `model_type`.
        vocab_size, d_model, n_layers, n_heads, n_kv_heads, head_dim: sizes.
        norm_eps: epsilon of every RMS norm.
        rope: rotary embedding.
        clip_qkv: clamp of q, k and v to [-clip_qkv, clip_qkv] before the rotary embedding, or None.
        attention_bias: biases on q, k, v and o.
        qk_norm: "none", or "full" (RMS over the full width before the head reshape).
        n_experts, top_k, expert_dim: routed experts, how many a token gets, their inner width.
        norm_topk_prob: renormalise the chosen experts' probabilities to sum to 1.
        tie_embeddings: the output projection is the embedding table.
        initializer_range: standard deviation of random initialisation.
        router_aux_coef: load-balancing coefficient that the checkpoint's config asks for (training decides).
        max_positions: longest sequence that the checkpoint was made for.
        layer_kinds: the kind of every layer, "moe" for each one here.
        lora: adapters, or None.
    """

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    n_experts: int
    top_k: int
    expert_dim: int
    rope: RopeConfig = RopeConfig()
    clip_qkv: float | None = None
    attention_bias: bool = False
    qk_norm: str = "none"
    norm_topk_prob: bool = False
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    router_aux_coef: float = 0.0
    max_positions: int = 4096
    layer_kinds: tuple[str, ...] = ()
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        if not self.layer_kinds:
            object.__setattr__(self, "layer_kinds", ("moe",) * self.n_layers)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The layers as runs of equal kind, in order."""
        segments, first = [], 0
        for kind, run in groupby(self.layer_kinds):
            repeats = len(tuple(run))
            segments.append(Segment((kind,), repeats, first))
            first += repeats
        return tuple(segments)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have a router."""
        return tuple(i for i, kind in enumerate(self.layer_kinds) if kind == "moe")

    @property
    def n_moe_layers(self) -> int:
        """Number of layers that have a router."""
        return len(self.moe_layers)


@dataclass(frozen=True)
class Compute:
    """How the network is computed; changes speed and rounding, never the function.

    Attributes:
        dtype: "float32" or "bfloat16", the type of activations and of the weights as they are used.
        experts: the expert kernel: auto, dense, blocks, ragged or megablox (`models.grouped_matmul`).
        remat: "none", or "full" (a layer's activations are recomputed in the backward pass).
        mesh: the devices, or None for one.
    """

    dtype: str = "float32"
    experts: str = "auto"
    remat: str = "none"
    mesh: Mesh | None = None

    @property
    def jnp_dtype(self) -> jnp.dtype:
        """The activations' dtype."""
        return jnp.dtype(self.dtype)


def check_mesh(config: ModelConfig, mesh: Mesh | None) -> None:
    """Refuses a mesh that does not divide the network.

    Raises:
        InputError: names the size that does not divide and the mesh axis.
    """
    rules = (
        ("n_heads", config.n_heads, "tensor"),
        ("n_kv_heads", config.n_kv_heads, "tensor"),
        ("expert width", config.expert_dim, "tensor"),
        ("vocabulary size", config.vocab_size, "tensor"),
        ("model width", config.d_model, "fsdp"),
        ("number of experts", config.n_experts, "expert"),
    )
    for what, size, axis in rules:
        shards = mesh_axis_sizes(mesh, axis)
        if size % shards:
            raise InputError(
                f"the mesh does not divide the model: {what} {size} over {shards} shards",
                where=f"mesh axis '{axis}'",
                expected=f"a size of '{axis}' that divides {size}",
            )
