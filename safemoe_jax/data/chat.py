"""Conversations -> tokens and the mask of the tokens to be learned, by the tokenizer's own chat template.

The mask covers the assistant's tokens and the end-of-sequence token that closes them, nothing else: the loss
of the published setting (SafeMoE, arXiv 2509.22745: prompt masked, EOS included).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from safemoe_jax.data.formats import Sample
from safemoe_jax.errors import InputError

Message = Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Encoded:
    """One sample as the model sees it.

    Attributes:
        tokens: int32 [n].
        loss_mask: bool [n]; true on tokens that are to be predicted (answer and EOS), false on the prompt.
        truncated: whether tokens were cut off at `max_length`.
        untrained_turns: earlier assistant turns that carry no loss, because the template writes a turn
            differently once another follows (it drops the reasoning, say), so that its tokens cannot be told.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    truncated: bool = False
    untrained_turns: int = 0


def load_tokenizer(path: str) -> Any:
    """Loads a tokenizer from a folder or hub id.

    Raises:
        InputError: none there, or unreadable.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (
        Exception
    ) as error:  # the library raises OSError, ValueError, KeyError or its Rust part's bare Exception
        raise InputError(
            f"cannot load a tokenizer: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            where=str(path),
            expected="tokenizer.json and tokenizer_config.json with a chat template",
        ) from error


def check_tokenizer(tokenizer: Any) -> None:
    """Checks that a tokenizer can write conversations.

    Raises:
        InputError: no chat template, or no end-of-sequence token.
    """
    where = f"tokenizer {tokenizer.name_or_path}".strip()
    if not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat template",
            where=where,
            expected="chat_template in tokenizer_config.json, or a file chat_template.jinja",
        )
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no EOS token", where=where, expected="eos_token in tokenizer_config.json"
        )


def prompt_messages(sample: Sample) -> list[Message]:
    """The messages before the answer."""
    if sample.messages:
        return list(sample.messages[:-1] if sample.answer is not None else sample.messages)
    system = [] if sample.system is None else [{"role": "system", "content": sample.system}]
    return [*system, {"role": "user", "content": sample.user}]


def render(tokenizer: Any, messages: Sequence[Message], *, generation_prompt: bool, where: str = "") -> str:
    """Writes messages by the chat template.

    A template that refuses a system message (Mixtral's, Gemma's) gets it in front of the first user message.

    Raises:
        InputError: the template refuses the conversation, or fails.
    """
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=generation_prompt, tokenize=False
        )
    except Exception as error:  # a template is a program, which may raise what it likes
        roles = [message["role"] for message in messages[:2]]
        if isinstance(error, jinja2.TemplateError) and roles == ["system", "user"]:
            merged = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            return render(
                tokenizer, [merged, *messages[2:]], generation_prompt=generation_prompt, where=where
            )
        raise _template_error(tokenizer, error, where) from error


def _template_error(tokenizer: Any, error: Exception, where: str) -> InputError:
    """A template's own `raise_exception` is about the conversation, every other error about the template."""
    import jinja2

    if type(error) is jinja2.TemplateError:
        return InputError(
            f"the chat template refuses the conversation: {error}",
            where=where,
            expected="roles that the template knows",
        )
    return InputError(
        f"the chat template fails: {type(error).__name__}: {error}",
        where=f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}, on {where or 'a prompt'}",
        expected="a template that can write the conversation",
    )


def encode_prompts(tokenizer: Any, samples: Sequence[Sample]) -> list[np.ndarray]:
    """Tokens of each prompt with the generation prompt appended: what generation and the drift metric start
    from.

    Returns:
        int32 [n] a sample, never truncated.

    Raises:
        InputError: no chat template; a conversation that it refuses.
    """
    check_tokenizer(tokenizer)
    texts = [render(tokenizer, prompt_messages(s), generation_prompt=True, where=s.place) for s in samples]
    return [np.asarray(tokens, np.int32) for tokens in _tokenise(tokenizer, texts)]


def encode_prompt(tokenizer: Any, sample: Sample) -> np.ndarray:
    """`encode_prompts` for one sample."""
    return encode_prompts(tokenizer, [sample])[0]


