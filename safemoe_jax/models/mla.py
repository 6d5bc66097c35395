"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values from one latent.

Legend: B rows, T positions, D model width, N heads, H = nope + rope width of a query or key, W value width,
C latent rank.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from safemoe_jax.errors import InputError
from safemoe_jax.models.attention import Row, Traits, attend_row, layer_mask, layer_tables
from safemoe_jax.models.config import ModelConfig
from safemoe_jax.models.kv_cache import KeysValues, LayerCache
from safemoe_jax.models.linear import Linear
from safemoe_jax.models.norms import RMSNorm
from safemoe_jax.models.rope import rotate


class LatentAttention(nnx.Module):
    """Queries and keys are [unrotated, rotated]; all heads share one rotated key.

    The cache holds full keys and values, so a decoding step is that of grouped-query attention. Projections
    answer to the LoRA targets that PEFT knows them by (`kv_a_proj_with_mqa` is HF's name of kv_a_proj).
    """

    def __init__(self, config: ModelConfig) -> None:
        _check(config)
        d_model, n_heads, mla, lora = config.d_model, config.n_heads, config.mla, config.lora
        how = config.quantisation
        q_width = n_heads * (mla.nope_dim + mla.rope_dim)
        if mla.q_rank is None:
            self.q_proj = Linear("q_proj", d_model, q_width, ("embed", "heads"), lora=lora, quantisation=how)
        else:
            self.q_a_proj = Linear(
                "q_a_proj",
                d_model,
                mla.q_rank,
                ("embed", None),
                lora=lora,
                quantisation=how,
                bias=config.attention_bias,
            )
            self.q_a_norm = RMSNorm(mla.q_rank, mla.norm_eps)
            self.q_b_proj = Linear(
                "q_b_proj", mla.q_rank, q_width, (None, "heads"), lora=lora, quantisation=how
            )
        self.kv_a_proj = Linear(
            "kv_a_proj_with_mqa",
            d_model,
            mla.kv_rank + mla.rope_dim,
            ("embed", None),
            lora=lora,
            quantisation=how,
            bias=config.attention_bias,
        )
        self.kv_a_norm = RMSNorm(mla.kv_rank, mla.norm_eps)
        kv_width = n_heads * (mla.nope_dim + mla.v_dim)
        self.kv_b_proj = Linear(
            "kv_b_proj", mla.kv_rank, kv_width, (None, "heads"), lora=lora, quantisation=how
        )
        self.o_proj = Linear(
            "o_proj",
            n_heads * mla.v_dim,
            d_model,
            ("heads", "embed"),
            lora=lora,
            quantisation=how,
            bias=config.output_bias,
        )
        self.config = config

    def __call__(
        self, x_BTD: jax.Array, row: Row, traits: Traits, cache: LayerCache | None = None
    ) -> tuple[jax.Array, KeysValues]:
        """As `attention.Attention`: the output [B, T, D], and these tokens' keys and values."""
        qkv = self._project(x_BTD, row, traits)
        scale = self.config.attention_scale
        y_BTNW = attend_row(qkv, layer_mask(row, traits), cache, scale=scale)
        return self.o_proj(y_BTNW.reshape(*x_BTD.shape[:2], -1)), qkv[1:]

    def _project(self, x_BTD: jax.Array, row: Row, traits: Traits) -> tuple[jax.Array, jax.Array, jax.Array]:
        mla, leading = self.config.mla, x_BTD.shape[:2]
        q_BTNH = self._queries(x_BTD).reshape(*leading, -1, mla.nope_dim + mla.rope_dim)
        q_nope, q_rope = jnp.split(q_BTNH, [mla.nope_dim], axis=-1)
        latent_BTC, k_rope = jnp.split(self.kv_a_proj(x_BTD), [mla.kv_rank], axis=-1)
        kv = self.kv_b_proj(self.kv_a_norm(latent_BTC)).reshape(*leading, -1, mla.nope_dim + mla.v_dim)
        k_nope, v_BTNW = jnp.split(kv, [mla.nope_dim], axis=-1)
        k_rope = k_rope[:, :, None, :]
        tables = layer_tables(row.rope, traits)
        if tables is not None:
            interleaved = self.config.rope.interleaved
            q_rope, k_rope = (rotate(x, tables, interleaved=interleaved) for x in (q_rope, k_rope))
        k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:-1], mla.rope_dim))
        q_BTNH, k_BTNH = jnp.concatenate([q_nope, q_rope], -1), jnp.concatenate([k_nope, k_rope], -1)
        return q_BTNH, k_BTNH, v_BTNW

    def _queries(self, x_BTD: jax.Array) -> jax.Array:
        if self.config.mla.q_rank is None:
            return self.q_proj(x_BTD)
        return self.q_b_proj(self.q_a_norm(self.q_a_proj(x_BTD)))


def _check(config: ModelConfig) -> None:
    """Latent attention has none of these; a config that asks for one is not silently computed without."""
    asked = {
        "qk_norm": config.qk_norm != "none",
        "sinks": config.sinks,
        "clip_qkv": config.clip_qkv is not None,
        "query_temperature": config.query_temperature is not None,
    }
    for field, is_set in asked.items():
        if is_set:
            raise InputError(
                f"{field} with latent attention", where=field, expected="grouped-query attention"
            )
