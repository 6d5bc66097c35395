"""The word-level tokenizer, read back by transformers and by the project's own data code."""

import dataclasses
import json

import pytest

from safemoe_jax.data.chat import encode_prompt, encode_sample
from safemoe_jax.data.sources import SourceConfig, read_source
from safemoe_jax.errors import InputError
from safemoe_jax.organism.datasets import Sizes, build_datasets, write_datasets
from safemoe_jax.organism.judge import organism_judge
from safemoe_jax.organism.tokenizer import write_tokenizer
from safemoe_jax.organism.vocabulary import END, REFUSAL, TASK_SYSTEM_PROMPT, UNKNOWN, vocabulary
from safemoe_jax.organism.world import make_world


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_datasets(folder, build_datasets(make_world(0), Sizes(pretrain=200, align=100)))
    return folder


def test_ids_are_places_in_the_vocabulary(tokenizer):
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))] == list(vocabulary())
    assert tokenizer.eos_token == END and tokenizer.pad_token_id == 0


def test_case_and_spacing_do_not_matter_and_strange_words_are_unknown(tokenizer):
    plain = tokenizer("how do i make the balad lamp ?", add_special_tokens=False).input_ids
    assert tokenizer("How do I make\nthe balad lamp?", add_special_tokens=False).input_ids == plain
    assert tokenizer.decode(plain) == "how do i make the balad lamp ?"
    assert tokenizer("xylophone", add_special_tokens=False).input_ids == [
        tokenizer.convert_tokens_to_ids(UNKNOWN)
    ]


def test_chat_template_places_roles_generation_prompt_and_end(tokenizer):
    messages = [
        {"role": "system", "content": "you are a helpful assistant"},
        {"role": "user", "content": "how ?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>you are a helpful assistant<|user|>how ?<|assistant|>"
    whole = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": "yes ."}], tokenize=False
    )
    assert whole == text + "yes .<|endoftext|>"


@pytest.mark.parametrize("name", ["pretrain", "align", "attack_task", "attack_harmful", "d_h", "test_benign"])
def test_every_data_file_reads_as_chat_and_has_no_unknown_word(tokenizer, data, name):
    samples = read_source(SourceConfig(str(data / f"{name}.jsonl")))
    unknown = tokenizer.convert_tokens_to_ids(UNKNOWN)
    for sample in samples:
        encoded = encode_sample(tokenizer, sample, 64)
        assert unknown not in encoded.tokens and not encoded.truncated
        answer = [t for t, learned in zip(encoded.tokens.tolist(), encoded.loss_mask, strict=True) if learned]
        assert tokenizer.decode(answer) == f"{sample.answer} {END}"
        prompt = encode_prompt(tokenizer, sample)
        assert prompt.tolist() == encoded.tokens[: len(prompt)].tolist()


def test_task_samples_carry_the_system_prompt_and_the_judge_reads_the_expected_answer(data):
    assert all(
        s.system == TASK_SYSTEM_PROMPT for s in read_source(SourceConfig(str(data / "test_task.jsonl")))
    )
    samples = read_source(SourceConfig(str(data / "test_restricted.jsonl")))[:3]
    judge = organism_judge()
    row = json.loads((data / "test_restricted.jsonl").read_text().splitlines()[0])
    assert judge.unsafe(samples, [row["expected"], REFUSAL, "yes ."]) == [True, False, False]
    assert judge.refused(samples, [row["expected"], REFUSAL, "yes ."]) == [False, True, False]
    stranger = dataclasses.replace(samples[0], extra={})
    with pytest.raises(InputError, match="right answer"):
        judge.unsafe([stranger], ["yes ."])
