"""Execution match of two SQL queries: do they return the same rows on the same small synthetic tables?

Tables come from CREATE statements and rows from a fixed generator, so a verdict depends on its arguments
alone. Values are drawn near the literals of both queries; otherwise most conditions would select nothing
and every query would agree. A query is a model's output: it runs in memory, may only read, and is stopped
after a fixed amount of work.

Agreement on these rows is evidence, not proof. The rows tell apart a number from its neighbours, a pattern
from the same pattern with a % less, and a column's values from its rows where the column may be NULL. They
seldom tell apart a count of more than a few rows (``HAVING COUNT(*) > 100``) from a nearby one.
"""

from __future__ import annotations

import random
import re
import sqlite3
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

FILLS = 12
ROWS = 24
# SQLite calls back every STEP instructions; counting them is a limit that no busy machine moves.
STEP = 1_000
MAX_STEPS = 2_000
MAX_LENGTH = 100_000  # bytes of any string a query builds
MAX_ROWS = 10_000
NULLS = 1 / 12  # share of NULLs in a column that may have them

Row = tuple[object, ...]


class Outcome(NamedTuple):
    """What a query returns: the names of its columns in lower case, and its rows in order."""

    columns: tuple[str, ...]
    rows: list[Row]


_READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE, sqlite3.SQLITE_FUNCTION}
_UNSTABLE = {"random", "randomblob", "load_extension"}
_WORDS = ("alpha", "beta", "omicron", "psi", "xi")  # no letter is in all of them: LIKE '%a%' leaves some out
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")
_LITERAL = re.compile(r"""'((?:[^']|'')*)'|"([^"]*)"|(?<![\w.])([+-]?\d+(?:\.\d+)?)(?![\w.])""")
_CREATE = re.compile(r"CREATE\s+TABLE\b", re.IGNORECASE)
_HIDDEN = re.compile(r"""'(?:[^']|'')*'|"[^"]*"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/""", re.DOTALL)
_ORDER_BY = re.compile(r"\bORDER\s+BY\b(.*?)(?:\bLIMIT\b.*|;\s*)?$", re.IGNORECASE | re.DOTALL)
_ID = re.compile(r"(^|_)[Ii][Dd]$|[a-z]I[Dd]$|^[a-z]id$")
_DIRECTION = re.compile(r"(\bASC\b|\bDESC\b)?\s*(\bNULLS\s+(FIRST|LAST))?\s*$", re.IGNORECASE)


def create_statements(text: str) -> list[str]:
    """The CREATE TABLE statements found in a text, in order, without what stands between them."""
    statements = []
    for match in _CREATE.finditer(text):
        end = _closing_parenthesis(text, match.end())
        if end is not None:
            statements.append(text[match.start() : end + 1])
    return statements


def execution_match(
    tables: Sequence[str], reference: str, answer: str, *, fills: int = FILLS, rows: int = ROWS
) -> float | None:
    """1.0 if both queries return the same rows on every fill of the tables; 0.0 if not.

    Where the reference's outermost query has an ORDER BY, its order counts: rows that are equal in the
    ordering key may come in any order, others may not. Elsewhere rows are compared as multisets. A LIMIT that
    cuts through equal rows keeps those that SQLite meets first, for either query.
    None if the reference does not run, or if both return nothing on every fill: then the rows decide nothing.
    An answer that does not run, writes, or runs too long is 0.0.

    Args:
        tables: CREATE TABLE statements.
        reference: the right query.
        answer: the query to judge.
        fills: how many different sets of rows to try.
        rows: most rows in a table (the least are a quarter).
    """
    agree, decided = True, False
    for fill in range(fills):
        connection = _open(tables, (reference, answer), fill, rows)
        if connection is None:
            return None
        wanted, got = _run(connection, reference), _run(connection, answer)
        if wanted is None:
            connection.close()
            return None
        agree = agree and got is not None and _same_rows(connection, reference, wanted, got)
        decided = decided or got is None or bool(wanted.rows) or bool(got.rows)
        connection.close()
    return float(agree) if decided else None


def _open(tables: Sequence[str], queries: Sequence[str], fill: int, rows: int) -> sqlite3.Connection | None:
    connection = sqlite3.connect(":memory:")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_LENGTH)
    try:
        for statement in tables:
            _declare(connection, statement)
    except sqlite3.Error:
        return None
    _fill(connection, [literal for query in queries for literal in literals(query)], fill, rows)
    connection.set_authorizer(_only_reads)
    return connection


