"""Whether the fields of a configuration hold what they declare. YAML files and flags are checked when they
are read (`configuration`); a dataclass made in Python may hold anything."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

from safemoe_jax.errors import InputError

_WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
_UNBOUNDED = ("optimizer.clip_norm",)  # infinity is no clipping


def check_types(value: Any, hint: Any, field: str = "") -> None:
    """Descends into dataclasses, lists and tuples; everything else is compared with its type.

    Args:
        value: what is there.
        hint: what is declared.
        field: its dotted name, "" for the whole configuration.

    Raises:
        InputError: the first field with a value of another type, or a number that is not finite.
    """
    arm = next((arm for arm in _arms(hint) if _fits(value, arm)), None)
    endless = isinstance(value, float) and not math.isfinite(value) and field not in _UNBOUNDED
    if arm is None or endless:
        name = field or "the configuration"
        where = f"the configuration, field {field}" if field else "the configuration"
        raise InputError(
            f"{name} is {value!r}", where=where, expected=" or ".join(map(_describe, _arms(hint)))
        )
    if dataclasses.is_dataclass(arm):
        for name, inner in typing.get_type_hints(arm).items():
            check_types(getattr(value, name), inner, f"{field}.{name}" if field else name)
    elif typing.get_origin(arm) in (list, tuple):
        for i, item in enumerate(value):
            check_types(item, typing.get_args(arm)[0], f"{field}[{i}]")


def _arms(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type; itself where it is one."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of one of `_arms`, items of lists and fields of dataclasses left aside."""
    if typing.get_origin(kind) is typing.Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    kind = typing.get_origin(kind) or kind
    if isinstance(value, bool):
        return kind is bool
    # Every whole number is a number.
    return isinstance(value, (int, float) if kind is float else kind)


def _describe(kind: Any) -> str:
    if kind is type(None):
        return "null (None)"
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(typing.get_args(kind))
    if typing.get_origin(kind) in (list, tuple):
        return f"a {typing.get_origin(kind).__name__} of {_describe(typing.get_args(kind)[0])}"
    return _WORDS.get(kind) or f"a {kind.__name__}"
