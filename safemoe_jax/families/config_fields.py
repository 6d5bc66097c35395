"""Reading fields of a `config.json`, with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from safemoe_jax.errors import InputError
from safemoe_jax.models.config import LayerConfig, ModelConfig, RopeConfig

Layers = tuple[LayerConfig, ...]

_REQUIRED = object()


def read(raw: Mapping[str, Any], names: str | tuple[str, ...], kind: type, default: Any = _REQUIRED) -> Any:
    """The first of `names` that the config has and that is not null.

    Args:
        raw: the parsed config.json.
        names: a field's name, or several names of the same field.
        kind: int, float, bool or str; an int is taken as a float.
        default: the value where no name is there; without one the field is required.

    Raises:
        InputError: a required field is missing, or a value has another type.
    """
    names = (names,) if isinstance(names, str) else names
    for name in names:
        value = raw.get(name)
        if value is None:
            continue
        accepted = (int, float) if kind is float else (kind,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise InputError(
                f"field '{name}' is {value!r}",
                where="config.json",
                expected=f"a value of type {kind.__name__}",
            )
        return kind(value)
    if default is _REQUIRED:
        raise InputError(
            f"field '{names[0]}' is missing", where="config.json", expected="a complete config.json"
        )
    return default


def size(raw: Mapping[str, Any], names: str | tuple[str, ...], default: Any = _REQUIRED) -> int:
    """A field that counts something.

    Raises:
        InputError: as `read`, or the value is below 1.
    """
    value = read(raw, names, int, default)
    if value is not None and value < 1:
        spelled = (names,) if isinstance(names, str) else names
        name = next(name for name in spelled if raw.get(name) is not None)
        raise InputError(f"field '{name}' is {value}", where="config.json", expected="at least 1")
    return value


def require(condition: bool, field: str, value: object, expected: str) -> None:
    """Refuses a field's value.

    Raises:
        InputError: the condition does not hold.
    """
    if not condition:
        raise InputError(f"field '{field}' is {value!r}", where="config.json", expected=expected)


def text_fields(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's fields: the config's own, or those that it nests in `text_config`.

    Raises:
        InputError: `text_config` is no object.
    """
    nested = raw.get("text_config") or raw
    require(isinstance(nested, Mapping), "text_config", nested, "an object with the text model's fields")
    return nested


def numbers(raw: Mapping[str, Any], name: str) -> tuple[float, ...]:
    """A list of numbers, empty where the field is missing.

    Raises:
        InputError: it is anything else.
    """
    values = raw.get(name) or ()
    right = isinstance(values, (list, tuple)) and all(type(value) in (int, float) for value in values)
    require(right, name, values, "a list of numbers")
    return tuple(map(float, values))


