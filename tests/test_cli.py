"""The command line: exit statuses, messages that name file, line and field, and a help that needs no JAX."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from safemoe_jax import cli, configuration
from safemoe_jax.errors import InputError
from safemoe_jax.training.config import TrainConfig
from tests.reporting.example_run import write_example_run

GOOD_YAML = """\
model: some/folder
output: runs/x
data:
  - path: train.json
    format: samsum
    take: 100
lora:
  rank: 4
  targets: [q_proj, o_proj]
optimizer:
  learning_rate: 1e-3
defence:
  t_reg: null
"""


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(GOOD_YAML)
    return file


def parse(*arguments: str) -> TrainConfig:
    return configuration.parse(TrainConfig, arguments, program="safemoe train")[0]


def test_flags_win_over_the_file_and_the_file_over_defaults(yaml_file: Path) -> None:
    config = parse("--config", str(yaml_file), "--lora.rank", "16", "--seed=7", "--defence.t_reg", "5")
    assert (config.lora.rank, config.lora.targets) == (16, ("q_proj", "o_proj"))
    assert (config.seed, config.defence.t_reg, config.batch_size) == (7, 5, 32)
    assert config.optimizer.learning_rate == 1e-3 and config.data[0].take == 100


def test_sources_can_be_added_on_the_command_line(yaml_file: Path) -> None:
    config = parse("--config", str(yaml_file), "--data+", '{"path": "b.jsonl", "share": 0.1}')
    assert [(source.path, source.share) for source in config.data] == [("train.json", None), ("b.jsonl", 0.1)]


def test_full_fine_tuning_is_lora_null(yaml_file: Path) -> None:
    assert parse("--config", str(yaml_file), "--lora", "null").lora is None


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("learning_rate: 1e-3", "learning_rate: fast", 11, ("optimizer.learning_rate", "'fast'", "a number")),
        ("learning_rate: 1e-3", "lerning_rate: 1", 11, ("optimizer.lerning_rate", "'learning_rate'?")),
        ("take: 100", "take: many", 6, ("data[0].take", "'many'", "a whole number")),
        ("take: 100", "tkae: 100", 6, ("data[0].tkae", "'take'?")),
        ("rank: 4", "rank: 4.5", 8, ("lora.rank", "'4.5'", "a whole number")),
        ("t_reg: null", "direction: up", 13, ("defence.direction", "'up'", "forward, reverse")),
        ("targets: [q_proj, o_proj]", "targets: q_proj", 9, ("lora.targets", "a list")),
        ("output: runs/x", "model: again", 2, ("'model' is given twice", "line 1")),
        ("model: some/folder", "model: [", 3, ("not valid YAML",)),
        ("  t_reg: null", "", None, ()),
    ],
)
def test_a_wrong_file_is_named_with_line_and_field(yaml_file: Path, old, new, line, words) -> None:
    yaml_file.write_text(GOOD_YAML.replace(old, new))
    if line is None:  # an empty section is no mapping
        line, words = 12, ("defence", "a mapping with the fields name, reference")
    with pytest.raises(InputError) as caught:
        parse("--config", str(yaml_file))
    message = str(caught.value)
    assert f"{yaml_file}, line {line}" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optimizer.learning_rate", "fast"], ("--optimizer.learning_rate", "fast", "a number")),
        (["--lerning_rate", "1"], ("unknown flag '--lerning_rate'", "one of: --model")),
        (["--defence.tempreature=1"], ("'--defence.temperature'?",)),
        (["--lora.rank", "x"], ("lora.rank", "a whole number")),
    ],
)
def test_a_wrong_flag_is_named(yaml_file: Path, arguments, words) -> None:
    with pytest.raises(InputError) as caught:
        parse("--config", str(yaml_file), *arguments)
    for word in words:
        assert word in str(caught.value)


def test_missing_fields_are_named_together() -> None:
    with pytest.raises(InputError, match="model, output, data"):
        parse("--seed", "1")


def test_a_missing_and_an_empty_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        parse("--config", str(tmp_path / "none.yaml"))
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(InputError, match="empty"):
        parse("--config", str(tmp_path / "empty.yaml"))


def test_the_printed_configuration_can_be_read_back(yaml_file: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        parse("--config", str(yaml_file), "--print_config")
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert parse("--config", str(printed)) == parse("--config", str(yaml_file))


def test_help_of_a_command_has_every_field_with_its_text(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name, _ in configuration.leaf_fields(TrainConfig):
        assert f"--{name}" in text or f"  {name.rpartition('.')[2]}: " in text, name
    for words in ("prompts of each kind that ride along", "the update is scaled by alpha / rank", "--debug"):
        assert " ".join(words.split()) in " ".join(text.split())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_complete_help(name: str, capsys) -> None:
    config_class = cli._load(cli.COMMANDS[name].config)
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    undocumented = [field for field, words in configuration.field_texts(config_class) if not words]
    assert undocumented == []
    assert f"usage: safemoe {name}" in text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_titles_in_the_help_are_whole(name: str, capsys) -> None:
    config_class = cli._load(cli.COMMANDS[name].config)
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    titles = [
        line for line in capsys.readouterr().out.splitlines() if line[:1].strip() and line.endswith(":")
    ]
    fields = {text.rstrip(".") + ":" for _, text in configuration.field_texts(config_class)}
    named = [title for title in titles if title not in fields and not title.startswith("Fields of ")]
    assert named == ["options:", "fields:", "flags of every command:"]


@pytest.mark.parametrize("arguments", [["evaluate", "--help"], ["evaluate", "--print_config"], ["--help"]])
def test_a_reader_that_leaves_ends_the_program_quietly(arguments) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "safemoe_jax.cli", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_connection_that_breaks_is_no_reader_that_leaves(monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(cli, "run", fail)
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stdout, pytest.raises(BrokenPipeError):
        monkeypatch.setattr(sys, "stdout", stdout)
        cli.main(["report"])
    os.close(reader)


def test_wrong_input_exits_2_without_traceback_unless_debug(tmp_path: Path, capsys) -> None:
    assert cli.main(["report", "--run", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: there is nothing to report") and "Traceback" not in captured.err
    with pytest.raises(InputError):
        cli.main(["report", "--run", str(tmp_path), "--debug"])


def test_an_unknown_command_suggests_one(capsys) -> None:
    assert cli.main(["trian"]) == 2
    assert "'train'?" in capsys.readouterr().err


def test_report_writes_the_page_and_prints_the_table(tmp_path: Path, capsys) -> None:
    folder = write_example_run(tmp_path / "run")
    assert cli.main(["report", "--run", str(folder)]) == 0
    assert (folder / "report.html").is_file()
    out = capsys.readouterr().out
    assert "24.5" in out and str(folder / "report.html") in out


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 2, "the disk is full\n  where: runs/a"),
        (RuntimeError("write failed: No space left on device"), 2, "the disk is full"),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs/b"),
            2,
            "permission denied\n  where: runs/b",
        ),
    ],
)
def test_exit_status_of_what_can_go_wrong(monkeypatch, capsys, error, status, words) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "run", fail)
    assert cli.main(["report"]) == status
    assert words in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(cli, "run", fail)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["report"])


def test_the_overview_is_fast_because_it_imports_no_library() -> None:
    program = (
        "import sys, resource\n"
        "from safemoe_jax.cli import main\n"
        "status = main(['--help'])\n"
        "heavy = {'jax', 'flax', 'transformers', 'torch', 'jsonargparse', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_utime < 1.0\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert f"  {name} " in done.stdout


def test_where_compiled_programs_are_kept(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SAFEMOE_XLA_CACHE", raising=False)
    assert cli.cache_folder("auto").parent == tmp_path / ".cache" / "safemoe_jax" / "xla"
    assert cli.cache_folder("off") is None and cli.cache_folder("/x") == Path("/x")
    monkeypatch.setenv("SAFEMOE_XLA_CACHE", "off")
    assert cli.cache_folder("auto") is None
