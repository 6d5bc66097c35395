"""YAML files and flags -> a configuration dataclass, with errors that name file, line and field.

jsonargparse does the merging and the types. It reports a wrong file without line numbers, so every file is
first walked here, node by node, beside the dataclass that it fills.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser

from safemoe_jax.errors import InputError

Config = TypeVar("Config")

PLAIN_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"} | {
    type(None): "null"
}


def parse(
    config_class: type[Config], arguments: Sequence[str], *, program: str
) -> tuple[Config, argparse.Namespace]:
    """Fills the dataclass from `--config` files and flags; flags win over files, later files over earlier.

    Args:
        config_class: dataclass whose docstring documents its fields.
        arguments: the command line after the command's name.
        program: name shown in the usage line.

    Returns:
        The configuration, and the flags that every command shares (`debug`, `xla_cache`).

    Raises:
        InputError: an unknown or missing field, or a value of the wrong type; names file and line, or flag.
        SystemExit: `--help` or `--print_config` was given.
    """
    shared_parser = make_shared_parser()
    shared, own = shared_parser.parse_known_args(list(arguments))
    own = _with_true(own, config_class)
    parser = make_parser(config_class, program)
    if "-h" in own or "--help" in own:
        print(
            parser.format_help() + nested_fields(config_class) + _without_usage(shared_parser.format_help())
        )
        raise SystemExit(0)
    files = _config_files(own)
    for file in files:
        check_file(Path(file), config_class)
    try:
        namespace = parser.parse_args(own)
    except argparse.ArgumentError as error:
        raise _flag_error(str(error), config_class, files) from error
    namespace.pop("config")
    return config_class(**vars(parser.instantiate(namespace))), shared


def _with_true(arguments: Sequence[str], config_class: type) -> list[str]:
    """The arguments with `true` behind every yes-or-no flag that stands alone."""
    alone = {f"--{name}" for name, hint in leaf_fields(config_class) if hint is bool}
    completed = []
    for i, argument in enumerate(arguments):
        ends = i + 1 == len(arguments) or arguments[i + 1].startswith("--")
        completed += [argument, "true"] if argument in alone and ends else [argument]
    return completed


def make_parser(config_class: type, program: str) -> ArgumentParser:
    """The parser of one command's dataclass."""
    parser = ArgumentParser(prog=program, exit_on_error=False, description=_summary(config_class))
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the fields below; flags win."
    )
    parser.add_class_arguments(config_class, None)
    # jsonargparse titles the fields with the first line of the docstring, which may end inside a sentence;
    # the whole summary stands above them.
    parser.groups[config_class.__name__].title = "fields"
    for group in parser.groups.values():
        group.title = " ".join(group.title.split())
    return parser


def make_shared_parser() -> argparse.ArgumentParser:
    """The parser of the flags that every command has; they are no part of a run's configuration."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("flags of every command")
    group.add_argument("--debug", action="store_true", help="Show the traceback of an error in the input.")
    group.add_argument(
        "--xla_cache",
        default="auto",
        metavar="FOLDER",
        help="Folder that keeps compiled programs for the next run (default: ~/.cache/safemoe_jax/xla); "
        "'off' keeps none. Also: environment variable SAFEMOE_XLA_CACHE.",
    )
    return parser


def _without_usage(text: str) -> str:
    return "\n\n" + text.split("\n\n", 1)[1]


def check_file(file: Path, config_class: type) -> None:
    """Checks every field of a YAML file against the dataclass.

    Raises:
        InputError: the file is unreadable or not YAML; a field is unknown, given twice or of the wrong type.
    """
    _check_node(_compose(file), config_class, file, "")


def _compose(file: Path) -> yaml.Node:
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(
            f"the configuration file cannot be read: {reason}", where=str(file), expected="a YAML file"
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}, line {mark.line + 1}" if mark else str(file)
        raise InputError(f"not valid YAML: {error.problem}", where=where, expected="YAML syntax") from error
    if node is None:
        raise InputError(
            "the configuration file is empty", where=str(file), expected="lines such as `name: value`"
        )
    return node


def _check_node(node: yaml.Node, hint: Any, file: Path, field: str) -> None:
    """Descends into mappings and lists; everything else is one value for jsonargparse to judge."""
    declared, hint = hint, hint if _is_null(node) else _without_none(hint)
    where = f"{file}, line {node.start_mark.line + 1}" + (f", field {field}" if field else "")
    if dataclasses.is_dataclass(hint):
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"wrong value {_shown(node)}", where=where, expected=describe(declared))
        _check_mapping(node, hint, file, field)
    elif _item_type(hint) is not None and isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _check_node(item, _item_type(hint), file, f"{field}[{i}]")
    elif not _accepts(declared, node):
        raise InputError(f"wrong value {_shown(node)}", where=where, expected=describe(declared))


def _check_mapping(node: yaml.MappingNode, config_class: type, file: Path, parent: str) -> None:
    hints = typing.get_type_hints(config_class)
    known = [f.name for f in dataclasses.fields(config_class) if f.init]
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        field = f"{parent}.{key}" if parent else key
        where = f"{file}, line {line}, field {field}"
        if key not in known:
            raise InputError(f"unknown field '{field}'", where=where, expected=suggest(key, known))
        if key in seen:
            raise InputError(
                f"field '{field}' is given twice", where=where, expected=f"only line {seen[key]}"
            )
        seen[key] = line
        _check_node(value_node, hints[key], file, field)


def _accepts(hint: Any, node: yaml.Node) -> bool:
    """Whether jsonargparse takes this value for a field of this type."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    key = yaml.ScalarNode("tag:yaml.org,2002:str", "value")
    document = yaml.MappingNode("tag:yaml.org,2002:map", [(key, node)])
    try:
        parser.parse_string(yaml.serialize(document))
    except argparse.ArgumentError:
        return False
    return True


