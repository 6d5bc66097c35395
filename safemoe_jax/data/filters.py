"""The `where` expression of a source: comparisons of a field with a constant, joined by `and`. Nothing is
evaluated.

is_safe == False
split != 'train' and dialogue != null
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from safemoe_jax.data.files import Row
from safemoe_jax.errors import InputError

_CLAUSE = re.compile(
    r"""\s*(?P<field>`[^`]+`|[^\s=!'"`]+)\s*(?P<op>==|!=)\s*
        (?P<value>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s'"=!]+)\s*(?P<rest>and\b|$)""",
    re.VERBOSE,
)
_WORDS = {"true": True, "false": False, "none": None, "null": None}
_EXPECTED = (
    "FIELD == VALUE or FIELD != VALUE, joined by 'and'; VALUE is True, False, null, a number or 'text'"
)


class Comparison(NamedTuple):
    """`field == value`, or its opposite where `equal` is false."""

    field: str
    equal: bool
    value: str | float | bool | None


def parse_where(expression: str) -> list[Comparison]:
    """Parses a filter into comparisons that must all hold. A field with blanks in its name stands in back
    quotes.

    Raises:
        InputError: anything but comparisons of a field with a constant.
    """
    clauses, position = [], 0
    while True:
        match = _CLAUSE.match(expression, position)
        if match is None:
            raise InputError("cannot read the filter", where=f"where: {expression}", expected=_EXPECTED)
        value = _constant(match["value"], expression)
        clauses.append(Comparison(match["field"].strip("`"), match["op"] == "==", value))
        position = match.end()
        if match["rest"] != "and":
            return clauses


def _constant(text: str, expression: str) -> str | float | bool | None:
    if text[0] in "'\"":
        return re.sub(r"\\(.)", r"\1", text[1:-1])
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if re.fullmatch(r"[-+]?\d+(\.\d+)?", text):
        return float(text)
    raise InputError(f"'{text}' is not a constant", where=f"where: {expression}", expected=_EXPECTED)


def keep(row: Row, clauses: list[Comparison]) -> bool:
    """Whether a row passes every comparison.

    Raises:
        InputError: the row is a bare string, or has no such field.
    """
    for clause in clauses:
        if not isinstance(row.value, dict) or clause.field not in row.value:
            known = (
                ", ".join(row.value) if isinstance(row.value, dict) else "none (the records are bare strings)"
            )
            raise InputError(
                "the filter names a field that the record lacks",
                where=f"{row.place}, field '{clause.field}'",
                expected=f"one of its fields: {known}",
            )
        if (_comparable(row.value[clause.field], clause.value) == clause.value) != clause.equal:
            return False
    return True


def _comparable(found: Any, wanted: str | float | bool | None) -> Any:
    """CSV knows only text: read a cell as what it is compared with. True is not 1 here, unlike in Python."""
    if isinstance(wanted, bool):
        return (
            _WORDS.get(found.lower(), found)
            if isinstance(found, str)
            else found
            if isinstance(found, bool)
            else None
        )
    if isinstance(wanted, float):
        if isinstance(found, str) and re.fullmatch(r"[-+]?\d+(\.\d+)?", found):
            return float(found)
        return None if isinstance(found, bool) else found
    if wanted is None and found == "":  # a table's empty cell: null also means empty text
        return None
    return found
