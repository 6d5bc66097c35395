"""The decoder once more, from its equations: NumPy in float64, one token, one head and one key at a time.

Legend: T positions, D model width, H head width, N heads, E experts.
"""

from __future__ import annotations

import numpy as np

from safemoe_jax.models import LayerConfig, ModelConfig

Arrays = dict[str, np.ndarray]


def decoder(config: ModelConfig, params: Arrays, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [T, V] and router logits [L, T, E] of one sample."""
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x = params["embed.embedding"][tokens] * config.embedding_scale
    routers = []
    for index, layer in enumerate(config.layers):
        own = layer_params(config, params, index)
        h = norm(config, part(own, "input_norm"), x)
        attend = attention if config.mla is None else latent_attention
        x = x + config.residual_scale * attend(config, layer, part(own, "attention"), h)
        h = norm(config, part(own, "post_attention_norm"), x)
        if layer.kind == "dense":
            y = swiglu(h, *(own[f"mlp.{name}_proj.kernel"] for name in ("gate", "up", "down")))
        else:
            y, logits = moe(config, part(own, "moe"), h)
            routers.append(logits)
        x = x + config.residual_scale * y
    x = norm(config, part(params, "final_norm"), x)
    head = params["embed.embedding"].T if config.tie_embeddings else params["lm_head.kernel"]
    logits = (x @ head + params.get("lm_head.bias", 0.0)) / config.logits_divisor
    return logits, np.stack(routers) if routers else np.zeros((0, len(tokens), 0))


def layer_params(config: ModelConfig, params: Arrays, index: int) -> Arrays:
    """The parameters of one layer, found by counting layers through the segments."""
    first = 0
    for s, segment in enumerate(config.segments):
        for repeat in range(segment.repeats):
            for p in range(len(segment.pattern)):
                if first == index:
                    return {k: v[repeat] for k, v in part(params, f"segments.{s}.{p}").items()}
                first += 1
    raise IndexError(index)


def part(params: Arrays, prefix: str) -> Arrays:
    """The parameters under a prefix, without it."""
    return {k[len(prefix) + 1 :]: v for k, v in params.items() if k.startswith(f"{prefix}.")}


def norm(config: ModelConfig, params: Arrays, x: np.ndarray) -> np.ndarray:
    """The residual stream's norm."""
    if config.norm == "layer":
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.norm_eps) * params["scale"]
            + params["bias"]
        )
    return rms(x, config.norm_eps) * params["scale"]


