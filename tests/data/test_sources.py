"""Files and formats -> samples, and the message of every wrong input."""

from __future__ import annotations

import bisect
import contextlib
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from safemoe_jax.data.files import choose_hub_files
from safemoe_jax.data.sources import SourceConfig, read_prompts, read_source
from safemoe_jax.errors import InputError

ROWS = [
    {"prompt": "How?", "response": "So.", "is_safe": True, "label": "a"},
    {"prompt": "Why, then?", "response": 'Because of "this",\nand that.', "is_safe": False, "label": "b"},
    {"prompt": "Where? \u2028 Là", "response": "Here.", "is_safe": False, "label": "a"},
    {"prompt": "When?", "response": "Now.", "is_safe": True, "label": ""},
    {"prompt": "Who?", "response": "Me.", "is_safe": False, "label": "c"},
]


def write_json(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return str(path)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    openers = {".gz": gzip.open, ".xz": lzma.open}
    with openers.get(path.suffix, open)(path, "wt", encoding="utf-8") as handle:
        handle.write(text)
    return str(path)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.open("w", newline="", encoding="utf-8-sig") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


SQL_SYSTEM = (
    "You are a helpful assistant for answering SQL questions. Based on the given Table, "
    "generate a SQL for the following question."
)

WRITERS = {
    "a.json": write_json,
    "a.jsonl": write_jsonl,
    "lines_under.json": write_jsonl,
    "a.jsonl.gz": write_jsonl,
    "a.jsonl.xz": write_jsonl,
    "a.csv": write_csv,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_samples(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, ROWS)
    samples = read_source(SourceConfig(path, where="is_safe == False"))
    assert [(s.user, s.answer, s.index) for s in samples] == [
        (ROWS[i]["prompt"], ROWS[i]["response"], i) for i in (1, 2, 4)
    ]
    assert all(s.source == path and s.system is None for s in samples)


@pytest.mark.parametrize(
    ("row", "name", "system", "user", "answer"),
    [
        (
            {"id": "7", "dialogue": "A: hi\r\nB: ho", "summary": "They greet."},
            "samsum",
            "You are a helpful assistant for dialog summarization.",
            "Summarize this dialog: A: hi\r\nB: ho",
            "They greet.",
        ),
        (
            {"question": "How many?", "context": "CREATE TABLE t (a INTEGER)", "answer": "SELECT 1"},
            "sql_create_context",
            SQL_SYSTEM,
            "Question: How many?\nTable: CREATE TABLE t (a INTEGER)",
            "SELECT 1",
        ),
        (
            {
                "instruction": "Convert.",
                "input": "## Natural Language Query:\nHow many ?\n## Context:\nCREATE TABLE t (a INTEGER)\n",
                "output": "SELECT COUNT(*) FROM t",
            },
            "sql_create_context",
            SQL_SYSTEM,
            "Question: How many ?\nTable: CREATE TABLE t (a INTEGER)",
            "SELECT COUNT(*) FROM t",
        ),
        ({"prompt": "p", "response": "r", "is_safe": False}, "beavertails", None, "p", "r"),
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca", None, "i", "o"),
        ({"instruction": "i", "input": "x", "output": "o"}, "alpaca", None, "i\n\nx", "o"),
        ({"instruction": "i", "input": "", "output": "o"}, "safeinstr", None, "i", "o"),
        ({"instruction": "i"}, "safeinstr", None, "i", None),
        ("i", "safeinstr", None, "i", None),
        ({"Index": 0, "Goal": "g", "Target": "Sure"}, "jailbreakbench", None, "g", None),
        ("p", "prompts", None, "p", None),
        ({"category": "c", "forbidden_prompt": "f"}, "prompts", None, "f", None),
        ({"id": "1", "prompt": "p", "label": "safe"}, "prompts", None, "p", None),
        ({"goal": "g"}, "prompts", None, "g", None),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
                          {"role": "assistant", "content": "a"}]},
            "chat", "s", "u", "a",
        ),
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"},
                               {"from": "human", "value": "v"}]},
            "chat", None, "v", None,
        ),
    ],
)  # fmt: skip
def test_formats(
    tmp_path: Path, row: Any, name: str, system: str | None, user: str, answer: str | None
) -> None:
    path = write_json(tmp_path / "a.json", [row])
    (sample,) = read_source(SourceConfig(path, format=name))
    assert (sample.system, sample.user, sample.answer) == (system, user, answer)
    (detected,) = read_source(SourceConfig(path))
    assert (detected.system, detected.user, detected.answer) == (system, user, answer)


