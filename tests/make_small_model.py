"""Writes a small OLMoE folder with random weights, as transformers does, and a tokenizer trained on data
files.

    python -m tests.make_small_model FOLDER FILE [FILE ...]

For trying every command on real files without downloading a checkpoint. Needs torch (`make parity` installs
it).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from tests.tiny_tokenizer import EOS, PAD, conversation_texts, train_tokenizer

VOCABULARY = 8192


def main() -> None:
    """Trains the tokenizer, then writes the model beside it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", nargs="+")
    arguments = parser.parse_args()
    train_tokenizer(conversation_texts(arguments.files), arguments.folder, vocab_size=VOCABULARY)
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
        eos_token_id=_id_of(arguments.folder, EOS),
        pad_token_id=_id_of(arguments.folder, PAD),
    )
    OlmoeForCausalLM(config).save_pretrained(arguments.folder)


def _id_of(folder: Path, token: str) -> int:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(token)


if __name__ == "__main__":
    main()
