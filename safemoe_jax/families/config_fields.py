"""Reading fields of a `config.json`, with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safemoe_jax.errors import InputError

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
        name = names if isinstance(names, str) else names[0]
        raise InputError(f"field '{name}' is {value}", where="config.json", expected="at least 1")
    return value


def rope_theta(raw: Mapping[str, Any], default: float) -> float:
    """The rotary base, from `rope_parameters` (transformers 5) or `rope_theta` (the hub).

    Raises:
        InputError: the config asks for a scaled rotary embedding.
    """
    nested = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {}
    kind = nested.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    if kind != "default":
        raise InputError(f"rotary embedding of type '{kind}'", where="config.json", expected="type 'default'")
    return read({**raw, **nested}, "rope_theta", float, default)
