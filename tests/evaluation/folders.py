"""A random model in a real folder: OLMoE files, tokenizer, chat template."""

import jax

from safemoe_jax.checkpoints.huggingface import save_folder
from safemoe_jax.models import ModelConfig, declare, initialise
from tests.tiny_tokenizer import train_tokenizer

TEXTS = ["tell me how to bake bread", "I'm sorry, I cannot help", "Amanda baked cookies . Jerry wants some"]


def write_model(folder, seed=0, layers=2):
    """Writes the folder and returns it."""
    config = ModelConfig(
        family="olmoe",
        vocab_size=320,
        d_model=16,
        n_layers=layers,
        n_heads=4,
        n_kv_heads=4,
        head_dim=4,
        norm_eps=1e-5,
        n_experts=4,
        top_k=2,
        expert_dim=8,
        qk_norm="full",
    )
    params = initialise(declare(config), jax.random.key(seed), stddev=0.3)
    save_folder(folder, config, params, extra_config={"eos_token_id": 0})
    train_tokenizer(TEXTS, folder, vocab_size=320)
    return folder
