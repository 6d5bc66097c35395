"""Execution match of two SQL queries: do they return the same rows on the same small synthetic tables?

Tables come from CREATE statements and rows from a fixed generator, so a verdict depends on its arguments
alone. Values are drawn near the literals of both queries; otherwise most conditions would select nothing
and every query would agree. A query is a model's output: it runs in memory, may only read, and is stopped
after a fixed amount of work.
"""

from __future__ import annotations

import random
import re
import sqlite3
from collections import Counter
from collections.abc import Sequence

FILLS = 6
ROWS = 24
# SQLite calls back every STEP instructions; counting them is a limit that no busy machine moves.
STEP = 1_000
MAX_STEPS = 2_000
MAX_LENGTH = 100_000  # bytes of any string a query builds
MAX_ROWS = 10_000

Row = tuple[object, ...]
_READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE, sqlite3.SQLITE_FUNCTION}
_UNSTABLE = {"random", "randomblob", "load_extension"}
_WORDS = ("alpha", "beta", "gamma", "delta", "omega")
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")
_LITERAL = re.compile(r"""'((?:[^']|'')*)'|"([^"]*)"|(?<![\w.])([+-]?\d+(?:\.\d+)?)(?![\w.])""")
_CREATE = re.compile(r"CREATE\s+TABLE\b", re.IGNORECASE)


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
    """1.0 if both queries return the same rows, in any order, on every fill of the tables; 0.0 if not.

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
        wanted, got = _rows_of(connection, reference), _rows_of(connection, answer)
        connection.close()
        if wanted is None:
            return None
        agree = agree and wanted == got
        decided = decided or bool(wanted) or bool(got) or got is None
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
    there = {column.lower() for column, _ in _columns(connection, name)}
    for column, declared in _columns(scratch, name):
        if column.lower() not in there:
            connection.execute(f"ALTER TABLE {_quoted(name)} ADD COLUMN {_quoted(column)} {declared}")


def _fill(connection: sqlite3.Connection, found: Sequence[str], fill: int, rows: int) -> None:
    """Inserts rows.

    All columns of a kind share one pool of values, so that joins find partners; each column draws from its
    own part of the pool, and tables differ in size, so that some rows find none.
    """
    rng = random.Random(fill)
    numbers = [float(text) if "." in text else int(text) for text in found if _NUMBER.fullmatch(text)]
    number_pool = [value + shift for value in numbers for shift in (-1, 0, 0, 1)] + list(range(1, 7))
    text_pool = list(found) * 2 + list(_WORDS)
    for name in _table_names(connection):
        columns = _columns(connection, name)
        pools = [number_pool if _is_numeric(declared) else text_pool for _, declared in columns]
        pools = [rng.sample(pool, max(2, 2 * len(pool) // 3)) for pool in pools]
        holes = ", ".join("?" for _ in columns)
        for _ in range(rng.randint(max(1, rows // 4), rows)):
            row = [rng.choice(pool) for pool in pools]
            row = [int(v) if "INT" in kind.upper() else v for v, (_, kind) in zip(row, columns, strict=True)]
            # A column that is a key refuses the second row of a value; the row is then left out.
            connection.execute(f"INSERT OR IGNORE INTO {_quoted(name)} VALUES ({holes})", row)


def _table_names(connection: sqlite3.Connection) -> list[str]:
    return [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]


def _columns(connection: sqlite3.Connection, table: str) -> list[tuple[str, str]]:
    """Name and declared type of each column."""
    return [(row[1], row[2]) for row in connection.execute(f"PRAGMA table_info({_quoted(table)})")]


def literals(query: str) -> list[str]:
    """Texts (unquoted) and numbers that stand in a query as constants, without duplicates, in order."""
    found = (next(group for group in match if group) for match in _LITERAL.findall(query) if any(match))
    return list(dict.fromkeys(literal.strip("%") for literal in found))


def _rows_of(connection: sqlite3.Connection, query: str) -> Counter[Row] | None:
    """The rows a query returns as a multiset; None if it fails, writes, or takes too much work."""
    steps = iter(range(MAX_STEPS))
    connection.set_progress_handler(lambda: next(steps, None) is None, STEP)
    try:
        cursor = connection.execute(query)
        found = cursor.fetchmany(MAX_ROWS)
    except (sqlite3.Error, sqlite3.Warning, UnicodeEncodeError, ValueError):
        return None
    if cursor.description is None:  # nothing was asked for, as by an empty answer
        return None
    return Counter(tuple(_rounded(value) for value in row) for row in found)


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