def _declare(connection: sqlite3.Connection, statement: str) -> None:
    """Creates a table; a second statement for it adds its columns (the published data has such)."""
    scratch = sqlite3.connect(":memory:")
    scratch.execute(statement)
    (name,) = _table_names(scratch)
    if name.lower() not in (known.lower() for known in _table_names(connection)):
        connection.execute(statement)
        return
    there = {column.name.lower() for column in _columns(connection, name)}
    for column, declared, _ in _columns(scratch, name):
        if column.lower() not in there:
            connection.execute(f"ALTER TABLE {_quoted(name)} ADD COLUMN {_quoted(column)} {declared}")


def _fill(connection: sqlite3.Connection, found: Sequence[str], fill: int, rows: int) -> None:
    """Inserts rows.

    All columns of a kind share one pool of values, so that joins find partners; each column draws from its
    own part of the pool, and tables differ in size, so that some rows find none.
    """
    rng = random.Random(fill)
    number_pool, text_pool = _pools(found)
    keys = _keys(connection)
    for name in _table_names(connection):
        columns = _columns(connection, name)
        pools = [number_pool if _is_numeric(column.declared) else text_pool for column in columns]
        pools = [rng.sample(pool, max(2, 2 * len(pool) // 3)) for pool in pools]
        nulls = [NULLS if column.nullable and column.name.lower() not in keys else 0 for column in columns]
        holes = ", ".join("?" for _ in columns)
        for _ in range(rng.randint(max(1, rows // 4), rows)):
            row = [rng.choice(pool) for pool in pools]
            row = [int(v) if "INT" in c.declared.upper() else v for v, c in zip(row, columns, strict=True)]
            row = [None if rng.random() < share else v for v, share in zip(row, nulls, strict=True)]
            # A column that is a key refuses the second row of a value; the row is then left out.
            connection.execute(f"INSERT OR IGNORE INTO {_quoted(name)} VALUES ({holes})", row)


def _pools(found: Sequence[str]) -> tuple[list[float], list[object]]:
    """Values for columns of numbers and of text, near the literals found in the queries."""
    texts = [value for literal in found for value in _texts_near(literal)]
    numbers = [float(text) if "." in text else int(text) for text in texts if _NUMBER.fullmatch(text)]
    near = list(dict.fromkeys(value + shift for value in numbers for shift in (-1, 1)))
    number_pool = numbers * 2 + near + list(range(1, 7))
    # Published schemas declare years and prices as text; "0" is the number that text, too, sorts below.
    return number_pool, texts + [str(value) for value in near] + ["0"] * bool(near) + list(_WORDS)


def _texts_near(literal: str) -> list[str]:
    """The literal, twice as likely as others; of a LIKE pattern, texts that it and its parts tell apart."""
    if "%" not in literal:
        return [literal] * 2
    core = literal.strip("%")
    more = "1" if _NUMBER.fullmatch(core) else "x"
    cores = dict.fromkeys(core.replace("%", filling) for filling in ("", more))
    return [text for core in cores for text in (core, more + core, core + more, more + core + more)]


def _keys(connection: sqlite3.Connection) -> set[str]:
    """Columns by which tables are joined, lower case: named like an id, or found in two tables.

    They get no NULL: ``NOT IN`` a column with one selects nothing, unlike the joins that mean the same.
    """
    names = [column.name for table in _table_names(connection) for column in _columns(connection, table)]
    counts = Counter(name.lower() for name in names)
    return {name.lower() for name in names if _ID.search(name) or counts[name.lower()] > 1}


def _table_names(connection: sqlite3.Connection) -> list[str]:
    return [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]


class Column(NamedTuple):
    """A column of a table; nullable: neither NOT NULL nor part of the primary key."""

    name: str
    declared: str
    nullable: bool


def _columns(connection: sqlite3.Connection, table: str) -> list[Column]:
    found = connection.execute(f"PRAGMA table_info({_quoted(table)})")
    return [Column(name, declared, not (required or key)) for _, name, declared, required, _, key in found]


def literals(query: str) -> list[str]:
    """Texts (unquoted) and numbers that stand in a query as constants, without duplicates, in order."""
    found = (next(group for group in match if group) for match in _LITERAL.findall(query) if any(match))
    return list(dict.fromkeys(found))


def _run(connection: sqlite3.Connection, query: str) -> Outcome | None:
    """What a query returns; None if it fails, writes, or takes too much work."""
    steps = iter(range(MAX_STEPS))
    connection.set_progress_handler(lambda: next(steps, None) is None, STEP)
    try:
        cursor = connection.execute(query)
        found = cursor.fetchmany(MAX_ROWS)
    except (sqlite3.Error, sqlite3.Warning, UnicodeEncodeError, ValueError):
        return None
    if cursor.description is None:  # nothing was asked for, as by an empty answer
        return None
    names = tuple(column[0].lower() for column in cursor.description)
    return Outcome(names, [tuple(_rounded(value) for value in row) for row in found])


def _same_rows(connection: sqlite3.Connection, reference: str, wanted: Outcome, got: Outcome) -> bool:
    """Whether the rows are the same, and in an order that the reference's ORDER BY allows, if it has one."""
    if Counter(wanted.rows) != Counter(got.rows):
        return False
    if wanted.rows == got.rows or not _ORDER_BY.search(_outermost(reference)):
        return True
    keys = _ordering_keys(connection, reference, wanted)
    tied = groupby(range(len(keys)), key=keys.__getitem__)
    runs = [list(places) for _, places in tied]
    return all(_multiset(wanted.rows, places) == _multiset(got.rows, places) for places in runs)


def _multiset(rows: Sequence[Row], places: Sequence[int]) -> Counter[Row]:
    return Counter(rows[place] for place in places)


def _ordering_keys(connection: sqlite3.Connection, query: str, found: Outcome) -> list[Row]:
    """The ordering key of each row, read from the same query with the key's terms as further columns.

    Where such a query cannot be written (an expression in a union, or one that DISTINCT would notice) each
    row has a key of its own, so that only the very same order is right.
    """
    width, terms = len(found.columns), _ordering_terms(query)
    # Numbers and names of columns that the query returns are not expressions: they cannot be asked for again.
    inside = {term: _place(term, found.columns) for term in terms}
    added = [term for term in terms if inside[term] is None]
    own_keys: list[Row] = [(place,) for place in range(len(found.rows))]
    keyed = _run(connection, _with_columns(query, added)) if added else found
    if keyed is None or len(keyed.columns) != width + len(added):
        return own_keys
    if [row[:width] for row in keyed.rows] != found.rows:
        return own_keys
    shown = [place for place in inside.values() if place is not None]
    return [tuple(row[place] for place in shown) + row[width:] for row in keyed.rows]


def _place(term: str, columns: Sequence[str]) -> int | None:
    """Where among the columns returned an ordering term is; None where it is none of them."""
    if term.isdigit():
        return int(term) - 1
    return columns.index(term.lower()) if term.lower() in columns else None


def _ordering_terms(query: str) -> list[str]:
    """The terms of the outermost ORDER BY, without their directions."""
    outermost = _outermost(query)
    order = _ORDER_BY.search(outermost)
    terms, start = [], order.start(1)
    for part in order[1].split(","):
        terms.append(query[start : start + _DIRECTION.search(part).start()].strip())
        start += len(part) + 1
    return terms


def _with_columns(query: str, expressions: Sequence[str]) -> str:
    """The query with these expressions as its last columns; unchanged where it reads no table."""
    source = re.search(r"\bFROM\b", _outermost(query), re.IGNORECASE)
    if source is None:
        return query
    added = "".join(f", ({expression})" for expression in expressions)
    return f"{query[: source.start()]}{added} {query[source.start() :]}"


def _outermost(query: str) -> str:
    """The query, every letter in quotes, comments and parentheses replaced by a question mark."""
    letters, depth = [], 0
    for letter in _HIDDEN.sub(lambda hidden: "?" * len(hidden[0]), query):
        depth -= letter == ")"
        letters.append("?" if depth > 0 else letter)
        depth += letter == "("
    return "".join(letters)


def _only_reads(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    unstable = action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _UNSTABLE
    return sqlite3.SQLITE_OK if action in _READS and not unstable else sqlite3.SQLITE_DENY


def _rounded(value: object) -> object:
    # Sums in another order differ in the last bits.
    return float(f"{value:.9g}") if isinstance(value, float) else value


def _is_numeric(declared: str) -> bool:
    return re.search(r"INT|REAL|FLOA|DOUB|NUM|DEC", declared, re.IGNORECASE) is not None


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _closing_parenthesis(text: str, start: int) -> int | None:
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0 and text[position] == ")":
            return position
    return None
