"""Named record formats: how a row of a published data set becomes a conversation.

The prompts of samsum and sql_create_context are the published ones (SafeMoE, arXiv 2509.22745, experimental
setup and public code); every other format leaves the system message to the tokenizer's chat template.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from safemoe_jax.data.files import Row
from safemoe_jax.errors import InputError

_SAMSUM_SYSTEM = "You are a helpful assistant for dialog summarization."
_SQL_SYSTEM = (
    "You are a helpful assistant for answering SQL questions. "
    "Based on the given Table, generate a SQL for the following question."
)
_SQL_QUESTION, _SQL_CONTEXT = "## Natural Language Query:", "## Context:"
_PROMPT_FIELDS = ("prompt", "forbidden_prompt", "goal", "Goal", "instruction")
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Sample:
    """One conversation of a data set.

    Attributes:
        system: the system message; None leaves it to the chat template.
        user: the user's (last) message.
        answer: the text to be learned; None for a prompt without an answer.
        source: path or hub id it was read from.
        index: the row's number in that source, from 0, before any filter.
        messages: for conversations of several turns, every message as {"role", "content"}; otherwise empty.
        extra: the raw record, for evaluation (references, labels, categories).
        place: file and line, for messages.
    """

    system: str | None = None
    user: str = ""
    answer: str | None = None
    source: str = ""
    index: int = 0
    messages: tuple[Mapping[str, str], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""


class Parts(NamedTuple):
    """What a format extracts from a row."""

    system: str | None
    user: str
    answer: str | None
    messages: tuple[Mapping[str, str], ...] = ()


def to_sample(row: Row, format_name: str, source: str) -> Sample:
    """Converts a row by a named format.

    Raises:
        InputError: a field is missing, empty or not text.
    """
    extra = row.value if isinstance(row.value, dict) else {"prompt": row.value}
    parts = FORMATS[format_name](row)
    return Sample(
        system=parts.system, user=parts.user, answer=parts.answer, messages=parts.messages,
        source=source, index=row.index, extra=extra, place=row.place,
    )  # fmt: skip


def detect_format(row: Row) -> str:
    """Names the format that the fields of a record fit.

    Raises:
        InputError: none fits; the message lists the fields found and the formats known.
    """
    if isinstance(row.value, str):
        return "prompts"
    fields = set(row.value)
    if {"instruction", "input", "output"} <= fields and _SQL_CONTEXT in str(row.value["input"]):
        return "sql_create_context"
    for names, format_name in _DETECTION:
        if set(names) <= fields:
            return format_name
    raise InputError(
        f"no format fits the fields {', '.join(map(str, row.value))}",
        where=row.place,
        expected=f"the fields of one of the formats {', '.join(FORMATS)}; or name the format",
    )


def _text(row: Row, name: str) -> str:
    """A field that must hold text."""
    if not isinstance(row.value, dict):
        raise InputError(
            "a record is a bare string", where=row.place, expected=f"an object with the field '{name}'"
        )
    value = row.value.get(name)
    if isinstance(value, str) and value.strip():
        return value
    missing = name not in row.value
    found = "missing" if missing else "not text" if value and not isinstance(value, str) else "empty"
    hint = f'; where: "{name} != {"null" if value is None else repr(value)}" leaves such records out'
    raise InputError(
        f"a sample's field is {found}",
        where=f"{row.place}, field '{name}'",
        expected=f"text{hint if found == 'empty' else ''}",
    )


def _has(row: Row, name: str) -> bool:
    return isinstance(row.value, dict) and row.value.get(name) not in (None, "")


def _samsum(row: Row) -> Parts:
    return Parts(_SAMSUM_SYSTEM, f"Summarize this dialog: {_text(row, 'dialogue')}", _text(row, "summary"))


def _sql_create_context(row: Row) -> Parts:
    """Fields question, context, answer; or instruction, input, output with both headings inside `input`."""
    if isinstance(row.value, dict) and "question" not in row.value and "input" in row.value:
        question, context = _split_sql_input(row)
        answer = _text(row, "output")
    else:
        question, context, answer = (_text(row, name) for name in ("question", "context", "answer"))
    return Parts(_SQL_SYSTEM, f"Question: {question}\nTable: {context}", answer)


def _split_sql_input(row: Row) -> tuple[str, str]:
    before, found, context = _text(row, "input").partition(_SQL_CONTEXT)
    question = before.replace(_SQL_QUESTION, "", 1).strip()
    if not (found and question and context.strip()):
        raise InputError(
            "the input does not hold a question and its table",
            where=f"{row.place}, field 'input'",
            expected=f"'{_SQL_QUESTION}', the question, '{_SQL_CONTEXT}', the table",
        )
    return question, context.strip()


def _beavertails(row: Row) -> Parts:
    return Parts(None, _text(row, "prompt"), _text(row, "response"))


def _instruction(row: Row) -> str:
    if isinstance(row.value, str):
        return _prompts(row).user
    instruction = _text(row, "instruction")
    return f"{instruction}\n\n{_text(row, 'input')}" if _has(row, "input") else instruction


def _safeinstr(row: Row) -> Parts:
    """Instruction with its safe answer, or instructions alone (strings, or no `output`): prompts for D_h."""
    answer = _text(row, "output") if isinstance(row.value, dict) and "output" in row.value else None
    return Parts(None, _instruction(row), answer)


def _alpaca(row: Row) -> Parts:
    output = _text(row, "output")  # first: a bare string is then refused with the field that it lacks
    return Parts(None, _instruction(row), output)


def _jailbreakbench(row: Row) -> Parts:
    """Goals only. `Target` is the opening of a compliant answer, not an answer."""
    return Parts(None, _text(row, "Goal"), None)


def _prompts(row: Row) -> Parts:
    if isinstance(row.value, str):
        if not row.value.strip():
            raise InputError("a prompt is empty", where=row.place, expected="text")
        return Parts(None, row.value, None)
    name = next((name for name in _PROMPT_FIELDS if name in row.value), "prompt")
    return Parts(None, _text(row, name), None)


def _chat(row: Row) -> Parts:
    """`messages` of role and content, or `conversations` of from and value (human and gpt are roles too)."""
    messages = tuple(_messages(row))
    body = [message for message in messages if message["role"] != "system"]
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    answer = body[-1]["content"] if body and body[-1]["role"] == "assistant" else None
    asked = body[:-1] if answer is not None else body
    if len(messages) - len(body) > (system is not None) or not asked or asked[-1]["role"] != "user":
        raise InputError(
            "the conversation's roles are out of order",
            where=row.place,
            expected="an optional system message first, then user and assistant in turn",
        )
    return Parts(system, asked[-1]["content"], answer, messages)


def _messages(row: Row) -> list[dict[str, str]]:
    name = "conversations" if isinstance(row.value, dict) and "messages" not in row.value else "messages"
    found = row.value.get(name) if isinstance(row.value, dict) else None
    if not isinstance(found, list) or not found:
        raise InputError(
            "no messages", where=f"{row.place}, field 'messages'", expected="a list of role and content"
        )
    messages = []
    for number, message in enumerate(found, start=1):
        place = f"{row.place}, field '{name}', message {number}"
        if not isinstance(message, dict):
            raise InputError("a message is not an object", where=place, expected="role and content")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        known = isinstance(role, str) and role in _ROLES
        if not known or not isinstance(content, str) or not content.strip():
            raise InputError(
                "a message lacks its role or its text",
                where=place,
                expected="role (system, user, assistant), content",
            )
        messages.append({"role": _ROLES[role], "content": content})
    return messages


FORMATS: dict[str, Callable[[Row], Parts]] = {
    "samsum": _samsum,
    "sql_create_context": _sql_create_context,
    "beavertails": _beavertails,
    "safeinstr": _safeinstr,
    "jailbreakbench": _jailbreakbench,
    "alpaca": _alpaca,
    "chat": _chat,
    "prompts": _prompts,
}

_DETECTION: tuple[tuple[tuple[str, ...], str], ...] = (
    (("messages",), "chat"),
    (("conversations",), "chat"),
    (("dialogue", "summary"), "samsum"),
    (("question", "context", "answer"), "sql_create_context"),
    (("prompt", "response"), "beavertails"),
    (("Goal",), "jailbreakbench"),
    (("instruction", "output"), "alpaca"),
    (("instruction",), "safeinstr"),
    (("forbidden_prompt",), "prompts"),
    (("prompt",), "prompts"),
    (("goal",), "prompts"),
)
