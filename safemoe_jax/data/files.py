"""Rows of JSON, JSON Lines, CSV, parquet and plain-text files, and of data sets on the Hugging Face hub.

A row keeps the place it came from, so that every later complaint can name file and line. The only effects are
reads.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from safemoe_jax.errors import InputError

_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".parquet", ".txt")
_COMPRESSIONS = (".gz", ".xz")
_FILE_OR_HUB_ID = f"a file ({', '.join(_SUFFIXES)}) or a hub id owner/name"
_HUB_ID = re.compile(r"^(?P<repo>[A-Za-z0-9][\w.\-]*/[\w.\-]+)(?::(?P<config>[\w.\-]+))?$")
# The hub converts every public data set to parquet on this branch, as CONFIG/SPLIT/NNNN.parquet: one layout
# for all.
_PARQUET_BRANCH = "refs/convert/parquet"

_Answer = TypeVar("_Answer")


class Row(NamedTuple):
    """One record: its value, its number in the file (from 0) and where it stands, for messages."""

    value: dict[str, Any] | str
    index: int
    place: str


def read_rows(path: str, split: str | None = None) -> list[Row]:
    """Reads all records of a local file or, when no such file exists, of a hub data set.

    Args:
        path: a file ending in .json, .jsonl, .ndjson, .csv, .parquet or .txt (.gz or .xz may follow), or a
            hub id `owner/name` or `owner/name:config`.
        split: the split of a hub data set; ignored for files.

    Returns:
        The rows in file order: dictionaries, or strings where the file is a list of strings.

    Raises:
        InputError: no such file, unreadable, not UTF-8, malformed (with the line), empty.
    """
    if (file := _existing(path)) is not None:
        rows = _read_file(file)
    elif match := _hub_match(path):
        rows = _read_hub(match["repo"], match["config"], split)
    else:
        raise InputError(
            "no such data file",
            where=path,
            expected=_FILE_OR_HUB_ID,
        )
    if not rows:
        raise InputError("the data file is empty", where=path, expected="at least one record")
    return [Row(row.value, index, row.place) for index, row in enumerate(rows)]


def _existing(path: str) -> Path | None:
    try:
        file = Path(path).expanduser()
        return file if file.exists() else None
    except (OSError, RuntimeError) as error:  # a name too long, a folder closed to us; no such user's home
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"cannot look for the data file: {reason}", where=path, expected=_FILE_OR_HUB_ID
        ) from error


def _hub_match(path: str) -> re.Match[str] | None:
    looks_like_a_file = _format_suffix(Path(path)) in _SUFFIXES
    return None if looks_like_a_file else _HUB_ID.match(path)


def _format_suffix(file: Path) -> str:
    bare = file.with_suffix("") if file.suffix.lower() in _COMPRESSIONS else file
    return bare.suffix.lower()


def _read_file(file: Path) -> list[Row]:
    suffix = _format_suffix(file)
    if file.is_dir() or suffix not in _SUFFIXES:
        what = "a folder is not a data file" if file.is_dir() else f"unknown kind of data file '{suffix}'"
        raise InputError(what, where=str(file), expected=f"a file ending in one of {', '.join(_SUFFIXES)}")
    if suffix == ".parquet":
        return _read_parquet(file)
    text = _read_text(file)
    if not text.strip():
        raise InputError("the data file is empty", where=str(file), expected="at least one record")
    readers = {".csv": _parse_csv, ".json": _parse_json, ".txt": _parse_plain}
    return list(readers.get(suffix, _parse_json_lines)(text, str(file)))


def _read_text(file: Path) -> str:
    openers = {".gz": gzip.open, ".xz": lzma.open}
    try:
        # utf-8-sig: spreadsheets write a byte-order mark, which would become part of the first field's name.
        with openers.get(file.suffix.lower(), open)(file, "rt", encoding="utf-8-sig", newline="") as handle:
            return handle.read()
    except UnicodeDecodeError as error:
        raise InputError(
            f"the data file is not UTF-8 text (byte {error.start})", where=str(file), expected="UTF-8"
        ) from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise InputError(
            f"cannot read the data file: {error}", where=str(file), expected="a readable file"
        ) from error


def _parse_json(text: str, file: str) -> Iterator[Row]:
    try:
        document = _loads(text, file)
    except json.JSONDecodeError as error:
        # A whole document on the first line and more behind it: JSON Lines under the name .json.
        if error.msg == "Extra data" and "\n" not in text[: error.pos].strip():
            yield from _parse_json_lines(text, file)
            return
        raise _malformed(error, file, error.lineno) from error
    if isinstance(document, dict):
        name, value = next(iter(document.items()), ("", None))
        wrapped = len(document) == 1 and isinstance(value, list) and name not in ("messages", "conversations")
        document = value if wrapped else [document]
    if not isinstance(document, list):
        raise InputError(
            "the JSON document is not a list", where=file, expected="a list of objects or of strings"
        )
    for index, value in enumerate(document):
        yield _row(value, index, f"{file}, row {index + 1}")


def _parse_json_lines(text: str, file: str) -> Iterator[Row]:
    # Not splitlines(): it also breaks at U+2028 and form feeds, which may stand bare inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{file}, line {number}"
            try:
                value = _loads(line, place)
            except json.JSONDecodeError as error:
                raise _malformed(error, file, number) from error
            yield _row(value, number - 1, place)


def _loads(text: str, where: str) -> Any:
    """`json.loads`, which refuses two kinds of valid JSON without a JSONDecodeError.

    Raises:
        InputError: it is nested deeper than Python's stack, or has a number that Python does not convert.
        json.JSONDecodeError: it is malformed.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise _too_deep(where) from error
    except ValueError as error:
        limit = sys.get_int_max_str_digits()
        raise InputError(
            "a number has too many digits", where=where, expected=f"at most {limit} digits, or text"
        ) from error