def test_extra_keeps_the_record_and_prompts_lose_the_answer(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", ROWS)
    assert [dict(s.extra) for s in read_source(SourceConfig(path))] == ROWS
    prompts = read_prompts(SourceConfig(path, take=2))
    assert [(p.user, p.answer) for p in prompts] == [("How?", None), ("Why, then?", None)]
    chat = write_json(
        tmp_path / "b.json",
        [{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}],
    )
    (prompt,) = read_prompts(SourceConfig(chat))
    assert prompt.messages == ({"role": "user", "content": "u"},)


def test_filter_then_skip_then_take(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "response": "r", "n": i % 3} for i in range(20)]
    path = write_json(tmp_path / "a.json", rows)
    samples = read_source(SourceConfig(path, where="n == 1", skip=1, take=3))
    assert [s.user for s in samples] == ["4", "7", "10"]


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("is_safe == False", [1, 2, 4]),
        ("is_safe != false", [0, 3]),
        ("label == 'a'", [0, 2]),
        ('label != "a" and is_safe == False', [1, 4]),
        ("`label` == 'c'", [4]),
        ("label != null", [0, 1, 2, 4]),
        ("prompt != 'x == 1 and y'", [0, 1, 2, 3, 4]),
    ],
)
def test_where(tmp_path: Path, where: str, kept: list[int]) -> None:
    samples = read_source(SourceConfig(write_json(tmp_path / "a.json", ROWS), where=where))
    assert [s.index for s in samples] == kept


def test_where_reads_cells_of_a_csv_as_what_they_are_compared_with(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "response": "r", "n": n, "flag": f} for i, (n, f) in enumerate(
        [("1", "True"), ("1.0", "FALSE"), ("", ""), ("x", "1")]
    )]  # fmt: skip
    path = write_csv(tmp_path / "a.csv", rows)

    def kept(where: str) -> list[int]:
        return [s.index for s in read_source(SourceConfig(path, where=where))]

    assert kept("n == 1") == [0, 1]
    assert kept("flag == True") == [0]
    assert kept("n == null") == [2]
    assert kept("n != null and flag != 'FALSE'") == [0, 3]


@pytest.mark.parametrize(
    "where",
    ["is_safe", "is_safe = False", "__import__('os')", "a == b", "a == 1 or b == 2", "a == 1 and", "a == 'x"],
)
def test_where_refuses_anything_else(tmp_path: Path, where: str) -> None:
    with pytest.raises(InputError) as caught:
        read_source(SourceConfig(write_json(tmp_path / "a.json", ROWS), where=where))
    assert where in caught.value.where and "FIELD == VALUE" in caught.value.expected


