"""Merging adapters into weights of other dtypes: one sum in float32, one rounding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from safemoe_jax.models import LoraConfig, ModelConfig, declare
from safemoe_jax.models.lora import _add_update, merge_adapters, with_adapters
from safemoe_jax.models.params import is_adapter
from safemoe_jax.models.quantisation import dequantise_params, quantise_params
from safemoe_jax.models.quantised import Int8
from tests.models.drawn import draw_params

CONFIG = ModelConfig(
    family="olmoe", vocab_size=40, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16,
    norm_eps=0.02, n_experts=4, top_k=2, expert_dim=32, qk_norm="full",
)  # fmt: skip
LORA = LoraConfig(4, 8.0, ("q_proj", "gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"))


def adapted(method: str | None) -> tuple[ModelConfig, dict[str, jax.Array]]:
    """A bfloat16 network, quantised or not, with adapters that change it.

    Scales and factors have few bits, so that products are exact in float32: only the sum rounds, and the last
    rounding, whatever a compiler contracts.
    """
    half = lambda value: jnp.asarray(np.asarray(value).astype(jnp.bfloat16))  # noqa: E731
    few_bits = lambda value: jnp.asarray(np.round(np.asarray(value) * 256) / 256)  # noqa: E731
    config = CONFIG
    params = {name: half(value) for name, value in draw_params(CONFIG, stddev=0.2).items()}
    if method is not None:
        config, params = quantise_params(config, params, method)
    for name, value in params.items():
        if name.endswith(".scales"):
            params[name] = jnp.asarray(np.asarray(half(value), value.dtype))
    config = with_adapters(config, LORA)
    factors = draw_params(with_adapters(CONFIG, LORA), 1, stddev=0.1, updates=0.1)
    params |= {name: few_bits(value) for name, value in factors.items() if is_adapter(name)}
    return config, params


def update_of(params: dict[str, jax.Array], name: str) -> np.ndarray | float:
    """scale * a b of a kernel in float64; 0.0 where it has no adapter."""
    stem, part = name.rsplit(".", 1)
    factors = {"gate": "gate_up", "up": "gate_up", "down": "down"}.get(part) if "experts" in name else None
    prefix = f"{stem}.{factors}_lora" if factors else f"{stem}.lora"
    if (factors is None and part != "kernel") or f"{prefix}_a" not in params:
        return 0.0
    update = 2.0 * (np.asarray(params[f"{prefix}_a"], float) @ np.asarray(params[f"{prefix}_b"], float))
    if factors != "gate_up":
        return update
    return np.split(update, 2, axis=-1)[0 if part == "gate" else 1]


@pytest.mark.parametrize("method", [None, "int8", "int4"])
def test_a_merged_weight_is_rounded_once(method):
    config, params = adapted(method)
    # With a float32 embedding, weights come back in float32.
    table = {"embed.embedding": jnp.asarray(np.asarray(params["embed.embedding"], np.float32))}
    _, floats = dequantise_params(config, params | table)
    merged_config, merged = merge_adapters(config, params)
    assert merged_config == CONFIG and merged.keys() == declare(CONFIG).keys()
    twice, changed = 0, 0
    for name, value in merged.items():
        update, float32 = update_of(params, name), np.asarray(floats[name], np.float32)
        want = (float32 + update).astype(np.float32).astype(ml_dtypes.bfloat16)
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, want, err_msg=name)
        changed += not np.isscalar(update)
        early = float32.astype(ml_dtypes.bfloat16).astype(np.float32)
        twice += ((early + update).astype(np.float32).astype(ml_dtypes.bfloat16) != want).sum()
    assert changed == 5
    assert twice > 0 or method is None  # the base rounded before the sum would be seen


def test_a_kernel_is_in_float32_one_layer_at_a_time():
    """The temporaries of merging do not grow with the layers of a stack."""

    def temporaries(layers: int) -> int:
        shape = lambda dtype, *shape: jax.ShapeDtypeStruct((layers, 4, *shape), dtype)  # noqa: E731
        weight = Int8(shape(jnp.int8, 128, 64), shape(jnp.float32, 1, 64))
        factors = shape(jnp.float32, 128, 4), shape(jnp.float32, 4, 64)
        merge = jax.jit(_add_update, static_argnums=(3, 4))
        compiled = merge.lower(weight, *factors, 2.0, jnp.dtype("bfloat16")).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(16) < temporaries(4) + 4 * 128 * 64 * 4


def test_what_is_not_adapted_stays_as_it_was():
    config, params = adapted("int8")
    _, merged = merge_adapters(config, params)
    plain = [name for name in params.keys() & merged.keys() if "router" not in name]
    assert len(plain) == 7 and all(merged[name] is params[name] for name in plain)
