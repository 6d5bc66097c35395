"""The public model object: a network's config and parameters, its tokenizer, and how to compute it."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike

from safemoe_jax.checkpoints.hub import find_folder
from safemoe_jax.checkpoints.huggingface import (
    SPECIAL_TOKENS,
    copy_companions,
    load_params,
    read_config,
    save_folder,
)
from safemoe_jax.checkpoints.peft import load_adapter, save_adapter
from safemoe_jax.errors import InputError
from safemoe_jax.models.config import Compute, ModelConfig
from safemoe_jax.models.lora import merge_adapters
from safemoe_jax.models.params import Params, Weights
from safemoe_jax.models.quantised import Quantisation
from safemoe_jax.models.transformer import Output, forward

_forward = jax.jit(forward, static_argnums=0, static_argnames="compute")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass
class Model:
    """A Mixture-of-Experts language model.

    Attributes:
        config: the network.
        params: its parameters, flat name -> array, adapters included.
        compute: dtype, kernels and mesh.
        name: the folder or hub id it was loaded from, "" for none.
        path: the folder on this machine that its tokenizer is read from, or None.
        hf_config: the checkpoint's config.json, for the fields that the network does not need.
    """

    config: ModelConfig
    params: Params
    compute: Compute = Compute()
    name: str = ""
    path: Path | None = None
    hf_config: Mapping[str, Any] = field(default_factory=dict)
    _tokenizer: Any = None

    @property
    def weights(self) -> Weights:
        """The parameters as the network's functions take them, all frozen."""
        return Weights.of(self.params)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, read on first use.

        Raises:
            InputError: the folder has none, or it cannot be read.
        """
        if self._tokenizer is None:
            self._tokenizer = _read_tokenizer(self.path)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, tokens: ArrayLike, attention_mask: ArrayLike | None = None) -> Output:
        """Logits and router logits.

        Args:
            tokens: int32 [B, T], right-padded.
            attention_mask: [B, T] of 0/1, real tokens; all real by default.

        Returns:
            logits float32 [B, T, V]; router_logits float32 [L, B, T, E], raw, one entry a MoE layer
            (`config.moe_layers`); hidden [B, T, D] after the final norm.

        Raises:
            InputError: a shape is wrong.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        mask = None if attention_mask is None else jnp.asarray(attention_mask, jnp.int32)
        if tokens.ndim != 2 or (mask is not None and mask.shape != tokens.shape):
            shapes = f"{tokens.shape}" if mask is None else f"{tokens.shape} and {mask.shape}"
            raise InputError(
                f"tokens (and attention_mask) of shape {shapes}", expected="[B, T], both the same"
            )
        return _forward(self.config, self.weights, tokens, attention_mask=mask, compute=self.compute)

    def merged(self) -> Model:
        """The same function without adapters: their updates added to the weights."""
        config, params = merge_adapters(self.config, self.params)
        return replace(self, config=config, params=params)

    def save_pretrained(self, folder: str | Path, *, max_file_bytes: int = 5 * 10**9) -> None:
        """Writes a folder that transformers loads, with the same logits; adapters are merged in.

        Args:
            folder: a new or empty folder; it appears whole or not at all.
            max_file_bytes: size above which the weights go into several files.

        Raises:
            InputError: the folder is there and not empty, or the disk refuses.
        """
        model = self.merged()
        save_folder(
            folder,
            model.config,
            model.params,
            extra_config=self.hf_config or self._token_ids(),
            write_beside=self._write_companions,
            max_file_bytes=max_file_bytes,
        )

    def save_adapter(self, folder: str | Path) -> None:
        """Writes the adapters as a folder that PEFT loads onto the base model.

        Raises:
            InputError: there are no adapters, the folder is not empty, or the disk refuses.
        """
        save_adapter(folder, self.config, self.params, self.name, self.hf_config)

    def _token_ids(self) -> dict[str, int | None]:
        """The tokenizer's special tokens as config.json names them; nothing without a tokenizer."""
        if self._tokenizer is None and not _has_tokenizer(self.path):
            return {}
        return {f"{name}_id": getattr(self.tokenizer, f"{name}_id") for name in SPECIAL_TOKENS}

    def _write_companions(self, folder: Path) -> None:
        if self.path is not None:
            copy_companions(self.path, folder)
        elif self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)


def load_pretrained(
    path_or_hub_id: str | Path,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    adapter: str | Path | None = None,
    experts: str = "auto",
    quantisation: Quantisation | None = None,
) -> Model:
    """Loads a Hugging Face checkpoint.

    Args:
        path_or_hub_id: a folder with config.json and safetensors, or `owner/name` on the hub.
        mesh: devices to spread the parameters over; each process reads only its own slices.
        dtype: "float32" or "bfloat16"; by default bfloat16 stays, everything else becomes float32.
        adapter: a folder that PEFT wrote; its factors are added to the parameters.
        experts: the expert kernel (`models.config.Compute`).
        quantisation: "int8", "int4" or "int4-64" rounds the kernels of attention, experts and feed-forwards
            as they are read, to be computed with as they are or trained by adapters; None keeps floats.

    Returns:
        The model; a folder without a tokenizer loads too.

    Raises:
        InputError: anything that is wrong with the folder, naming the file, field or tensor.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise InputError(f"dtype {dtype!r}", where="load_pretrained", expected="float32 or bfloat16")
    folder = find_folder(path_or_hub_id)
    config, raw = read_config(folder)
    if quantisation not in (None, *typing.get_args(Quantisation)):
        known = ", ".join(typing.get_args(Quantisation))
        raise InputError(f"quantisation {quantisation!r}", where="load_pretrained", expected=known)
    params = load_params(folder, config, dtype=dtype, mesh=mesh, quantisation=quantisation)
    config = replace(config, quantisation=quantisation)
    if adapter is not None:
        config, factors = load_adapter(adapter, config, mesh=mesh)
        params = {**params, **factors}
    compute = Compute(dtype=str(params["embed.embedding"].dtype), experts=experts, mesh=mesh)
    return Model(config, params, compute, str(path_or_hub_id), folder, raw)


def _has_tokenizer(path: Path | None) -> bool:
    return path is not None and any((path / name).exists() for name in _TOKENIZER_FILES)


def _read_tokenizer(path: Path | None) -> Any:
    if not _has_tokenizer(path):
        raise InputError("no tokenizer", where=str(path or "model"), expected="a folder with tokenizer.json")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the tokenizer cannot be read: {error}", where=str(path), expected="a whole tokenizer.json"
        ) from error
