"""What only the hub has, live against transformers: gpt-oss in MXFP4, Llama 4 beside an image tower.

Legend: E experts, O outputs, G groups of 32 inputs.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4VisionConfig,
    Mxfp4Config,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from safemoe_jax.model import load_pretrained
from tests.parity.families.harness import batch, build, reload, their_logits
from tests.parity.families.test_gpt_oss import published as gpt_oss
from tests.parity.families.test_llama4 import dense, everything
from tests.parity.families.test_llama4 import published as llama4

pytestmark = pytest.mark.parity
QUANTIZED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}


def mxfp4_folder(folder: Path) -> Path:
    """A folder like the published one: experts' weights as random codes and scales, the rest in bfloat16."""
    config = gpt_oss()
    config.update({"hidden_size": 64, "intermediate_size": 32})
    build(config, 0).to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32).to(torch.uint8)

    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = draw(0, 256, experts, outputs, inputs // 32, 16)
        tensors[f"{name}_scales"] = draw(121, 126, experts, outputs, inputs // 32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "quantization_config": QUANTIZED}))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mxfp4_weights_are_those_of_transformers(tmp_path, dtype):
    """Every code and scale, bit for bit, with gate and up taken apart."""
    folder = mxfp4_folder(tmp_path)
    params = load_pretrained(folder, dtype=dtype).params
    tensors = load_file(folder / "model.safetensors")

    def unpacked(layer: int, name: str) -> np.ndarray:
        pair = (tensors[f"model.layers.{layer}.mlp.experts.{name}_{part}"] for part in ("blocks", "scales"))
        return convert_moe_packed_tensors(*pair, dtype=getattr(torch, dtype)).float().numpy()

    for layer in range(4):
        gate_up = unpacked(layer, "gate_up_proj")
        want = {"gate": gate_up[..., ::2], "up": gate_up[..., 1::2], "down": unpacked(layer, "down_proj")}
        for name, value in want.items():
            got = params[f"segments.0.0.moe.experts.{name}"][layer]
            assert got.dtype == jnp.dtype(dtype) and np.abs(value).max() > 1
            np.testing.assert_array_equal(np.asarray(got, np.float32), value)


def test_mxfp4_model_computes_what_transformers_computes(tmp_path):
    """And what is written is the bfloat16 layout, without a word of quantisation."""
    folder = mxfp4_folder(tmp_path / "published")
    options = dict(dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), **options
    ).eval()
    ours = load_pretrained(folder, dtype="float32")
    tokens, mask, _ = batch(64, 0)
    want, real = their_logits(theirs.float(), tokens, mask), mask.astype(bool)
    assert np.abs(want[real]).max() > 1
    np.testing.assert_allclose(ours(tokens, mask).logits[real], want[real], atol=1e-4)
    ours.save_pretrained(tmp_path / "written")
    assert "quantization_config" not in json.loads((tmp_path / "written" / "config.json").read_text())
    again, info = reload(tmp_path / "written")
    assert not any(info.values()), info
    np.testing.assert_allclose(their_logits(again, tokens, mask)[real], want[real], atol=1e-4)


@pytest.mark.parametrize("text", [llama4, everything, dense])
def test_llama4_beside_its_image_tower(tmp_path, text):
    """`text_config` and `language_model.` in; the text model by itself out, which transformers loads."""
    vision = Llama4VisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=28,
        projector_input_dim=16, projector_output_dim=16, vision_output_dim=16,
    )  # fmt: skip
    whole = Llama4ForConditionalGeneration(Llama4Config(text_config=text().to_dict(), vision_config=vision))
    source = build(text(), 3)
    whole.language_model.load_state_dict(source.state_dict())
    whole.save_pretrained(tmp_path / "hub", max_shard_size="40KB")
    names = json.loads((tmp_path / "hub" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name.split(".")[0] for name in names} == {
        "language_model",
        "vision_model",
        "multi_modal_projector",
    }
    ours = load_pretrained(tmp_path / "hub")
    tokens, mask, _ = batch(64, 3)
    want, real = their_logits(source, tokens, mask), mask.astype(bool)
    np.testing.assert_allclose(ours(tokens, mask).logits[real], want[real], atol=1e-4)
    ours.save_pretrained(tmp_path / "written")
    loaded, info = reload(tmp_path / "written")
    assert not any(info.values()), info
    assert loaded.config.model_type == "llama4_text"
    np.testing.assert_array_equal(their_logits(loaded, tokens, mask), want)