_ROPE_NUMBERS = {
    "linear": {"factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "longrope": {"factor", "attention_factor", "short_mscale", "long_mscale"},
}


def read_rope(
    raw: Mapping[str, Any], theta: float = 10000.0, *, head_dim: int | None = None, interleaved: bool = False
) -> RopeConfig:
    """The rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (hub).

    Args:
        raw: the model's fields.
        theta: the base where the config names none.
        head_dim: width of a head, which `partial_rotary_factor` is a share of; None where the family has no
            such field.
        interleaved: as in `RopeConfig`.

    Raises:
        InputError: the kind is unknown, or a field that it needs is missing or malformed.
    """
    # transformers takes the nested fields first, and of the two objects the one that says more.
    nested = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    require(isinstance(nested, Mapping), "rope_scaling", nested, "an object")
    kind = nested.get("rope_type") or nested.get("type") or "default"
    kind = "longrope" if kind == "su" else kind
    if kind != "default" and kind not in _ROPE_NUMBERS:
        known = ", ".join(("default", *_ROPE_NUMBERS))
        raise InputError(
            f"rotary embedding of type {kind!r}", where="config.json", expected=f"one of {known}"
        )
    nested = {**(raw.get("rope_parameters") or {}), **nested}
    base = read({**raw, **{k: v for k, v in nested.items() if v is not None}}, "rope_theta", float, theta)
    share = read({**raw, **nested}, "partial_rotary_factor", float, 1.0)
    dim = None if head_dim is None or share == 1.0 else int(head_dim * share)
    rope = RopeConfig(theta=base, dim=dim, interleaved=interleaved, kind=kind)
    return rope if kind == "default" else _read_scaling(raw, nested, rope)


def _read_scaling(raw: Mapping[str, Any], nested: Mapping[str, Any], rope: RopeConfig) -> RopeConfig:
    fields = {name: read(nested, name, float, None) for name in sorted(_ROPE_NUMBERS[rope.kind])}
    if rope.kind != "linear":
        # A number beside the nested ones wins, and without any the model's longest sequence is meant.
        name = "original_max_position_embeddings"
        source = raw if raw.get(name) is not None else nested
        fields["original_max_positions"] = size(source, name, None) or size(raw, "max_position_embeddings")
    if fields["factor"] is None and rope.kind in ("yarn", "longrope"):
        fields["factor"] = size(raw, "max_position_embeddings") / fields["original_max_positions"]
    if rope.kind == "yarn":
        fields["truncate"] = read(nested, "truncate", bool, True)
    if rope.kind == "longrope":
        fields |= {name: numbers(nested, name) for name in ("short_factor", "long_factor")}
    needed = {"llama3": {"low_freq_factor", "high_freq_factor"}, "longrope": {"short_factor"}}
    for name in sorted({"factor"} | needed.get(rope.kind, set())):
        require(bool(fields[name]), name, nested.get(name), f"a value, as rotary type '{rope.kind}' needs")
    return replace(rope, **{name: value for name, value in fields.items() if value is not None})


def write_rope(rope: RopeConfig, *, head_dim: int | None = None) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` (null where nothing is scaled), as the hub's configs have them.

    Args:
        rope: the rotary embedding.
        head_dim: width of a head; given, `partial_rotary_factor` is written too.
    """
    fields: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
    if head_dim is not None:
        fields["partial_rotary_factor"] = 1.0 if rope.dim is None else rope.dim / head_dim
    if rope.kind == "default":
        return fields
    scaling = {name: getattr(rope, name) for name in sorted(_ROPE_NUMBERS[rope.kind])}
    scaling |= {"rope_type": rope.kind, "original_max_position_embeddings": rope.original_max_positions}
    if rope.kind == "yarn":
        scaling["truncate"] = rope.truncate
    if rope.kind == "longrope":
        scaling |= {"short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
    fields["rope_scaling"] = {name: value for name, value in scaling.items() if value is not None}
    return fields


FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


def layer_types(raw: Mapping[str, Any], n_layers: int, default: Sequence[str]) -> tuple[str, ...]:
    """Which keys each layer's queries see, from `layer_types`.

    Args:
        raw: the model's fields.
        n_layers: number of layers.
        default: the types where the config does not list them.

    Raises:
        InputError: the list has another length, or names an unknown type.
    """
    types = raw.get("layer_types") or list(default)
    right = isinstance(types, (list, tuple)) and all(t in (FULL, SLIDING, CHUNKED) for t in types)
    expected = f"{n_layers} of {FULL}, {SLIDING}, {CHUNKED}"
    require(right and len(types) == n_layers, "layer_types", types, expected)
    return tuple(types)


def sparse_step_kinds(raw: Mapping[str, Any], n_layers: int) -> tuple[str, ...]:
    """Kinds of layer where `mlp_only_layers` are dense and of the rest every `decoder_sparse_step`-th is MoE.

    Raises:
        InputError: a field is malformed.
    """
    step, dense = size(raw, "decoder_sparse_step", 1), raw.get("mlp_only_layers") or []
    right = isinstance(dense, (list, tuple)) and all(type(layer) is int for layer in dense)
    require(right, "mlp_only_layers", dense, "a list of layer numbers")
    return tuple("dense" if i in dense or (i + 1) % step else "moe" for i in range(n_layers))


def write_sparse_step(config: ModelConfig) -> dict[str, Any]:
    """`mlp_only_layers` and `decoder_sparse_step` of a network."""
    dense = [i for i, layer in enumerate(config.layers) if layer.kind == "dense"]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def first_dense_kinds(raw: Mapping[str, Any], n_layers: int, default: int = 0) -> tuple[str, ...]:
    """Kinds of layer where the first `first_k_dense_replace` are dense.

    Raises:
        InputError: the field is malformed.
    """
    first = read(raw, "first_k_dense_replace", int, default)
    require(first >= 0, "first_k_dense_replace", first, "at least 0")
    return tuple("dense" if i < first else "moe" for i in range(n_layers))


def make_layers(kinds: Sequence[str], types: Sequence[str], *, window: int = 0, chunk: int = 0) -> Layers:
    """One `LayerConfig` a layer; sliding layers get the window, chunked ones the chunk."""
    return tuple(
        LayerConfig(kind=kind, window=window * (type_ == SLIDING), chunk=chunk * (type_ == CHUNKED))
        for kind, type_ in zip(kinds, types, strict=True)
    )


def write_layer_types(config: ModelConfig) -> list[str]:
    """The `layer_types` of a network."""
    return [SLIDING if layer.window else CHUNKED if layer.chunk else FULL for layer in config.layers]
