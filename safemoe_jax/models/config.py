"""What the network is (`ModelConfig`) and how it is computed (`Compute`): frozen, static under jit."""

from __future__ import annotations

import functools
from dataclasses import dataclass

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
        targets: projections that get an adapter, by the last part of their name (`models.lora.TARGETS`):
            q_proj, v_proj, ..., down_proj, gate (the router, only when named), mlp.experts.gate_up_proj, ...
            null is q_proj and v_proj; with latent attention, which has no v_proj, all projections that make
            queries, keys and values: q_proj (or q_a_proj, q_b_proj), kv_a_proj_with_mqa and kv_b_proj.
    """

    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] | None = None

    @property
    def scale(self) -> float:
        """Factor of the low-rank update."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. Scaling fields mean what they mean in transformers' `rope_parameters`.

    Attributes:
        theta: base frequency.
        dim: leading dimensions of a head that are rotated, or None for all.
        interleaved: pairs are (2i, 2i + 1), not (i, i + dim / 2).
        kind: "default", "linear", "yarn", "llama3" or "longrope".
        factor: context extension factor.
        original_max_positions: longest sequence before the extension.
        attention_factor: multiplier of cos and sin, or None for the kind's own rule.
        beta_fast, beta_slow, truncate, mscale, mscale_all_dim: yarn.
        low_freq_factor, high_freq_factor: llama3.
        short_factor, long_factor, short_mscale, long_mscale: longrope.
    """

    theta: float = 10000.0
    dim: int | None = None
    interleaved: bool = False
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    short_mscale: float | None = None
    long_mscale: float | None = None


@dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434). The rotary part is `rope_dim` wide.

    Attributes:
        q_rank: rank of the query's latent, or None for a full query projection.
        kv_rank: rank of the shared key/value latent.
        nope_dim, rope_dim, v_dim: widths of a head: unrotated and rotated part of q and k, and value.
        norm_eps: epsilon of the latent norms, which does not follow the config's.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class RoutingConfig:
    """How experts are chosen and weighted, given the router logits.

    Attributes:
        kind: "softmax" (softmax, then top-k), "softmax_chosen" (top-k, then softmax over the chosen),
            "sigmoid_input" (top-k, sigmoid, applied to the expert's input), "sigmoid" (sigmoid scores,
            chosen with the correction bias added), "sparsemixer" (two masked picks).
        bias: the router has a bias; its logits include it.
        correction_bias: a bias added for the choice only.
        groups, top_groups: experts are chosen within the best `top_groups` of `groups`; 1 and 1 is no limit.
        group_score: "max" or "top2" (sum of the two best), what groups are compared by.
        scale: factor of the combine weights.
        weight_floor: added to the sum that renormalisation divides by.
        smallest_sum: the least that renormalisation divides by.
        jitter: sparsemixer's threshold.
        float32_logits: the router computes in float32 even where activations are bfloat16.
        float32_weights: combine weights stay float32 there.
    """

    kind: str = "softmax"
    bias: bool = False
    correction_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    scale: float = 1.0
    weight_floor: float = 0.0
    smallest_sum: float = 0.0
    jitter: float = 0.0
    float32_logits: bool = False
    float32_weights: bool = False


@dataclass(frozen=True)
class LayerConfig:
    """What distinguishes one layer from its neighbours. Only `kind` changes the shapes of parameters.

    Attributes:
        kind: "moe" or "dense".
        window: a query sees this many last keys, its own included; 0 is all.
        chunk: a query sees keys of its own chunk of this many positions; 0 is all.
        rope: positions are rotated.
        temperature: queries are scaled by position (`ModelConfig.query_temperature`).
    """

    kind: str = "moe"
    window: int = 0
    chunk: int = 0
    rope: bool = True
    temperature: bool = False


@dataclass(frozen=True)
class Segment:
    """Layers that one scan computes: `pattern` (the kinds of layer in one repeat) times `repeats`."""

    pattern: tuple[str, ...]
    repeats: int
    first_layer: int


@dataclass(frozen=True)
class ModelConfig:
    """One decoder, MoE or dense. Read from a checkpoint by `families`; never built from a family's defaults.

    Attributes:
        family: Hugging Face `model_type`.
        vocab_size, d_model, n_layers, n_heads, n_kv_heads, head_dim: sizes.
        norm_eps: epsilon of every norm.
        norm: "rms", "rms_float32" (the scale is applied before the cast back) or "layer" (LayerNorm, bias).
        rope: rotary embedding.
        mla: latent attention in the place of grouped-query attention, or None.
        clip_qkv: clamp of q, k and v to [-clip_qkv, clip_qkv] before the rotary embedding, or None.
        attention_bias: biases on q, k and v (MLA: on the down projections).
        output_bias: bias on o.
        attention_scale: factor of the scores, or None for head_dim ** -0.5.
        qk_norm: "none", "full" (RMS over the full width before the head reshape), "head" (RMS a head, before
            the rotary embedding) or "l2_after_rope" (RMS a head without weight, after it, on rotated layers).
        sinks: a learned logit a head joins the softmax and is dropped from it.
        query_temperature: (scale, floor): q is multiplied by 1 + scale * log1p(floor((position + 1) / floor))
            on layers that say so, or None.
        n_experts, top_k, expert_dim: routed experts, how many a token gets, their inner width; 0 without any.
        norm_topk_prob: renormalise the chosen experts' probabilities to sum to 1.
        routing: how experts are chosen.
        activation: "silu" (SwiGLU), or "clamped" (gpt_oss: clamped, shifted, sigmoid of 1.702).
        activation_limit, activation_alpha: the clamp of "clamped" and the slope of its sigmoid.
        expert_bias: biases on the experts' projections.
        shared_dim: inner width of the shared expert, or 0.
        shared_gate: the shared expert's output is multiplied by the sigmoid of a learned gate.
        dense_dim: inner width of a dense layer's feed-forward.
        mlp_bias: biases on the projections of dense layers and of the shared expert.
        embedding_scale, residual_scale, logits_divisor: granite's multipliers.
        tie_embeddings: the output projection is the embedding table.
        lm_head_bias: bias of the output projection.
        initializer_range: standard deviation of random initialisation.
        router_aux_coef: load-balancing coefficient that the checkpoint's config asks for (training decides).
        max_positions: longest sequence that the checkpoint was made for.
        layers: one entry a layer; all the same MoE layer by default.
        lora: adapters, or None.
        quantisation: "int8", "int4" or "int4-64": how the kernels of attention, experts and feed-forwards are
            held (`models.quantised`), or None for floats. How a model is loaded, not what it is.
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
    norm: str = "rms"
    rope: RopeConfig = RopeConfig()
    mla: MlaConfig | None = None
    clip_qkv: float | None = None
    attention_bias: bool = False
    output_bias: bool = False
    attention_scale: float | None = None
    qk_norm: str = "none"
    sinks: bool = False
    query_temperature: tuple[float, float] | None = None
    norm_topk_prob: bool = False
    routing: RoutingConfig = RoutingConfig()
    activation: str = "silu"
    activation_limit: float = 7.0
    activation_alpha: float = 1.702
    expert_bias: bool = False
    shared_dim: int = 0
    shared_gate: bool = False
    dense_dim: int = 0
    mlp_bias: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    tie_embeddings: bool = False
    lm_head_bias: bool = False
    initializer_range: float = 0.02
    router_aux_coef: float = 0.0
    max_positions: int = 4096
    layers: tuple[LayerConfig, ...] = ()
    lora: LoraConfig | None = None
    quantisation: str | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            object.__setattr__(self, "layers", (LayerConfig(),) * self.n_layers)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The layers as repeated patterns of kinds, in order; see `factor_layers`."""
        return factor_layers(tuple(layer.kind for layer in self.layers))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have a router."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.kind == "moe")

    @property
    def n_moe_layers(self) -> int:
        """Number of layers that have a router."""
        return len(self.moe_layers)


@functools.cache
def factor_layers(kinds: tuple[str, ...]) -> tuple[Segment, ...]:
    """Layers as few scans: greedily, the pattern that covers most layers from where the last one ended.

    A pattern of several kinds counts only where it repeats; among equal covers the shorter pattern wins.
    """
    segments, first = [], 0
    while first < len(kinds):
        left = kinds[first:]
        lengths = range(1, max(2, len(left) // 2 + 1))
        covers = [(length, _repeats(left, length)) for length in lengths]
        length, repeats = max(
            (cover for cover in covers if cover[0] == 1 or cover[1] > 1),
            key=lambda cover: cover[0] * cover[1],
        )
        segments.append(Segment(left[:length], repeats, first))
        first += length * repeats
    return tuple(segments)


def _repeats(kinds: tuple[str, ...], length: int) -> int:
    """How often the first `length` kinds follow one another from the start."""
    n = 1
    while kinds[n * length : (n + 1) * length] == kinds[:length]:
        n += 1
    return n


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