def rms(x: np.ndarray, eps: float) -> np.ndarray:
    """The last axis over its root mean square."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def attention(config: ModelConfig, layer: LayerConfig, params: Arrays, x: np.ndarray) -> np.ndarray:
    """Grouped-query attention of one sample [T, D]."""
    width, eps = config.head_dim, config.norm_eps
    q, k, v = (linear(part(params, f"{name}_proj"), x) for name in "qkv")
    if config.qk_norm == "full":
        q = rms(q, eps) * params["q_norm.scale"]
        k = rms(k, eps) * params["k_norm.scale"]
    q, k, v = (value.reshape(len(x), -1, width) for value in (q, k, v))
    if config.qk_norm == "head":
        q = rms(q, eps) * params["q_norm.scale"]
        k = rms(k, eps) * params["k_norm.scale"]
    if config.clip_qkv is not None:
        q, k, v = (np.clip(value, -config.clip_qkv, config.clip_qkv) for value in (q, k, v))
    if layer.rope:
        q, k = turned(config, q, config.rope.dim or width), turned(config, k, config.rope.dim or width)
        if config.qk_norm == "l2_after_rope":
            q, k = rms(q, eps), rms(k, eps)
    if layer.temperature:
        scale, floor = config.query_temperature
        for t in range(len(x)):
            q[t] *= 1 + scale * np.log1p((t + 1) // floor)
    scale = width**-0.5 if config.attention_scale is None else config.attention_scale
    y = softmax_attention(layer, q, k, v, scale, params.get("sinks"))
    return linear(part(params, "o_proj"), y.reshape(len(x), -1))


def latent_attention(config: ModelConfig, layer: LayerConfig, params: Arrays, x: np.ndarray) -> np.ndarray:
    """Multi-head latent attention of one sample [T, D]."""
    mla, n = config.mla, config.n_heads
    if mla.q_rank is None:
        q = linear(part(params, "q_proj"), x)
    else:
        latent = rms(linear(part(params, "q_a_proj"), x), mla.norm_eps) * params["q_a_norm.scale"]
        q = linear(part(params, "q_b_proj"), latent)
    q = q.reshape(len(x), n, mla.nope_dim + mla.rope_dim)
    both = linear(part(params, "kv_a_proj"), x)
    latent = rms(both[:, : mla.kv_rank], mla.norm_eps) * params["kv_a_norm.scale"]
    shared = both[:, None, mla.kv_rank :]
    kv = linear(part(params, "kv_b_proj"), latent).reshape(len(x), n, mla.nope_dim + mla.v_dim)
    q_turned = turned(config, q[..., mla.nope_dim :], mla.rope_dim)
    q = np.concatenate([q[..., : mla.nope_dim], q_turned], axis=-1)
    shared = np.repeat(turned(config, shared, mla.rope_dim), n, axis=1)
    k = np.concatenate([kv[..., : mla.nope_dim], shared], axis=-1)
    scale = config.attention_scale or (mla.nope_dim + mla.rope_dim) ** -0.5
    y = softmax_attention(layer, q, k, kv[..., mla.nope_dim :], scale, None)
    return linear(part(params, "o_proj"), y.reshape(len(x), -1))


def turned(config: ModelConfig, x: np.ndarray, dim: int) -> np.ndarray:
    """Each pair of the leading `dim` numbers as a complex number times exp(i position frequency)."""
    out, half = x.copy(), dim // 2
    for i in range(half):
        first, second = (2 * i, 2 * i + 1) if config.rope.interleaved else (i, i + half)
        angle = np.arange(len(x)) * config.rope.theta ** (-2 * i / dim)
        pair = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angle)[:, None]
        out[..., first], out[..., second] = pair.real, pair.imag
    return out


def softmax_attention(
    layer: LayerConfig,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    sinks: np.ndarray | None,
) -> np.ndarray:
    """[T, N, value width]: every query over the keys that it sees, listed one by one."""
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    for t in range(len(q)):
        seen = [s for s in range(t + 1) if sees(layer, t, s)]
        for n in range(q.shape[1]):
            g = n * k.shape[1] // q.shape[1]
            weights = np.exp([scale * q[t, n] @ k[s, g] for s in seen])
            total = weights.sum() + (0 if sinks is None else np.exp(sinks[n]))
            out[t, n] = sum(w * v[s, g] for w, s in zip(weights, seen, strict=True)) / total
    return out


def sees(layer: LayerConfig, t: int, s: int) -> bool:
    """Whether a query at t sees an earlier key at s."""
    return (not layer.window or t - s < layer.window) and (
        not layer.chunk or t // layer.chunk == s // layer.chunk
    )


def moe(config: ModelConfig, params: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Softmax routing, the k best, one token at a time; output and router logits."""
    logits = x @ params["router.kernel"]
    out = np.zeros_like(x)
    for t, row in enumerate(logits):
        probability = np.exp(row) / np.exp(row).sum()
        for e in np.argsort(-row)[: config.top_k]:
            weights = (params[f"experts.{name}"][e] for name in ("gate", "up", "down"))
            out[t] += probability[e] * swiglu(x[t], *weights)
    return out, logits


def swiglu(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """down(silu(gate(x)) up(x))."""
    g = x @ gate
    return (g / (1 + np.exp(-g)) * (x @ up)) @ down


def linear(params: Arrays, x: np.ndarray) -> np.ndarray:
    """x W + b."""
    return x @ params["kernel"] + params.get("bias", 0.0)
