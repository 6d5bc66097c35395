"""The `safemoe` program: which command, its configuration, its exit status. All work is in `workflows/`.

Exit status: 0 done; 2 wrong input or a full disk, one message on stderr; 130 interrupted; 141 nobody reads
what is printed any more, as after `| head`; 1 and a traceback: a bug.
"""

from __future__ import annotations

import errno
import hashlib
import os
import select
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from safemoe_jax import __version__
from safemoe_jax.errors import InputError

WORKFLOWS = "safemoe_jax.workflows"


@dataclass(frozen=True)
class Command:
    """One command: where its function and its configuration live, imported only when it is called.

    Attributes:
        summary: line for the overview.
        function: "module:name" of a function: configuration in, what is printed at the end out.
        config: "module:name" of the dataclass.
        uses_devices: whether JAX and the run's other processes are started.
        first_word: the field that a first argument without a flag fills, "" for none.
    """

    summary: str
    function: str
    config: str
    uses_devices: bool = True
    first_word: str = ""


COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        "build a small aligned model, attack it, defend it, and report; minutes on two cores",
        f"{WORKFLOWS}.quickstart:quickstart",
        f"{WORKFLOWS}.quickstart:QuickstartConfig",
    ),
    "organism": Command(
        "write the built-in model organism: a small aligned MoE, its tokenizer and its data",
        f"{WORKFLOWS}.organism:build_organism",
        f"{WORKFLOWS}.organism:OrganismConfig",
    ),
    "reference": Command(
        "record how the aligned model routes a set of prompts (what the defences hold on to)",
        f"{WORKFLOWS}.reference:extract_reference",
        f"{WORKFLOWS}.reference:ReferenceConfig",
    ),
    "train": Command(
        "fine-tune a checkpoint on data, with or without a defence",
        f"{WORKFLOWS}.train:finetune",
        "safemoe_jax.training.config:TrainConfig",
    ),
    "generate": Command(
        "answer the prompts of a file",
        f"{WORKFLOWS}.generate:generate",
        f"{WORKFLOWS}.generate:GenerateConfig",
    ),
    "evaluate": Command(
        "measure harmfulness, over-refusal, task accuracy and routing drift",
        f"{WORKFLOWS}.evaluate:evaluate",
        f"{WORKFLOWS}.evaluate:EvaluateConfig",
    ),
    "drift": Command(
        "compare the routing of two models on the same prompts, layer by layer",
        f"{WORKFLOWS}.drift:drift",
        f"{WORKFLOWS}.drift:DriftConfig",
    ),
    "inspect": Command(
        "print what a checkpoint is, without loading its weights",
        f"{WORKFLOWS}.inspect:inspect",
        f"{WORKFLOWS}.inspect:InspectConfig",
        uses_devices=False,
        first_word="model",
    ),
    "export": Command(
        "merge an adapter into a Hugging Face folder, or copy it as a PEFT adapter",
        f"{WORKFLOWS}.export:export",
        f"{WORKFLOWS}.export:ExportConfig",
    ),
    "report": Command(
        "write report.html from the files of a run folder",
        f"{WORKFLOWS}.report:report",
        f"{WORKFLOWS}.report:ReportConfig",
        uses_devices=False,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    Args:
        arguments: the command line without the program's name; `sys.argv[1:]` by default.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            return _main(arguments)
        finally:
            sys.stdout.flush()  # here, where a reader that has gone can still be met
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        # What is left in the buffer is flushed once more at exit; this time somewhere that takes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # what a shell reports of a program that SIGPIPE (13) ended: 128 + 13


def _reader_has_gone() -> bool:
    """Whether stdout is the pipe that broke, and not a connection somewhere in a library."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLERR)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"safemoe {__version__}")
        return 0
    try:
        run(arguments[0], arguments[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = user_message(error)
        if message is None or "--debug" in arguments:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    return 0


def run(name: str, arguments: Sequence[str]) -> None:
    """Parses one command's configuration, calls its function and prints what it returns, if anything.

    Raises:
        InputError: the command is unknown, or its input is wrong.
    """
    from safemoe_jax.configuration import parse, suggest

    if name not in COMMANDS:
        known = suggest(name, list(COMMANDS))
        raise InputError(f"unknown command '{name}'", where="the command line", expected=known)
    command = COMMANDS[name]
    if command.first_word and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{command.first_word}", *arguments]
    config, shared = parse(_load(command.config), arguments, program=f"safemoe {name}")
    if command.uses_devices:
        _start_devices(shared.xla_cache)
    outcome = _load(command.function)(config)
    if outcome is not None:
        print(outcome)


def overview() -> str:
    """The text of `safemoe --help`."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: safemoe COMMAND [--config FILE.yaml] [--FIELD VALUE ...]",
            "",
            "Fine-tune Mixture-of-Experts language models without losing their refusals.",
            "",
            "commands:",
            *lines,
            "",
            "safemoe COMMAND --help          every field of a command, its type and its default",
            "safemoe COMMAND --print_config  the resolved configuration as YAML, ready to be edited",
            "safemoe --version",
        ]
    )


def user_message(error: BaseException) -> str | None:
    """What to tell a user about this error; None where it is a bug and deserves its traceback."""
    if isinstance(error, InputError):
        return str(error)
    for cause in _chain(error):
        code = getattr(cause, "errno", None)
        place = getattr(cause, "filename", None) or "the output folder"
        # Libraries written in other languages carry the system's words, not its number.
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(cause):
            room = "free space; what was there before is intact"
            return str(InputError("the disk is full", where=str(place), expected=room))
        if code in (errno.EACCES, errno.EROFS):
            right = "a place that you may read and write"
            return str(InputError("permission denied", where=str(place), expected=right))
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and what caused it, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _load(place: str) -> Any:
    module, name = place.split(":")
    return getattr(import_module(module), name)


def _start_devices(cache: str) -> None:
    """Turns the compilation cache on and joins the processes of this run, before any device is touched."""
    import jax

    from safemoe_jax.parallel.multihost import start_processes

    folder = cache_folder(cache)
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    start_processes()


def cache_folder(setting: str) -> Path | None:
    """Where compiled programs are kept: the flag, SAFEMOE_XLA_CACHE or the home folder; None: nowhere.

    A program compiled for one processor may use instructions that another lacks, and a home folder is often
    shared between machines, so the default folder is one per kind of processor.
    """
    setting = os.environ.get("SAFEMOE_XLA_CACHE", "auto") if setting == "auto" else setting
    if setting == "off":
        return None
    if setting != "auto":
        return Path(setting).expanduser()
    return Path.home() / ".cache" / "safemoe_jax" / "xla" / _processor_kind()


def _processor_kind() -> str:
    """A short hash of the processor's instruction sets, from /proc/cpuinfo where there is one."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
