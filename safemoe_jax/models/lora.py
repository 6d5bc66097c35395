"""Adding, merging and describing low-rank adapters.

Legend: R layers of a stack, X leading axes (experts), I inputs, O outputs, r rank.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from safemoe_jax.errors import InputError
from safemoe_jax.models.config import LoraConfig, ModelConfig
from safemoe_jax.models.params import Params, count, initialise, is_adapter, is_correction
from safemoe_jax.models.quantisation import dequantise_params, held_weight
from safemoe_jax.models.quantised import Quantised, Weight, dense
from safemoe_jax.models.transformer import declare

EXPERT_TARGETS = {"mlp.experts.gate_up_proj": "gate_up", "mlp.experts.down_proj": "down"}
TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "gate",
    "shared_expert_gate",
    *EXPERT_TARGETS,
)
"""Every projection that some model has, by the last part of its Hugging Face name; "gate" is the router."""


@functools.cache
def lora_targets(config: ModelConfig) -> tuple[str, ...]:
    """The targets that this network has: those that declare an adapter when they are asked for.

    As in PEFT, a target adapts every module of its name: down_proj the dense layers and the shared experts.
    """
    return tuple(target for target in TARGETS if _declares_adapter(config, target))


def _declares_adapter(config: ModelConfig, target: str) -> bool:
    return any(map(is_adapter, declare(replace(config, lora=LoraConfig(rank=1, targets=(target,))))))


def default_targets(config: ModelConfig) -> tuple[str, ...]:
    """The targets of a run that names none.

    Queries and values, PEFT's own choice for the families that it has one for. Latent attention makes its
    values by a down projection that keys share and an up projection that keys share: both, and the queries'.
    PEFT has no choice for it.
    """
    if config.mla is None:
        return ("q_proj", "v_proj")
    queries = ("q_proj",) if config.mla.q_rank is None else ("q_a_proj", "q_b_proj")
    return (*queries, "kv_a_proj_with_mqa", "kv_b_proj")


def with_targets(config: ModelConfig, lora: LoraConfig) -> LoraConfig:
    """The adapters with their targets named: the network's defaults where there are none."""
    return lora if lora.targets is not None else replace(lora, targets=default_targets(config))


def with_adapters(config: ModelConfig, lora: LoraConfig) -> ModelConfig:
    """The config of the network with adapters, on `default_targets` where no targets are given.

    Raises:
        InputError: a target matches no projection, no target is named, or the rank is below 1.
    """
    if lora.rank < 1:
        raise InputError(f"LoRA rank {lora.rank}", where="lora.rank", expected="a rank of at least 1")
    lora, known = with_targets(config, lora), lora_targets(replace(config, lora=None))
    unknown = [target for target in lora.targets if target not in known]
    if unknown or not lora.targets:
        what = f"LoRA target {unknown[0]!r} matches no projection" if unknown else "no LoRA target is named"
        raise InputError(what, where="lora.targets", expected=f"some of {', '.join(known)}")
    return replace(config, lora=lora)


def add_adapters(
    config: ModelConfig, params: Params, lora: LoraConfig, key: jax.Array, mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """Adds float32 adapters that change nothing yet (B = 0).

    Returns:
        The config with adapters and the parameters with their factors.
    """
    config = with_adapters(config, lora)
    factors = {name: spec for name, spec in declare(config).items() if is_adapter(name)}
    return config, {**params, **initialise(factors, key, dtype=jnp.float32, mesh=mesh)}


def merge_adapters(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Adds every adapter's update to its kernel and drops the factors; quantised weights become floats.

    The sum is taken in float32, one layer of one kernel at a time, and rounded once: to the kernel's dtype,
    or the embedding's where the kernel was quantised.
    """
    if config.lora is None:
        return dequantise_params(config, params)
    factors, dtype = _factors(params), jnp.dtype(params["embed.embedding"].dtype)
    merged = {}
    for name, (a_RXIr, b_RXrO) in factors.items():
        weight = held_weight(config, params, name)
        array = weight[0] if isinstance(weight, Quantised) else weight
        rounded_to = dtype if isinstance(weight, Quantised) else array.dtype
        add = jax.jit(_add_update, static_argnums=(3, 4), out_shardings=array.sharding)
        merged[name] = add(weight, a_RXIr, b_RXrO, config.lora.scale, rounded_to)
    rest = {
        name: value
        for name, value in params.items()
        if not is_adapter(name) and name.removesuffix(".values").removesuffix(".scales") not in merged
    }
    config, floats = dequantise_params(config, rest)
    return replace(config, lora=None), {**floats, **merged}


def _factors(params: Params) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The factors of every adapted kernel, by the kernel's name; gate and up share their a."""
    factors = {}
    for name in params:
        if not name.endswith("lora_a"):
            continue
        a, b = params[name], params[name[:-1] + "b"]
        if name.endswith("gate_up_lora_a"):
            stem = name.removesuffix("gate_up_lora_a")
            for target, half in zip(("gate", "up"), jnp.split(b, 2, axis=-1), strict=True):
                factors[stem + target] = a, half
        elif name.endswith("down_lora_a"):
            factors[name.removesuffix("_lora_a")] = a, b
        else:
            factors[name.removesuffix("lora_a") + "kernel"] = a, b
    return factors


def _add_update(
    weight: Weight, a_RXIr: jax.Array, b_RXrO: jax.Array, scale: float, dtype: jnp.dtype
) -> jax.Array:
    """weight + scale * a b, [R, X, I, O] in this dtype; only one of the R layers is in float32 at a time."""

    def one_layer(layer: tuple[Weight, jax.Array, jax.Array]) -> jax.Array:
        weight, a_XIr, b_XrO = layer
        a_XIr, b_XrO = a_XIr.astype(jnp.float32), b_XrO.astype(jnp.float32)
        update_XIO = scale * jnp.matmul(a_XIr, b_XrO, precision="highest")
        return (dense(weight, jnp.float32) + update_XIO).astype(dtype)

    return jax.lax.map(one_layer, (weight, a_RXIr, b_RXrO))


def describe(config: ModelConfig) -> str:
    """One line for the user: what is adapted and which share of the parameters trains."""
    specs = declare(replace(config, quantisation=None))
    total = count({name: spec for name, spec in specs.items() if not is_adapter(name)})
    if config.lora is None:
        fixed = count({name: spec for name, spec in specs.items() if is_correction(name)})
        kept = f"; the routers' {fixed:,} correction biases stay" if fixed else ""
        return f"full fine-tuning: all {total - fixed:,} parameters train{kept}"
    adapters = {name: spec for name, spec in specs.items() if is_adapter(name)}
    trained = count(adapters)
    places = sum(spec.shape[0] for name, spec in adapters.items() if name.endswith("lora_a"))
    targets = ", ".join(config.lora.targets)
    return (
        f"LoRA r {config.lora.rank} on {targets}: {places} projections, "
        f"{trained:,} of {total:,} parameters train ({trained / total:.3%})"
    )
