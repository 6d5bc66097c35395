"""The reference-routing file: what the aligned model did on a set of prompts, computed once before training.

One safetensors file. It holds the router logits at each prompt's last token (`router_logits`, the
r(x | w_align) of SafeMoE, arXiv 2509.22745), the prompts' own tokens, and, where asked for, the next-token
log-probabilities there. Hashes tie it to a model, a tokenizer and a set of prompts.

Log-probabilities are stored as 16-bit codes, evenly spaced between the prompt's smallest and largest value;
values below -64 (probability 2e-28) are raised to -64. Decoding renormalises. Loss of precision: a
log-probability is off by at most one step, range / 65535 (half by rounding, half by renormalising: 4.9e-4 at
a range of 32, 9.8e-4 at most), so a probability by at most 0.1 %. Measured on random logits of standard
deviation 3 over 150,000 words: 2.2e-4, and KL(exact || stored) below 2e-7. 150,000 words x 200 prompts take
60.0 MB.

Legend: L MoE layers, S prompts, E experts, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from safemoe_jax.checkpoints.atomic import new_file
from safemoe_jax.checkpoints.huggingface import read_params
from safemoe_jax.checkpoints.safetensors_files import read_arrays, read_metadata, write_arrays
from safemoe_jax.errors import InputError
from safemoe_jax.models.config import ModelConfig
from safemoe_jax.models.params import Params, is_adapter

FORMAT = "safemoe-reference-2"
LOWEST_LOG_PROB = -64.0
_STEPS = 65535
# Fields that do not change what the network computes.
_NOT_FUNCTION = ("lora", "quantisation", "initializer_range", "router_aux_coef", "max_positions")


@dataclass(frozen=True)
class CompactLogProbs:
    """Log-probabilities as 16-bit codes: lowest + step * code.

    codes_SV: uint16. lowest_S, step_S: float32.
    """

    codes_SV: np.ndarray
    lowest_S: np.ndarray
    step_S: np.ndarray

    @classmethod
    def encode(cls, log_probs_SV: np.ndarray) -> CompactLogProbs:
        """Stores log-probabilities (float32; one prompt at a time, so that memory stays near the input)."""
        codes_SV = np.empty(log_probs_SV.shape, np.uint16)
        lowest_S, step_S = (np.empty(len(log_probs_SV), np.float32) for _ in range(2))
        for s, row in enumerate(log_probs_SV):
            row_V = np.maximum(np.asarray(row, np.float32), LOWEST_LOG_PROB)
            lowest_S[s] = row_V.min()
            step_S[s] = max((row_V.max() - lowest_S[s]) / _STEPS, np.finfo(np.float32).tiny)
            codes_SV[s] = np.rint((row_V - lowest_S[s]) / step_S[s]).clip(0, _STEPS)
        return cls(codes_SV, lowest_S, step_S)

    def decode(self) -> np.ndarray:
        """Log-probabilities [S, V], float32, each row summing to 1 as probabilities."""
        values_SV = self.lowest_S[:, None] + self.step_S[:, None] * self.codes_SV.astype(np.float32)
        total_S = np.log(np.exp(values_SV).sum(axis=1, dtype=np.float64, keepdims=True))
        values_SV -= total_S.astype(np.float32)
        return values_SV


@dataclass(frozen=True)
class Reference:
    """What the aligned model did on a set of prompts.

    Attributes:
        router_logits: float32 [L, S, E], raw, at each prompt's last token.
        prompts: the prompts' tokens, int32, generation prompt included.
        model_fingerprint: `fingerprint` of the model.
        tokenizer_fingerprint: `tokenizer_fingerprint`, or "" where there was no tokenizer.
        group: int8 [S], 0 harmful, 1 benign; all harmful where not given.
        log_probs: next-token log-probabilities at the last prompt token, or None.
        model: folder or hub id, for messages.
        chat_template: the tokenizer's template, or "".
        system_prompt: the system message of the prompts (all of them, where they differ), or "".
    """

    router_logits: np.ndarray
    prompts: tuple[np.ndarray, ...]
    model_fingerprint: str
    tokenizer_fingerprint: str = ""
    group: np.ndarray | None = None
    log_probs: CompactLogProbs | None = None
    model: str = ""
    chat_template: str = ""
    system_prompt: str = ""

    def __post_init__(self) -> None:
        if self.group is None:
            object.__setattr__(self, "group", np.zeros(len(self.prompts), np.int8))

    @property
    def prompts_hash(self) -> str:
        """`hash_prompts` of the prompts."""
        return hash_prompts(self.prompts)

    def log_probs_SV(self) -> np.ndarray:
        """Next-token log-probabilities, float32 [S, V], with the precision that the module states.

        Raises:
            InputError: the file was made without them.
        """
        if self.log_probs is None:
            raise InputError(
                "the reference has no next-token log-probabilities",
                where=f"reference of {self.model or 'unknown model'}",
                expected="a reference made with log-probabilities",
            )
        return self.log_probs.decode()


def hash_prompts(prompts: Sequence[np.ndarray]) -> str:
    """SHA-256 over the prompts' lengths and tokens, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        tokens = np.asarray(prompt, "<i4")
        digest.update(np.asarray(len(tokens), "<i4").tobytes() + tokens.tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over all that decides which tokens a tokenizer makes of a conversation.

    That is its whole pipeline (normaliser, splitting, merges, vocabulary), its special tokens, and its chat
    template; a tokenizer without a pipeline to write down counts by its vocabulary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pipeline = {"vocabulary": sorted(tokenizer.get_vocab().items())}
    if backend is not None:
        pipeline = json.loads(backend.to_str())
        pipeline |= {"truncation": None, "padding": None}  # of the last call, not of the tokenizer
    described = [pipeline, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint(config: ModelConfig, params: Params) -> str:
    """SHA-256 over a model: what its config computes, and a checksum of every parameter.

    The checksum covers every element, rounded to bfloat16, so it is the same for a bfloat16 checkpoint loaded
    in float32, and on any mesh. Adapters count only where they change something (B is not zero). A quantised
    model is another one than the floats that it was rounded from (`fingerprint_folder` is theirs).
    """
    skipped = {
        half
        for name, value in params.items()
        if name.endswith("lora_b") and not bool(jnp.any(value))
        for half in (name, name[:-1] + "a")
    }
    kept = {name: value for name, value in params.items() if name not in skipped}
    sums = _checksums(kept)
    return _hash_model(config, {name: (value.shape, sums[name]) for name, value in kept.items()})


def fingerprint_folder(folder: str | Path, config: ModelConfig, mesh: Mesh | None = None) -> str:
    """`fingerprint` of a checkpoint folder's float weights; never holds more than two parameters (bfloat16).

    Args:
        folder: where the checkpoint is.
        config: its network, as `read_config` gives it, or quantised.
        mesh: devices to spread each parameter over.

    Raises:
        InputError: the folder cannot be read.
    """
    config, checksum = dataclasses.replace(config, quantisation=None), jax.jit(_checksum)
    params = read_params(folder, config, dtype="bfloat16", mesh=mesh)
    return _hash_model(config, {name: (value.shape, checksum(value)) for name, value in params})


def _hash_model(config: ModelConfig, params: Mapping[str, tuple[tuple[int, ...], jax.Array]]) -> str:
    """SHA-256 over what a config computes, and every parameter's name, shape and checksum."""
    adapted = any(map(is_adapter, params))
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in _NOT_FUNCTION}
    ordered = sorted(params.items())
    described = {
        "config": fields,
        "lora": dataclasses.asdict(config.lora) if adapted and config.lora is not None else None,
        "params": [[name, list(shape), np.asarray(total).tolist()] for name, (shape, total) in ordered],
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


@jax.jit
def _checksums(params: Params) -> dict[str, jax.Array]:
    return {name: _checksum(array) for name, array in params.items()}


def _checksum(array: jax.Array) -> jax.Array:
    """Two uint32 sums of bits * mixed index, modulo 2^32: exact, so the order of summation is free."""
    bits = jax.lax.bitcast_convert_type(array.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    index, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]

    def mixed(multiplier: int) -> jax.Array:
        x = (index + jnp.uint32(1)) * jnp.uint32(multiplier)
        return (x ^ (x >> 15)) * jnp.uint32(0x85EBCA6B)

    return jnp.stack([jnp.sum((bits + 1) * mixed(m), dtype=jnp.uint32) for m in (0x9E3779B1, 0xC2B2AE3D)])


def write_reference(path: str | Path, reference: Reference) -> None:
    """Writes the file; it replaces an earlier one only when it is complete.

    Raises:
        InputError: the disk refuses.
    """
    arrays = {
        "router_logits": np.ascontiguousarray(reference.router_logits, np.float32),
        "prompt_tokens": np.concatenate([np.asarray(p, np.int32) for p in reference.prompts]),
        "prompt_lengths": np.asarray([len(p) for p in reference.prompts], np.int32),
        "group": np.asarray(reference.group, np.int8),
    }
    if reference.log_probs is not None:
        arrays["log_prob_codes"] = reference.log_probs.codes_SV
        arrays["log_prob_lowest"] = reference.log_probs.lowest_S
        arrays["log_prob_step"] = reference.log_probs.step_S
    metadata = {
        "format": FORMAT,
        "prompts_hash": reference.prompts_hash,
        **{field: getattr(reference, field) for field in _TEXT_FIELDS},
    }
    with new_file(path) as temporary:
        write_arrays(temporary, arrays, metadata)


_ARRAYS = ("router_logits", "prompt_tokens", "prompt_lengths", "group")
_LOG_PROB_ARRAYS = ("log_prob_codes", "log_prob_lowest", "log_prob_step")
_TEXT_FIELDS = ("model_fingerprint", "tokenizer_fingerprint", "model", "chat_template", "system_prompt")


def read_reference(path: str | Path) -> Reference:
    """Reads a reference file.

    Raises:
        InputError: the file is missing, truncated, no reference file, or its parts do not belong together.
    """
    path = Path(path)
    metadata, arrays = read_metadata(path), dict(read_arrays(path))
    _check_file(path, metadata, arrays)
    prompts = tuple(np.split(arrays["prompt_tokens"], np.cumsum(arrays["prompt_lengths"])[:-1]))
    codes = arrays.get("log_prob_codes")
    reference = Reference(
        router_logits=arrays["router_logits"],
        prompts=prompts,
        group=arrays["group"],
        log_probs=None
        if codes is None
        else CompactLogProbs(codes, arrays["log_prob_lowest"], arrays["log_prob_step"]),
        **{field: metadata[field] for field in _TEXT_FIELDS},
    )
    if reference.prompts_hash != metadata["prompts_hash"]:
        raise InputError("the prompts do not match their hash", where=str(path), expected="an unchanged file")
    return reference


def _check_file(path: Path, metadata: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> None:
    """Refuses a file of another format, or one that something else than this module has changed."""

    def check(right: bool, what: str, expected: str = "a file as `safemoe reference` wrote it") -> None:
        if not right:
            raise InputError(what, where=str(path), expected=expected)

    known = str(metadata.get("format", ""))
    check(known.startswith("safemoe-reference-"), "not a reference file")
    check(known == FORMAT, f"the format {known} of another version", "the file made anew")
    missing = {*_ARRAYS} - {*arrays} | {*_TEXT_FIELDS, "prompts_hash"} - {*metadata}
    check(not missing, f"without {', '.join(sorted(missing))}")
    logits, lengths = arrays["router_logits"], arrays["prompt_lengths"]
    compact = {*_LOG_PROB_ARRAYS} & {*arrays}
    check(len(compact) in (0, len(_LOG_PROB_ARRAYS)), "only a part of the log-probabilities")
    rows = {name: len(arrays[name]) for name in ("prompt_lengths", "group", *sorted(compact))}
    check(logits.ndim == 3, f"router_logits of shape {logits.shape}")
    check({*rows.values()} == {logits.shape[1]}, f"router_logits of {logits.shape[1]} prompts and {rows}")
    check(lengths.sum() == len(arrays["prompt_tokens"]), "prompt_tokens that do not fill prompt_lengths")
    for name in ("router_logits", "log_prob_lowest", "log_prob_step"):
        check(bool(np.isfinite(arrays.get(name, 0.0)).all()), f"NaN or infinite values in {name}")


def check_matches(
    reference: Reference,
    *,
    config: ModelConfig,
    model_fingerprint: str | None = None,
    tokenizer: Any = None,
    where: str = "",
) -> None:
    """Refuses a reference made for something else. What is not given is not compared.

    Args:
        reference: as read.
        config: the model to be trained; its layers and experts are always compared.
        model_fingerprint: `fingerprint` of that model before training.
        tokenizer: its tokenizer.
        where: the reference file, for messages.

    Raises:
        InputError: says which of model and tokenizer is another one.
    """
    layers, _, experts = reference.router_logits.shape
    pairs: Mapping[str, tuple[object, object]] = {
        "model (layers, experts)": ((layers, experts), (config.n_moe_layers, config.n_experts)),
        "model (weights)": (reference.model_fingerprint, model_fingerprint),
        "tokenizer": (
            reference.tokenizer_fingerprint,
            None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        ),
    }
    for what, (stored, current) in pairs.items():
        if current is not None and stored != current:
            raise InputError(
                f"the reference was made for another {what}: {_short(stored)}, here {_short(current)}",
                where=where or f"reference of {reference.model or 'an unknown model'}",
                expected="a reference made by `safemoe reference` with this model and tokenizer",
            )


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)