def encode_samples(tokenizer: Any, samples: Sequence[Sample], max_length: int) -> list[Encoded]:
    """Encodes conversations with their answers, many at once.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        samples: samples with an answer.
        max_length: tokens a sample may have; the rest is cut off at the end.

    Returns:
        One `Encoded` a sample. A sample whose prompt alone fills `max_length` has an all-false mask.

    Raises:
        InputError: no chat template; a sample without an answer; a template whose prompt does not begin its
            conversation; no sample keeps any token of its answer.
    """
    check_tokenizer(tokenizer)
    for sample in samples:
        if sample.answer is None:
            raise InputError(
                "a sample has no answer to learn", where=sample.place, expected="a sample with an answer"
            )
    prompts = [prompt_messages(s) for s in samples]
    fulls = [[*p, {"role": "assistant", "content": s.answer}] for p, s in zip(prompts, samples, strict=True)]
    places = [s.place for s in samples]
    prompt_texts = [
        render(tokenizer, m, generation_prompt=True, where=w) for m, w in zip(prompts, places, strict=True)
    ]
    full_texts = [
        render(tokenizer, m, generation_prompt=False, where=w) for m, w in zip(fulls, places, strict=True)
    ]
    prompt_ids, full_ids = _tokenise(tokenizer, prompt_texts), _tokenise(tokenizer, full_texts)
    encoded = [
        _encode(tokenizer, messages, *texts, *ids, max_length, place)
        for messages, texts, ids, place in zip(
            fulls,
            zip(prompt_texts, full_texts, strict=True),
            zip(prompt_ids, full_ids, strict=True),
            places,
            strict=True,
        )
    ]
    if encoded and not any(e.loss_mask.any() for e in encoded):
        raise InputError(
            f"all {len(encoded)} answers are truncated away at max_length {max_length}",
            where=f"{samples[0].source}, max_length",
            expected=f"max_length above {min(len(p) for p in prompt_ids)}, the length of the shortest prompt",
        )
    return encoded


def encode_sample(tokenizer: Any, sample: Sample, max_length: int) -> Encoded:
    """`encode_samples` for one sample; raises where nothing of its answer is left."""
    return encode_samples(tokenizer, [sample], max_length)[0]


def _tokenise(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # The template has written every special token already, BOS included.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _encode(
    tokenizer: Any,
    messages: list[Message],
    prompt_text: str,
    full_text: str,
    prompt_ids: list[int],
    full_ids: list[int],
    max_length: int,
    place: str,
) -> Encoded:
    """Checks that the prompt begins the conversation, closes it with EOS, and marks what is learned."""
    tokens = _joined(tokenizer, prompt_text, full_text, prompt_ids, full_ids, place)
    tokens = _end_with_eos(tokenizer, tokens, len(prompt_ids))
    mask = np.zeros(len(tokens), bool)
    mask[len(prompt_ids) :] = True
    turns = _earlier_turns(tokenizer, messages, tokens, place)
    for turn in turns:
        if turn is not None:
            mask[turn] = True
    return Encoded(
        np.asarray(tokens[:max_length], np.int32),
        mask[:max_length],
        len(tokens) > max_length,
        turns.count(None),
    )


def _joined(
    tokenizer: Any, prompt_text: str, full_text: str, prompt_ids: list[int], full_ids: list[int], place: str
) -> list[int]:
    """The conversation's tokens, beginning with exactly the prompt's: what generation will start from."""
    if full_ids[: len(prompt_ids)] == prompt_ids:
        return full_ids
    if full_text.startswith(prompt_text):
        # The prompt's last characters merge with the answer's first into one token (a line break before a
        # line break). Encoded apart they give the same text, unless the tokenizer puts a blank before every
        # text.
        apart = prompt_ids + _tokenise(tokenizer, [full_text[len(prompt_text) :]])[0]
        if tokenizer.decode(apart) == tokenizer.decode(full_ids):
            return apart
    raise InputError(
        "the chat template's prompt does not begin its conversation, so the answer cannot be told apart",
        where=place,
        expected="a template whose text with add_generation_prompt=True continues with the answer",
    )


def _end_with_eos(tokenizer: Any, tokens: list[int], start: int) -> list[int]:
    """Ends with EOS: cuts off what the template writes behind it (a line break), or appends it."""
    eos = tokenizer.eos_token_id
    last = max((i for i in range(start, len(tokens)) if tokens[i] == eos), default=None)
    if last is not None and not tokenizer.decode(tokens[last + 1 :]).strip():
        return tokens[: last + 1]
    return [*tokens, eos]


def _earlier_turns(
    tokenizer: Any, messages: list[Message], tokens: list[int], place: str
) -> list[slice | None]:
    """Where the assistant's earlier turns stand; None for one that the template later writes differently."""
    turns: list[slice | None] = []
    for number, message in enumerate(messages[:-1]):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:number], generation_prompt=True, where=place)
        after = render(tokenizer, messages[: number + 1], generation_prompt=False, where=place)
        start_ids, end_ids = _tokenise(tokenizer, [before, after])
        end_ids = _end_with_eos(tokenizer, end_ids, len(start_ids))
        # The closing token itself may differ: some templates close only the last turn with EOS.
        same = tokens[: len(end_ids) - 1] == end_ids[:-1] and end_ids[: len(start_ids)] == start_ids
        turns.append(slice(len(start_ids), len(end_ids)) if same else None)
    return turns
