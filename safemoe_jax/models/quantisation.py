"""Quantising a whole network, and bringing it back."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp

from safemoe_jax.errors import InputError
from safemoe_jax.models.config import ModelConfig
from safemoe_jax.models.params import Params, ParamSpec, is_quantised
from safemoe_jax.models.quantised import Int4, Int8, Quantisation, Weight, dequantise, quantise
from safemoe_jax.models.transformer import declare


def quantised_weights(config: ModelConfig, quantisation: Quantisation) -> dict[str, ParamSpec]:
    """The weights that are held in 8 or 4 bits, by their name without quantisation, as they are declared.

    Kernels of attention, of experts routed and shared, and of dense feed-forwards; not embeddings, routers,
    norms, biases, nor adapters.

    Raises:
        InputError: 4 bits, and the block does not divide a weight's inputs.
    """
    parts = declare(replace(config, quantisation=quantisation))
    floats = declare(replace(config, quantisation=None))
    return {name: spec for name, spec in floats.items() if f"{name}.values" in parts}


def quantise_params(
    config: ModelConfig, params: Params, quantisation: Quantisation
) -> tuple[ModelConfig, Params]:
    """The network with its weights rounded to 8 or 4 bits; adapters stay beside them as they are.

    `load_pretrained(..., quantisation=...)` does the same while it reads, without the float weights.

    Raises:
        InputError: the weights are quantised already, or 4 bits, and the block does not divide a weight's
            inputs.
    """
    if config.quantisation is not None:
        raise InputError(
            f"the weights are held in {config.quantisation} already",
            where="quantise_params",
            expected="the weights in floats, which are rounded once",
        )
    chosen = quantised_weights(config, quantisation)
    parts = {name: value for name, value in params.items() if name not in chosen}
    rounded = jax.jit(quantise, static_argnums=1)
    for name in chosen:
        values, scales = rounded(params[name], quantisation)
        parts |= {f"{name}.values": values, f"{name}.scales": scales}
    return replace(config, quantisation=quantisation), parts


def dequantise_params(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The same function with float weights, in the dtype of the embedding; the network as it is without
    quantisation."""
    if config.quantisation is None:
        return config, params
    back, dtype = jax.jit(dequantise, static_argnums=1), jnp.dtype(params["embed.embedding"].dtype)
    floats = {name: value for name, value in params.items() if not is_quantised(name)}
    for name in params:
        if name.endswith(".values"):
            stem = name.removesuffix(".values")
            floats[stem] = back(held_weight(config, params, stem), dtype)
    return replace(config, quantisation=None), floats


def held_weight(config: ModelConfig, params: Params, name: str) -> Weight:
    """The weight of this name as it is held: an array, or one in 8 or 4 bits."""
    if name in params:
        return params[name]
    container = Int8 if config.quantisation == "int8" else Int4
    return container(params[f"{name}.values"], params[f"{name}.scales"])


def describe_base(config: ModelConfig, params: Params) -> str | None:
    """One line for the user on what the quantised weights take; None for float weights."""
    if config.quantisation is None:
        return None
    held = sum(value.nbytes for name, value in params.items() if is_quantised(name))
    scalars = sum(math.prod(spec.shape) for spec in quantised_weights(config, config.quantisation).values())
    return (
        f"base weights: {config.quantisation}, {held / 1e6:,.1f} MB ({scalars * 4 / 1e6:,.1f} MB in float32)"
    )