DEEP = b"[" * 100_000 + b"]" * 100_000
BAD_FILES = {
    "empty.json": (b"", "empty", "empty.json"),
    "blank.jsonl": (b"\n  \n", "empty", "blank.jsonl"),
    "no_rows.json": (b"[]", "empty", "no_rows.json"),
    "header.csv": (b"prompt,response\n", "empty", "header.csv"),
    "bad.json": (b'[\n{"prompt": "a"},\n{"prompt": }\n]', "malformed JSON", "bad.json, line 3"),
    "cut.json": (b'[{"prompt": "a"},\n{"prompt": "b"', "malformed JSON", "cut.json, line 2"),
    "rest.json": (b'[\n{"prompt": "a"}\n]\nrest', "malformed JSON", "rest.json, line 4"),
    "bad.jsonl": (b'{"prompt": "a"}\n\n{"prompt": "b"\n', "malformed JSON", "bad.jsonl, line 3"),
    "deep.json": (b'[{"prompt": ' + DEEP + b"}]", "nested too deep", "deep.json"),
    "deep.jsonl": (b'"a"\n' + DEEP, "nested too deep", "deep.jsonl, line 2"),
    "digits.json": (b'[{"prompt": "a", "n": ' + b"1" * 4301 + b"}]", "too many digits", "digits.json"),
    "digits.jsonl": (b'"a"\n{"n": ' + b"1" * 4301 + b"}", "too many digits", "digits.jsonl, line 2"),
    "half.jsonl": (
        b'{"prompt": "a"}\n{"prompt": "b \\ud800"}\n', "half of a character, U+D800", "half.jsonl, line 2"
    ),
    "half_name.json": (b'["a", {"prompt": "b", "\\udfff": 1}]', "U+DFFF", "half_name.json, row 2"),
    "number.json": (b"3", "not a list", "number.json"),
    "numbers.json": (b'["a", 3]', "a record is a int", "numbers.json, row 2"),
    "latin.json": ('["Größe"]'.encode("latin-1"), "not UTF-8", "latin.json"),
    "cells.csv": (b'prompt,response\n"a\nb",c\nd,e,f\n', "more cells", "cells.csv, line 4"),
    "twice.csv": (
        b"prompt,response,prompt\na,b,c\n", "two columns have the name 'prompt'", "twice.csv, line 1"
    ),
    "quote.csv": (b'prompt,response\na,"b\n', "malformed CSV", "quote.csv, line 2"),
    "bad.parquet": (b"PAR1 not really", "cannot read the parquet file", "bad.parquet"),
    "bad.jsonl.gz": (b"not gzip", "cannot read", "bad.jsonl.gz"),
    "bad.jsonl.xz": (b"not xz", "cannot read", "bad.jsonl.xz"),
    "table.xlsx": (b"x", "unknown kind", "table.xlsx"),
    "field.jsonl": (
        b'{"prompt": "a", "response": "b"}\n{"prompt": "c"}\n', "missing", "line 2, field 'response'"
    ),
    "null.jsonl": (b'{"dialogue": null, "summary": "b"}\n', "empty", "line 1, field 'dialogue'"),
    "kind.json": (b'[{"prompt": "a", "response": ["b"]}]', "not text", "row 1, field 'response'"),
    "short.csv": (b"prompt,response\na,b\n\nc\n", "empty", "short.csv, line 4, field 'response'"),
    "unknown.json": (b'[{"x": "a", "y": "b"}]', "no format fits the fields x, y", "unknown.json, row 1"),
    "mixed.json": (b'[{"prompt": "a", "response": "b"}, "c"]', "bare string", "mixed.json, row 2"),
    "sql.json": (
        b'[{"instruction": "a", "input": "## Context: only", "output": "b"}]',
        "does not hold a question",
        "row 1, field 'input'",
    ),
    "turns.json": (
        b'[{"messages": [{"role": "assistant", "content": "a"}]}]',
        "roles are out of order",
        "turns.json, row 1",
    ),
    "role.json": (
        b'[{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "a"}]}]',
        "lacks its role",
        "row 1, field 'messages', message 2",
    ),
    "role_list.json": (
        b'[{"messages": [{"role": ["user"], "content": "a"}]}]',
        "lacks its role",
        "row 1, field 'messages', message 1",
    ),
    "blank_prompt.json": (b'["a", " "]', "a prompt is empty", "row 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_say_what_and_where(tmp_path: Path, name: str) -> None:
    content, what, where = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_source(SourceConfig(str(tmp_path / name)))
    assert what in caught.value.what
    assert where in caught.value.where and name in caught.value.where
    assert caught.value.expected


def test_no_depth_of_nesting_is_a_traceback(tmp_path: Path) -> None:
    """Around the depth that Python's stack allows: reading a record and writing it end at different ones."""

    def too_deep(depth: int) -> bool:
        try:
            json.loads("[" * depth + "]" * depth)
        except RecursionError:
            return True
        return False

    border = bisect.bisect_left(range(100_000), True, key=too_deep)
    file = tmp_path / "a.jsonl"
    for depth in range(border - 60, border):
        file.write_text('{"prompt": "a", "x": ' + "[" * depth + "]" * depth + "}")
        with contextlib.suppress(InputError):
            assert len(read_source(SourceConfig(str(file)))) == 1


def test_a_pair_of_escapes_is_one_character_and_an_escaped_backslash_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'"\ud83d\ude42 and \\ud800"')
    (sample,) = read_source(SourceConfig(str(tmp_path / "a.jsonl")))
    assert sample.user == "\N{SLIGHTLY SMILING FACE} and \\ud800"


def test_a_cell_of_a_table_may_be_as_long_as_a_record_of_json(tmp_path: Path) -> None:
    """The csv library's own limit is 131,072 characters a cell; it is there again afterwards."""
    limit, rows = csv.field_size_limit(), [{"prompt": "a" * 300_000, "response": "b"}]
    (sample,) = read_source(SourceConfig(write_csv(tmp_path / "a.csv", rows)))
    assert sample.user == rows[0]["prompt"] and csv.field_size_limit() == limit


def test_columns_without_a_name_may_be_several(tmp_path: Path) -> None:
    """Spreadsheets write the empty columns behind a table; no format reads a column without a name."""
    (tmp_path / "a.csv").write_text("prompt,response,,\na,b,,\n")
    (sample,) = read_source(SourceConfig(str(tmp_path / "a.csv")))
    assert (sample.user, sample.answer) == ("a", "b")


def test_an_empty_field_hints_at_the_filter_that_helps(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": ""}]
    path = write_json(tmp_path / "a.json", rows)
    with pytest.raises(InputError) as caught:
        read_source(SourceConfig(path))
    assert "response != ''" in caught.value.expected
    assert len(read_source(SourceConfig(path, where="response != ''"))) == 1


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"format": "csv"}, "unknown data format"),
        ({"take": 0}, "take is 0"),
        ({"skip": -1}, "skip is -1"),
        ({"share": 1.5}, "share is 1.5"),
        ({"skip": 5}, "no record is left of 5"),
        ({"where": "label == 'z'"}, "no record is left of 5"),
        ({"where": "nothing == 1"}, "a field that the record lacks"),
        ({"format": "samsum"}, "field is missing"),
    ],
)
def test_bad_configurations(tmp_path: Path, fields: dict[str, Any], what: str) -> None:
    path = write_json(tmp_path / "a.json", ROWS)
    with pytest.raises(InputError) as caught:
        read_source(SourceConfig(path, **fields))
    assert what in caught.value.what and path in caught.value.where


