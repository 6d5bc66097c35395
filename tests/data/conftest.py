"""A tokenizer trained on a few sentences, and copies of it with other chat templates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_tokenizer import CHAT_TEMPLATE, train_tokenizer

TEXTS = [
    "The cat sat on the mat.\n\nThe dog, however, did not sit; it ran to the park.",
    "Summarize this dialog: Ann: Hi!\nBob: Hello Ann, how are you?\nAnn: Fine, thanks.",
    "SELECT name FROM people WHERE age > 30\n\nCREATE TABLE people (name TEXT, age INTEGER)",
    "One.\n\n\nTwo.\n\n\nThree.\n\n\nFour.",
    "I cannot help with that. Größe, naïve, 东京, 🙂.",
] * 4


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer"), vocab_size=400)


@pytest.fixture(scope="session")
def make_tokenizer(tokenizer_folder: Path) -> Callable[..., Any]:
    """Loads the tokenizer afresh, with a given template."""
    from transformers import AutoTokenizer

    def make(template: str | None = CHAT_TEMPLATE) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    return make_tokenizer()