def _flag_error(message: str, config_class: type, files: Sequence[str]) -> InputError:
    """Turns jsonargparse's message about a flag into ours."""
    flags = [f"--{name}" for name, _ in leaf_fields(config_class)]
    if match := re.search(r"unrecognized arguments: (\S+)", message):
        flag = match[1].split("=")[0]
        return InputError(f"unknown flag '{flag}'", where="the command line", expected=suggest(flag, flags))
    if match := re.search(r"arguments are required: (.*)", message):
        missing = [name.strip() for name in match[1].split(",")]
        flags_needed = " ".join(f"--{name} ..." for name in missing)
        return InputError(
            f"required but not given: {', '.join(missing)}",
            where=" and ".join(["the command line", *files]),
            expected=f"{flags_needed} (or in a --config file)",
        )
    if match := re.search(r'[Pp]arser key "([\w.]+)"(.*)', message, re.DOTALL):
        field, detail = match[1], " ".join(match[2].strip(" :\n").split())
        # A field inside an optional dataclass is reported as a part of the whole.
        if nested := re.search(r"NestedArg\(key='([\w.]+)', val=(.*?)\)", detail):
            field, detail = f"{field}.{nested[1]}", nested[2]
        hint = field_type(config_class, field)
        expected = (
            describe(hint)
            if hint is not None
            else suggest(field, [name for name, _ in leaf_fields(config_class)])
        )
        return InputError(f"wrong value: {detail}", where=f"the command line, --{field}", expected=expected)
    return InputError(message, where="the command line", expected="see --help")


def suggest(name: str, known: Sequence[str]) -> str:
    """'Did you mean', or the list of what exists."""
    close = difflib.get_close_matches(name, known, n=1)
    return (f"'{close[0]}'? " if close else "") + f"one of: {', '.join(known)}"


def leaf_fields(config_class: type, prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted names and types of all fields, nested dataclasses (optional ones too) taken apart."""
    leaves: list[tuple[str, Any]] = []
    for name, hint in _fields(config_class):
        inner = _without_none(hint)
        if dataclasses.is_dataclass(inner):
            leaves += leaf_fields(inner, f"{prefix}{name}.")
        else:
            leaves.append((prefix + name, hint))
    return leaves


def field_type(config_class: type, dotted: str) -> Any:
    """Type of a field by its dotted name, or None where there is no such field."""
    hint: Any = config_class
    for part in dotted.split("."):
        hint = _without_none(hint)
        hint = _item_type(hint) if _item_type(hint) is not None else hint
        if not dataclasses.is_dataclass(hint):
            return None
        hint = dict(_fields(hint)).get(part)
    return hint


def describe(hint: Any) -> str:
    """A type in plain words, for an error message."""
    if hint in PLAIN_WORDS:
        return PLAIN_WORDS[hint]
    if dataclasses.is_dataclass(hint):
        return f"a mapping with the fields {', '.join(name for name, _ in _fields(hint))}"
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(describe(arm) for arm in typing.get_args(hint))
    if _item_type(hint) is not None:
        return f"a list, each item {describe(_item_type(hint))}"
    return getattr(hint, "__name__", str(hint))


def field_texts(config_class: type) -> list[tuple[str, str]]:
    """Dotted names of all fields, nested ones and those of list items too, and their texts."""
    import docstring_parser

    documented = {
        p.arg_name: p.description or "" for p in docstring_parser.parse(config_class.__doc__ or "").params
    }
    texts: list[tuple[str, str]] = []
    for name, hint in _fields(config_class):
        inner = _without_none(hint)
        inner = inner if _item_type(inner) is None else _item_type(inner)
        texts.append((name, " ".join(documented.get(name, "").split())))
        if dataclasses.is_dataclass(inner):
            texts += [(f"{name}.{field}", text) for field, text in field_texts(inner)]
    return texts


def _fields(config_class: Any) -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(config_class)
    return [(f.name, hints[f.name]) for f in dataclasses.fields(config_class) if f.init]


def _without_none(hint: Any) -> Any:
    """`X | None` -> X; any other type unchanged."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        arms = [arm for arm in typing.get_args(hint) if arm is not type(None)]
        if len(arms) == 1:
            return arms[0]
    return hint


def _item_type(hint: Any) -> Any:
    """Item type of list[X] and tuple[X, ...]; None for every other type."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is list and arguments:
        return arguments[0]
    if typing.get_origin(hint) is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return arguments[0]
    return None


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _shown(node: yaml.Node) -> str:
    kinds = {yaml.SequenceNode: "(a list)", yaml.MappingNode: "(a mapping)"}
    return kinds.get(type(node)) or repr(node.value)


def _summary(config_class: type) -> str:
    return (config_class.__doc__ or "").strip().split("\n\n")[0]


def nested_fields(config_class: type) -> str:
    """Help on the fields that jsonargparse hides: those of list items and of optional dataclasses."""
    paragraphs = []
    for name, hint in _fields(config_class):
        item = _item_type(_without_none(hint))
        inner = item if item is not None else _without_none(hint)
        if not dataclasses.is_dataclass(inner) or (item is None and inner is hint):
            continue
        texts = dict(field_texts(inner))
        title = f"each item of --{name}" if item is not None else f"--{name}"
        lines = [f"  {field}: {texts[field]} ({describe(kind)})" for field, kind in _fields(inner)]
        paragraphs.append("\n".join([f"\nFields of {title}:", *lines]))
    return "\n".join(paragraphs)


def _config_files(arguments: Sequence[str]) -> list[str]:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", action="append", default=[])
    return finder.parse_known_args(list(arguments))[0].config