def _too_deep(where: str) -> InputError:
    return InputError("JSON is nested too deep", where=where, expected="lists and objects a few levels deep")


def _malformed(error: json.JSONDecodeError, file: str, line: int) -> InputError:
    return InputError(
        f"malformed JSON: {error.msg}",
        where=f"{file}, line {line}, column {error.colno}",
        expected="valid JSON",
    )


def _row(value: Any, index: int, place: str) -> Row:
    if not isinstance(value, dict | str):
        raise InputError(
            f"a record is a {type(value).__name__}", where=place, expected="an object or a string"
        )
    _check_characters(value, place)
    return Row(value, index, place)


def _check_characters(value: Any, place: str) -> None:
    """JSON can escape half of a surrogate pair by itself, which no tokenizer takes and no file can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text holds half of a character, U+{ord(error.object[error.start]):04X}",
            where=place,
            expected="both halves of the surrogate pair, or neither",
        ) from error
    except RecursionError as error:  # writing takes a level more than reading did
        raise _too_deep(place) from error


def _parse_csv(text: str, file: str) -> Iterator[Row]:
    # The library's limit of 131,072 characters a cell is one for the whole process. It guards against reading
    # a file as one cell by mistake; here the text is in memory already.
    limit = csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        _check_header(reader.fieldnames or (), file)
        for index, value in enumerate(reader):
            # line_num is the record's last line; cells may span several.
            breaks = sum(cell.count("\n") for cell in value.values() if isinstance(cell, str))
            place = f"{file}, line {reader.line_num - breaks}"
            if None in value:
                raise InputError(
                    "a line has more cells than the header", where=place, expected="one cell a column"
                )
            yield Row(value, index, place)
    except csv.Error as error:
        raise InputError(
            f"malformed CSV: {error}",
            where=f"{file}, line {reader.reader.line_num}",
            expected="quoted, comma-separated text",
        ) from error
    finally:
        csv.field_size_limit(limit)


def _check_header(names: Sequence[str], file: str) -> None:
    """Of two columns of one name the second would hide the first. Nothing reads columns without a name."""
    repeated = [name for name, count in Counter(names).items() if count > 1 and name]
    if repeated:
        raise InputError(
            f"two columns have the name '{repeated[0]}'",
            where=f"{file}, line 1",
            expected="a header that names each column once",
        )


def _parse_plain(text: str, file: str) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield Row(line.strip(), number - 1, f"{file}, line {number}")


def _read_parquet(file: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        # One file, opened by us: the data-set reader would treat folder names like "a=1" as columns.
        with file.open("rb") as handle:
            values = pyarrow.parquet.ParquetFile(handle).read().to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(
            f"cannot read the parquet file: {error}", where=str(file), expected="a parquet file"
        ) from error
    return [Row(value, index, f"{file}, row {index + 1}") for index, value in enumerate(values)]


def _read_hub(repo: str, config: str | None, split: str | None) -> list[Row]:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import RevisionNotFoundError

    def names(revision: str) -> list[str]:
        return HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)

    def listing() -> tuple[str, list[str]]:
        try:
            return _PARQUET_BRANCH, names(_PARQUET_BRANCH)
        except RevisionNotFoundError:  # gated and private data sets are not converted
            return "main", names("main")

    revision, found = _ask_hub(repo, listing)
    chosen = choose_hub_files(found, config=config, split=split, repo=repo)
    local = _ask_hub(
        repo, lambda: [hf_hub_download(repo, n, repo_type="dataset", revision=revision) for n in chosen]
    )
    values = [row.value for name in local for row in _read_file(Path(name))]
    return [Row(v, index, f"{repo} ({split or 'train'}), row {index + 1}") for index, v in enumerate(values)]


def _ask_hub(repo: str, question: Callable[[], _Answer]) -> _Answer:
    try:
        return question()
    except Exception as error:  # the HTTP library behind the client, and so its exceptions, differ by version
        raise InputError(
            f"neither a file nor a data set that the hub gives us: {type(error).__name__}: {error}",
            where=repo,
            expected="a local file, or the id of a data set you can reach (log in for gated ones)",
        ) from error


def choose_hub_files(names: list[str], *, config: str | None, split: str | None, repo: str) -> list[str]:
    """Picks the files of one split of a hub data set.

    Args:
        names: every path in the repository, at the parquet branch or at main.
        config: the configuration's name; None where only one configuration has the split.
        split: the split; None means `train`, or the only split there is.
        repo: the id, for messages.

    Returns:
        Paths, sorted. At the parquet branch those under CONFIG/SPLIT/, else the data files with the split in
        the name.

    Raises:
        InputError: no such split, or several configurations have it.
    """
    parts = {name: Path(name).parts for name in names}
    converted = {name: (p[0], p[1]) for name, p in parts.items() if len(p) == 3 and name.endswith(".parquet")}
    if not converted:
        return _choose_by_name(names, split, repo)
    pairs = {pair for pair in converted.values() if config in (None, pair[0])}
    splits = {pair[1] for pair in pairs}
    wanted = split or (splits.copy().pop() if len(splits) == 1 else "train")
    matches = sorted(pair for pair in pairs if pair[1] == wanted)
    if len(matches) != 1:
        what = "no such split" if not matches else "several configurations have this split"
        known = ", ".join(f"{c}/{s}" for c, s in sorted(set(converted.values())))
        raise InputError(
            f"{what}: '{wanted}'", where=repo, expected=f"owner/name:config and a split among {known}"
        )
    return sorted(name for name, pair in converted.items() if pair == matches[0])


def _choose_by_name(names: list[str], split: str | None, repo: str) -> list[str]:
    data = [name for name in names if _format_suffix(Path(name)) in set(_SUFFIXES) - {".txt"}]
    word = re.compile(rf"(^|[^A-Za-z0-9]){re.escape(split or 'train')}([^A-Za-z0-9]|$)")
    chosen = sorted(name for name in data if word.search(name))
    if not chosen and len(data) == 1 and split is None:
        chosen = data
    if not chosen:
        raise InputError(
            f"no data file for the split '{split or 'train'}'",
            where=repo,
            expected=f"one of: {', '.join(data) or '-'}",
        )
    return chosen
