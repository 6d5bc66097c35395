"""A word-level tokenizer in the Hugging Face format, with a chat template."""

import json
from pathlib import Path

from safemoe_jax.organism.vocabulary import (
    ASSISTANT,
    END,
    PAD,
    SPECIAL_TOKENS,
    SYSTEM,
    UNKNOWN,
    USER,
    vocabulary,
)

# No default system prompt. An assistant turn ends with END, which is also what stops generation.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}" + SYSTEM + "{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}" + USER + "{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}" + ASSISTANT + "{{ message['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


def write_tokenizer(folder: str | Path) -> None:
    """Write the two tokenizer files into an existing `folder`; `AutoTokenizer.from_pretrained` loads it."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

    ids = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    folder = Path(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "eos_token": END,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
