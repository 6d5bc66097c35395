"""Tiny OLMoE folders and adapters written by transformers and PEFT, and what these compute on them.

    python -m tests.make_references          (needs torch and peft; rewrites tests/references)

`make test` compares with the committed files, `make parity` builds the same variants live. Norms and biases
are random and eps is large, so that a wrong one shows.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import save_file
from transformers import OlmoeConfig, OlmoeForCausalLM

REFERENCES = Path(__file__).resolve().parent / "references"
NEW_TOKENS = 32
LEAST_MARGIN = 2e-4

_BASE = dict(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_experts=6,
    num_experts_per_tok=2,
    rms_norm_eps=0.02,
    initializer_range=0.4,
    pad_token_id=0,
    eos_token_id=None,
    use_cache=True,
)

# name -> (fields of the config, arguments of save_pretrained)
VARIANTS: dict[str, tuple[dict, dict]] = {
    "mha": ({}, {}),
    "gqa_clip": (dict(num_key_value_heads=2, clip_qkv=0.6, norm_topk_prob=True), {}),
    "tied_bias": (
        dict(
            num_key_value_heads=1,
            tie_word_embeddings=True,
            attention_bias=True,
            rope_parameters={"rope_theta": 300.0, "rope_type": "default"},
        ),
        {},
    ),
    "fused": (dict(norm_topk_prob=True, num_experts_per_tok=3), dict(save_original_format=False)),
    "sharded": (dict(num_hidden_layers=3, clip_qkv=1.5), dict(max_shard_size="10KB")),
}

# name -> (variant of the base model, fields of PEFT's LoraConfig)
ADAPTERS: dict[str, tuple[str, dict]] = {
    "projections": (
        "gqa_clip",
        dict(r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    ),
    "router": (
        "mha",
        dict(
            r=2,
            lora_alpha=5,
            use_rslora=True,
            target_modules=["q_proj"],
            target_parameters=["mlp.gate.weight"],
        ),
    ),
    "experts": (
        "mha",
        dict(
            r=2,
            lora_alpha=4,
            target_modules=["v_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
    ),
    "down": ("mha", dict(r=3, lora_alpha=3, target_modules=[], target_parameters=["mlp.experts.down_proj"])),
    "gate_up": (
        "mha",
        dict(r=3, lora_alpha=3, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"]),
    ),
}


class Expected(NamedTuple):
    """What transformers computes on a right-padded batch; shapes as in the project."""

    tokens: np.ndarray
    attention_mask: np.ndarray
    answer_mask: np.ndarray
    logits: np.ndarray
    router_logits: np.ndarray
    experts: np.ndarray
    combine_weights: np.ndarray
    loss: np.ndarray
    greedy: np.ndarray


def build(variant: str, seed: int = 0) -> OlmoeForCausalLM:
    """The variant's model with random weights, norms and biases, eager attention and experts."""
    torch.manual_seed(seed)
    config = OlmoeConfig(**{**_BASE, **VARIANTS[variant][0]})
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = OlmoeForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.3)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    return model


def batch(seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, attention mask and answer mask of four rows of unequal length, right-padded."""
    rng = np.random.default_rng(seed)
    lengths = np.array([13, 9, 5, 1])
    mask = (np.arange(13) < lengths[:, None]).astype(np.int32)
    tokens = rng.integers(1, 48, mask.shape).astype(np.int32) * mask
    answer = mask * (np.arange(13) >= lengths[:, None] // 2)
    return tokens, mask, answer.astype(np.int32)


def compute(model: OlmoeForCausalLM, seed: int = 1) -> Expected:
    """Runs the batch.

    Raises:
        AssertionError: two experts are so close that rounding may swap them; choose another seed.
    """
    tokens, mask, answer = batch(seed)
    rows, length = tokens.shape
    routed: list[tuple[torch.Tensor, ...]] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: routed.append(output))
        for layer in model.model.layers
    ]
    ids, attention = torch.tensor(tokens, dtype=torch.long), torch.tensor(mask, dtype=torch.long)
    labels = torch.where(torch.tensor(answer, dtype=torch.bool), ids, -100)
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=attention, labels=labels)
    for hook in hooks:
        hook.remove()
    logits, weights, experts = (
        np.stack([layer[i].reshape(rows, length, -1).numpy() for layer in routed]) for i in range(3)
    )
    _check_margins(logits, experts.shape[-1], mask)
    return Expected(
        tokens=tokens,
        attention_mask=mask,
        answer_mask=answer,
        logits=out.logits.numpy(),
        router_logits=logits,
        experts=experts.astype(np.int32),
        combine_weights=weights,
        loss=np.asarray([out.loss.item()], np.float32),
        greedy=greedy(model, tokens, mask),
    )


def greedy(model: OlmoeForCausalLM, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Greedy continuations of every row by itself, int32 [B, 32]."""
    answers = []
    for row, length in zip(tokens, mask.sum(axis=1), strict=True):
        ids = torch.tensor(row[None, :length], dtype=torch.long)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        answers.append(out[0, length:].numpy())
    return np.stack(answers).astype(np.int32)


def save(variant: str, model: OlmoeForCausalLM, folder: Path) -> None:
    """Writes the folder as transformers does for this variant."""
    model.save_pretrained(folder, **VARIANTS[variant][1])


def adapt(model: OlmoeForCausalLM, adapter: str, seed: int = 2) -> PeftModel:
    """The model with the adapter, both factors random."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(**ADAPTERS[adapter][1])).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    return adapted


def run(model: torch.nn.Module, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits float32 [B, T, V]."""
    ids, attention = torch.tensor(tokens, dtype=torch.long), torch.tensor(mask, dtype=torch.long)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=attention).logits.numpy()


def _check_margins(logits: np.ndarray, top_k: int, mask: np.ndarray) -> None:
    ordered = -np.sort(-logits, axis=-1)
    margins = (ordered[..., top_k - 1] - ordered[..., top_k])[:, mask.astype(bool)]
    assert margins.min() > LEAST_MARGIN, f"top-k margin {margins.min()}"


def main() -> None:
    """Rewrites the committed files."""
    for variant in VARIANTS:
        folder = REFERENCES / variant
        shutil.rmtree(folder, ignore_errors=True)
        model = build(variant)
        save(variant, model, folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        save_file(compute(model)._asdict(), folder / "expected.safetensors")
        print(variant, sorted(path.name for path in folder.iterdir()))
    for adapter, (variant, _) in ADAPTERS.items():
        folder = REFERENCES / f"adapter_{adapter}"
        shutil.rmtree(folder, ignore_errors=True)
        adapted = adapt(build(variant), adapter)
        adapted.save_pretrained(folder)
        (folder / "README.md").unlink()
        tokens, mask, _ = batch()
        save_file({"logits": run(adapted, tokens, mask)}, folder / "expected.safetensors")
        print(adapter, sorted(path.name for path in folder.iterdir()))
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    (REFERENCES / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
