"""Tokens and loss masks, checked token by token against the tokenizer's own offsets and decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safemoe_jax.data.chat import (
    check_tokenizer,
    encode_prompt,
    encode_prompts,
    encode_sample,
    encode_samples,
    load_tokenizer,
)
from safemoe_jax.data.formats import Sample
from safemoe_jax.errors import InputError
from tests.tiny_tokenizer import EOS, train_tokenizer

SAMPLES = [
    Sample(user="The cat sat?", answer="I cannot help with that."),
    Sample(system="You summarize.", user="Ann: Hi!\r\nBob: naïve 东京", answer=" Fine, thanks. "),
    Sample(user="Größe 🙂", answer="SELECT name\n\nFROM people"),
    Sample(user="x", answer="\n\nstarts with line breaks"),
]

TURN = "{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
START = "{% for message in messages %}"
END = "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
# Behind every turn EOS and a line break, as ChatML templates do it.
BREAK_BEHIND_EOS = START + TURN + "{{ eos_token + '\n' }}" + END
WITHOUT_EOS = START + TURN + "{{ '\n' }}" + END
WITHOUT_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + BREAK_BEHIND_EOS
)
# The prompt ends with an opened reasoning block that the conversation does not have.
NOT_A_PREFIX = START + TURN + "{{ eos_token }}" + END.replace("<|assistant|>\n", "<|assistant|>\n<think>\n")
# The last answer gets a reasoning block, earlier ones lose it.
DROPS_REASONING = (
    START
    + "{% if message['role'] == 'assistant' and loop.last %}"
    + "{{ '<|assistant|>\n<think></think>' + message['content'] }}{% else %}"
    + TURN
    + "{% endif %}{{ eos_token + '\n' }}"
    + END
)
# Only the last turn is closed with EOS.
EOS_AT_THE_END = (
    START + TURN + "{{ eos_token if loop.last and message['role'] == 'assistant' else '<|padding|>' }}" + END
)


def learned(tokenizer: Any, sample: Sample, max_length: int = 512) -> str:
    encoded = encode_sample(tokenizer, sample, max_length)
    return tokenizer.decode(encoded.tokens[encoded.loss_mask])


@pytest.mark.parametrize("sample", SAMPLES)
def test_mask_is_where_the_tokenizer_places_the_answer(tokenizer: Any, sample: Sample) -> None:
    messages = [{"role": "system", "content": sample.system}] if sample.system else []
    messages += [{"role": "user", "content": sample.user}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    encoded = encode_sample(tokenizer, sample, 512)
    assert encoded.tokens.dtype == np.int32 and encoded.loss_mask.dtype == bool and not encoded.truncated
    assert tokenizer.decode(encoded.tokens) == prompt + sample.answer + EOS
    # Each token of the prompt in turn, and each of the answer: decoded prefixes grow along the text.
    for count in range(len(encoded.tokens) + 1):
        text = tokenizer.decode(encoded.tokens[:count])
        in_answer = len(text) > len(prompt) and text.startswith(prompt)
        assert count == 0 or bool(encoded.loss_mask[count - 1]) == in_answer
    np.testing.assert_array_equal(encoded.tokens[~encoded.loss_mask], encode_prompt(tokenizer, sample))


@pytest.mark.parametrize("sample", SAMPLES[:3])
def test_tokens_are_the_template_s_own(tokenizer: Any, sample: Sample) -> None:
    messages = [{"role": "system", "content": sample.system}] if sample.system else []
    messages += [{"role": "user", "content": sample.user}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    np.testing.assert_array_equal(encode_prompt(tokenizer, sample), ids)
    messages += [{"role": "assistant", "content": sample.answer}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    np.testing.assert_array_equal(encode_sample(tokenizer, sample, 512).tokens, ids)


def test_a_merge_over_the_border_keeps_the_prompt_s_tokens(tokenizer: Any) -> None:
    sample = SAMPLES[3]
    messages = [{"role": "user", "content": sample.user}, {"role": "assistant", "content": sample.answer}]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    prompt = encode_prompt(tokenizer, sample).tolist()
    assert whole[: len(prompt)] != prompt  # the case at hand: the line breaks do merge
    assert encode_sample(tokenizer, sample, 512).tokens[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("template", [BREAK_BEHIND_EOS, WITHOUT_EOS, WITHOUT_SYSTEM, EOS_AT_THE_END])
@pytest.mark.parametrize("sample", SAMPLES)
def test_other_templates_end_with_eos_too(
    make_tokenizer: Callable[..., Any], template: str, sample: Sample
) -> None:
    tokenizer = make_tokenizer(template)
    tail = "\n" if template == WITHOUT_EOS else ""
    assert learned(tokenizer, sample) == sample.answer + tail + EOS


def test_a_refused_system_message_goes_before_the_user_s(make_tokenizer: Callable[..., Any]) -> None:
    text = make_tokenizer().decode(encode_prompt(make_tokenizer(WITHOUT_SYSTEM), SAMPLES[1]))
    assert text.startswith("<|user|>\nYou summarize.\n\nAnn: Hi!")


TURNS = Sample(
    user="And the dog?",
    answer="It ran.",
    messages=(
        {"role": "user", "content": "The cat?"},
        {"role": "assistant", "content": "It sat."},
        {"role": "user", "content": "And the dog?"},
        {"role": "assistant", "content": "It ran."},
    ),
)


@pytest.mark.parametrize("template", [BREAK_BEHIND_EOS, EOS_AT_THE_END])
def test_every_turn_of_the_assistant_is_learned(make_tokenizer: Callable[..., Any], template: str) -> None:
    closing = EOS if template == BREAK_BEHIND_EOS else "<|padding|>"
    tokenizer = make_tokenizer(template)
    assert learned(tokenizer, TURNS) == f"It sat.{closing}It ran.{EOS}"
    assert encode_sample(tokenizer, TURNS, 512).untrained_turns == 0


def test_a_turn_that_the_template_rewrites_is_counted_and_not_learned(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(DROPS_REASONING)
    assert learned(tokenizer, TURNS) == f"<think></think>It ran.{EOS}"
    assert encode_sample(tokenizer, TURNS, 512).untrained_turns == 1


def test_many_at_once_equal_one_by_one(tokenizer: Any) -> None:
    together = encode_samples(tokenizer, SAMPLES, 40)
    for sample, encoded in zip(SAMPLES, together, strict=True):
        alone = encode_sample(tokenizer, sample, 40)
        np.testing.assert_array_equal(alone.tokens, encoded.tokens)
        np.testing.assert_array_equal(alone.loss_mask, encoded.loss_mask)
    prompts = encode_prompts(tokenizer, SAMPLES)
    assert all((p == encode_prompt(tokenizer, s)).all() for p, s in zip(prompts, SAMPLES, strict=True))


def test_truncation_cuts_the_end_and_is_noted(tokenizer: Any) -> None:
    full = encode_sample(tokenizer, SAMPLES[0], 512)
    exact = encode_sample(tokenizer, SAMPLES[0], len(full.tokens))
    cut = encode_sample(tokenizer, SAMPLES[0], len(full.tokens) - 1)
    assert not exact.truncated and cut.truncated
    np.testing.assert_array_equal(cut.tokens, full.tokens[:-1])
    np.testing.assert_array_equal(cut.loss_mask, full.loss_mask[:-1])


def test_all_answers_truncated_away(tokenizer: Any) -> None:
    length = min(len(encode_prompt(tokenizer, sample)) for sample in SAMPLES)
    with pytest.raises(InputError, match="all 4 answers are truncated away at max_length") as caught:
        encode_samples(tokenizer, SAMPLES, length)
    assert f"above {length}" in caught.value.expected
    assert any(e.loss_mask.any() for e in encode_samples(tokenizer, SAMPLES, length + 1))


def test_a_prompt_that_does_not_begin_its_conversation(make_tokenizer: Callable[..., Any]) -> None:
    sample = Sample(user="u", answer="a", place="file.json, row 3")
    with pytest.raises(InputError, match="prompt does not begin its conversation") as caught:
        encode_sample(make_tokenizer(NOT_A_PREFIX), sample, 512)
    assert caught.value.where == "file.json, row 3"


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ('{{ 1 + "a" }}', "TypeError: unsupported operand"),
        ("{{ messages[0].nothing.more }}", "UndefinedError: "),
        ("{{ 1 +", "TemplateSyntaxError: unexpected 'end of template'"),
        ("{{ messages | nothing }}", "TemplateAssertionError: No filter named 'nothing'"),
    ],
)
@pytest.mark.parametrize("sample", SAMPLES[:2])
def test_a_template_that_fails_is_blamed_itself(
    make_tokenizer: Callable[..., Any], template: str, error: str, sample: Sample
) -> None:
    with pytest.raises(InputError) as caught:
        encode_prompt(make_tokenizer(template), replace(sample, place="file.json, row 3"))
    assert caught.value.what.startswith(f"the chat template fails: {error}")
    assert caught.value.where.startswith("the chat template of ")
    assert caught.value.where.endswith("on file.json, row 3")
    assert "roles" not in caught.value.expected


def test_refusals(tokenizer: Any, make_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no answer to learn"):
        encode_samples(tokenizer, [Sample(user="u")], 512)
    tool = Sample(user="u", messages=({"role": "tool", "content": "x"}, {"role": "user", "content": "u"}))
    with pytest.raises(InputError, match="the chat template refuses the conversation: unknown role tool"):
        encode_prompt(tokenizer, tool)
    with pytest.raises(InputError, match="no chat template") as caught:
        encode_prompts(make_tokenizer(None), SAMPLES)
    assert caught.value.where.startswith("tokenizer ")
    without_eos = make_tokenizer()
    without_eos.eos_token = None
    with pytest.raises(InputError, match="no EOS token"):
        check_tokenizer(without_eos)
    (tmp_path / "tokenizer.json").write_text("{")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="cannot load a tokenizer"):
            load_tokenizer(str(folder))


def test_the_tokenizer_s_folder_loads_and_returns_every_text(tmp_path: Path) -> None:
    loaded = load_tokenizer(str(train_tokenizer(["some words, some more"], tmp_path / "t", vocab_size=300)))
    assert len(loaded) <= 300 and loaded.eos_token == EOS and loaded.pad_token_id != loaded.eos_token_id
    for text in ("some words", "\x00 \t ünïcödé 漢字 🙂\r\n", "  leading"):
        assert loaded.decode(loaded(text, add_special_tokens=False)["input_ids"]) == text