@pytest.mark.parametrize("path", ["nothing.json", "some/folder/nothing.jsonl", "/a/b/c", "one"])
def test_a_missing_file_is_not_looked_for_on_the_hub(path: str) -> None:
    with pytest.raises(InputError, match="no such data file") as caught:
        read_source(SourceConfig(path))
    assert path in caught.value.where


@pytest.mark.parametrize(
    ("path", "reason"),
    [("a" * 256 + ".json", "File name too long"), ("~nobody-of-this-name/a.json", "home directory")],
)
def test_a_path_that_the_system_refuses(path: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"cannot look for the data file: .*{reason}") as caught:
        read_source(SourceConfig(path))
    assert caught.value.where == path and "hub id" in caught.value.expected


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder is not a data file"):
        read_source(SourceConfig(str(tmp_path)))


def test_a_hub_id_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="neither a file nor a data set") as caught:
        read_source(SourceConfig("nobody/nothing"))
    assert "nobody/nothing" in caught.value.where


def test_a_hub_id_is_read_from_its_converted_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hub client's two calls replaced: the files of the split are fetched and read in order."""
    import huggingface_hub

    asked: list[tuple[str, str]] = []

    def fetch(repo: str, name: str, *, repo_type: str, revision: str) -> str:
        asked.append((repo, name))
        local = tmp_path / Path(name).name
        return write_parquet(local, ROWS[:2] if name.endswith("0000.parquet") else ROWS[2:])

    names = ["default/test/0000.parquet", "default/train/0001.parquet", "default/train/0000.parquet"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: names)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    samples = read_source(SourceConfig("owner/name", split="train"))
    assert [(s.user, s.index) for s in samples] == [(row["prompt"], i) for i, row in enumerate(ROWS)]
    assert asked == [("owner/name", f"default/train/000{n}.parquet") for n in (0, 1)]
    assert samples[2].place == "owner/name (train), row 3"


JBB = [
    ".gitattributes",
    "behaviors/harmful/0000.parquet",
    "behaviors/benign/0000.parquet",
    "judge_comparison/test/0000.parquet",
]


@pytest.mark.parametrize(
    ("names", "config", "split", "chosen"),
    [
        (JBB, None, "harmful", ["behaviors/harmful/0000.parquet"]),
        (JBB, "judge_comparison", None, ["judge_comparison/test/0000.parquet"]),
        (["README.md", "train.csv", "test.csv"], None, None, ["train.csv"]),
        (
            ["round0/330k/train.jsonl.xz", "round0/30k/test.jsonl.xz"],
            None,
            "test",
            ["round0/30k/test.jsonl.xz"],
        ),
        (["README.md", "sql_v4.json"], None, None, ["sql_v4.json"]),
    ],
)
def test_hub_files(names: list[str], config: str | None, split: str | None, chosen: list[str]) -> None:
    assert choose_hub_files(names, config=config, split=split, repo="r") == chosen


@pytest.mark.parametrize(
    ("names", "split", "what"),
    [
        (JBB, None, "no such split: 'train'"),
        (["a/train/0000.parquet", "b/train/0000.parquet"], "train", "several configurations"),
        (["training.csv"], "train", "no data file for the split"),
    ],
)
def test_hub_files_refused(names: list[str], split: str | None, what: str) -> None:
    with pytest.raises(InputError, match=what):
        choose_hub_files(names, config=None, split=split, repo="r")
