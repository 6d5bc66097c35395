"""Trains a small byte-level BPE tokenizer with a chat template and writes it as a folder that transformers
loads.

    python -m tests.tiny_tokenizer OUTPUT_FOLDER FILE [FILE ...] [--vocab-size 8192]

Learns from the conversations in data files of any format that `safemoe_jax.data` reads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

EOS, PAD = "<|endoftext|>", "<|padding|>"
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\n' if not loop.last else '' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str],
    folder: str | Path,
    *,
    vocab_size: int = 8192,
    chat_template: str | None = CHAT_TEMPLATE,
) -> Path:
    """Trains on the texts and writes tokenizer.json and tokenizer_config.json.

    Args:
        texts: what to learn the merges from.
        folder: created where missing.
        vocab_size: upper bound, the special tokens and the 256 bytes included.
        chat_template: None for a tokenizer without one.

    Returns:
        The folder.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [EOS, PAD, *(f"<|{role}|>" for role in ROLES)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD}
    config |= {"model_max_length": 4096, "clean_up_tokenization_spaces": False}
    config |= {} if chat_template is None else {"chat_template": chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return folder


def conversation_texts(paths: Iterable[str]) -> Iterable[str]:
    """The messages of data files, one after another."""
    from safemoe_jax.data import SourceConfig, read_source

    for path in paths:
        for sample in read_source(SourceConfig(path)):
            yield from (text for text in (sample.system, sample.user, sample.answer) if text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--vocab-size", type=int, default=8192)
    options = parser.parse_args()
    print(train_tokenizer(conversation_texts(options.files), options.folder, vocab_size=options.vocab_size))


if __name__ == "__main__":
    main()
