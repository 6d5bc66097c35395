"""Every way a parameter may lie on disk, read and written, against arrays made here by hand."""

from __future__ import annotations

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from safemoe_jax.checkpoints.reading import Loader, stored_dtype, target_dtype
from safemoe_jax.checkpoints.safetensors_files import list_tensors
from safemoe_jax.errors import InputError
from safemoe_jax.families.common_rows import (
    LAYER,
    correction_bias_row,
    fused_expert_rows,
    interleaved_expert_rows,
    linear,
)
from safemoe_jax.families.tensor_table import TensorTable, by_tensor, left_out, published, resolve
from safemoe_jax.models import ModelConfig
from safemoe_jax.models.params import ParamSpec

E, D, F = 3, 64, 32
CONFIG = ModelConfig(
    family="gpt_oss", vocab_size=8, d_model=D, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=4, norm_eps=0.1,
    n_experts=E, top_k=1, expert_dim=F,
)  # fmt: skip
RNG = np.random.default_rng(0)
STEM = "segments.0.0.moe.experts"
EXPERTS = {
    f"{STEM}.gate": ParamSpec((2, E, D, F), (None,) * 4),
    f"{STEM}.up": ParamSpec((2, E, D, F), (None,) * 4),
    f"{STEM}.down": ParamSpec((2, E, F, D), (None,) * 4),
}


def random(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def read(folder, table, specs, arrays, config=CONFIG, dtype=None):
    """The parameters that a file with these arrays gives."""
    save_file(arrays, folder / "x.safetensors")
    entries = {table.plain_name(n): e for n, e in list_tensors(folder / "x.safetensors").items()}
    plan = resolve(config, table, specs, {n: e.shape for n, e in entries.items()}, "here")
    with Loader(entries) as loader:
        return {
            name: np.asarray(
                loader.load(specs[name], places, target_dtype(stored_dtype(entries, places[0]), dtype), None)
            )
            for name, places in plan.items()
        }


def test_interleaved_gate_and_up_with_biases(tmp_path):
    table = TensorTable(interleaved_expert_rows())
    specs = EXPERTS | {
        f"{STEM}.gate_bias": ParamSpec((2, E, F), (None,) * 3),
        f"{STEM}.up_bias": ParamSpec((2, E, F), (None,) * 3),
        f"{STEM}.down_bias": ParamSpec((2, E, D), (None,) * 3),
    }
    arrays = {}
    for i in range(2):
        stem = f"model.layers.{i}.mlp.experts"
        arrays |= {f"{stem}.gate_up_proj": random(E, D, 2 * F), f"{stem}.down_proj": random(E, F, D)}
        arrays |= {f"{stem}.gate_up_proj_bias": random(E, 2 * F), f"{stem}.down_proj_bias": random(E, D)}
    got = read(tmp_path, table, specs, arrays)
    for i in range(2):
        stem = f"model.layers.{i}.mlp.experts"
        for part, name in enumerate(("gate", "up")):
            np.testing.assert_array_equal(
                got[f"{STEM}.{name}"][i], arrays[f"{stem}.gate_up_proj"][..., part::2]
            )
            np.testing.assert_array_equal(
                got[f"{STEM}.{name}_bias"][i], arrays[f"{stem}.gate_up_proj_bias"][..., part::2]
            )
        np.testing.assert_array_equal(got[f"{STEM}.down"][i], arrays[f"{stem}.down_proj"])
        np.testing.assert_array_equal(got[f"{STEM}.down_bias"][i], arrays[f"{stem}.down_proj_bias"])


@pytest.mark.parametrize("transpose", [True, False])
def test_two_fused_tensors_with_a_prefix(tmp_path, transpose):
    """Llama 4's layout [E, D, 2F] within a larger model, and granite's transposed one."""
    names = (f"{LAYER}.gate_up",), (f"{LAYER}.down",)
    table = TensorTable(
        fused_expert_rows(*names, transpose=transpose), prefixes=("outer.",), left_out=(r"vision\..*",)
    )
    gate_up = [random(E, 2 * F, D) if transpose else random(E, D, 2 * F) for _ in range(2)]
    down = [random(E, D, F) if transpose else random(E, F, D) for _ in range(2)]
    arrays = {f"outer.model.layers.{i}.gate_up": a for i, a in enumerate(gate_up)}
    arrays |= {f"outer.model.layers.{i}.down": a for i, a in enumerate(down)}
    arrays |= {"vision.a": random(2), "vision.b": random(3)}
    got = read(tmp_path, table, EXPERTS, arrays)
    for i in range(2):
        whole = gate_up[i].swapaxes(1, 2) if transpose else gate_up[i]
        np.testing.assert_array_equal(got[f"{STEM}.gate"][i], whole[..., :F])
        np.testing.assert_array_equal(got[f"{STEM}.up"][i], whole[..., F:])
        np.testing.assert_array_equal(
            got[f"{STEM}.down"][i], down[i].swapaxes(1, 2) if transpose else down[i]
        )
    assert left_out(CONFIG, table, [table.plain_name(name) for name in arrays]) == {"vision": 2}


def dequantise(blocks, scales):
    """MXFP4 written out number by number: sign, exponent and mantissa bits of each half byte."""

    def value(code):
        sign, exponent, mantissa = -1.0 if code & 8 else 1.0, (code >> 1) & 3, code & 1
        return sign * (mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))

    out = np.empty((*blocks.shape[:-1], 32), np.float32)
    for place in np.ndindex(blocks.shape):
        byte = int(blocks[place])
        scale = 2.0 ** (int(scales[place[:-1]]) - 127)
        out[(*place[:-1], 2 * place[-1])] = value(byte & 15) * scale
        out[(*place[:-1], 2 * place[-1] + 1)] = value(byte >> 4) * scale
    return out.reshape(*blocks.shape[:-2], -1)


def packed(*shape):
    blocks = RNG.integers(0, 256, (*shape[:-1], shape[-1] // 32, 16), np.uint8)
    return blocks, RNG.integers(120, 134, blocks.shape[:-1], np.uint8)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_packed_four_bit_experts(tmp_path, dtype):
    config = ModelConfig(**{**CONFIG.__dict__, "n_layers": 1, "layers": ()})
    specs = {name: ParamSpec((1, *spec.shape[1:]), spec.axes) for name, spec in EXPERTS.items()}
    stem, arrays = "model.layers.0.mlp.experts", {}
    for name, shape in (("gate_up_proj", (E, 2 * F, D)), ("down_proj", (E, D, F))):
        arrays[f"{stem}.{name}_blocks"], arrays[f"{stem}.{name}_scales"] = packed(*shape)
    table = TensorTable(interleaved_expert_rows())
    got = read(tmp_path, table, specs, arrays, config, dtype)
    wants = {}
    for name in ("gate_up_proj", "down_proj"):
        blocks, scales = arrays[f"{stem}.{name}_blocks"], arrays[f"{stem}.{name}_scales"]
        wants[name] = dequantise(blocks, scales).swapaxes(1, 2)
    want = {
        "gate": wants["gate_up_proj"][..., ::2],
        "up": wants["gate_up_proj"][..., 1::2],
        "down": wants["down_proj"],
    }
    for name, array in want.items():
        assert got[f"{STEM}.{name}"].dtype == (dtype or ml_dtypes.bfloat16)
        # Two bits of mantissa and a power of two are exact in bfloat16.
        np.testing.assert_array_equal(got[f"{STEM}.{name}"][0].astype(np.float32), array)
    arrays[f"{stem}.down_proj_scales"][1, 2, 0] = 255
    with pytest.raises(InputError, match="down_proj_scales' holds scales that are no number"):
        read(tmp_path, table, specs, arrays, config, dtype)
    del arrays[f"{stem}.down_proj_scales"]
    with pytest.raises(InputError, match="down_proj_scales' is missing"):
        read(tmp_path, table, specs, arrays, config, dtype)


def test_a_share_of_a_packed_tensor_need_not_begin_with_a_group(tmp_path):
    """Shares along the packed axis: 32 numbers share a scale, a device may hold some of them."""
    stem = "model.layers.0.mlp.experts"
    blocks, scales = packed(E, 2 * F, D)
    arrays = {f"{stem}.gate_up_proj_blocks": blocks, f"{stem}.gate_up_proj_scales": scales}
    save_file(arrays, tmp_path / "x.safetensors")
    entries = list_tensors(tmp_path / "x.safetensors")
    config = ModelConfig(**{**CONFIG.__dict__, "n_layers": 1, "layers": ()})
    spec = {f"{STEM}.up": ParamSpec((1, E, D, F), (None,) * 4)}
    shapes = {name: entry.shape for name, entry in entries.items()}
    plan = resolve(config, TensorTable(interleaved_expert_rows()), spec, shapes, "here")
    share = ((0, 1), (1, 3), (20, 50), (3, 9))
    with Loader(entries) as loader:
        (got,) = loader.read_shares(plan[f"{STEM}.up"], share, [share], np.dtype(np.float32))
    want = dequantise(blocks, scales).swapaxes(1, 2)[None, ..., 1::2]
    np.testing.assert_array_equal(got, want[:, 1:3, 20:50, 3:9])


def test_a_correction_bias_in_a_box_is_float32(tmp_path):
    row = correction_bias_row(f"{LAYER}.bias", boxed=True)
    specs = {"segments.0.0.moe.router.correction_bias": ParamSpec((2, E), (None, None))}
    arrays = {f"model.layers.{i}.bias": random(1, E) for i in range(2)}
    got = read(tmp_path, TensorTable((row,)), specs, arrays)
    want = np.stack([arrays[f"model.layers.{i}.bias"][0] for i in range(2)])
    np.testing.assert_array_equal(got["segments.0.0.moe.router.correction_bias"], want)
    assert row.float32


def test_further_layers_are_left_out_by_their_number(tmp_path):
    rows = linear("moe.router", f"{LAYER}.gate")
    table = TensorTable(rows, left_out=(r"model\.layers\.{n_layers}\..*",))
    specs = {"segments.0.0.moe.router.kernel": ParamSpec((2, D, E), (None,) * 3)}
    arrays = {f"model.layers.{i}.gate.weight": random(E, D) for i in range(3)}
    got = read(tmp_path, table, specs, arrays)
    assert len(got) == 1 and left_out(CONFIG, table, list(arrays)) == {"model.layers.2": 1}
    arrays["model.layers.3.gate.weight"] = random(E, D)
    with pytest.raises(InputError, match=r"'model\.layers\.3\.gate\.weight' maps to no parameter"):
        read(tmp_path, table, specs, arrays)


@pytest.mark.parametrize("rows", ["interleaved", "llama4", "granite"])
def test_written_tensors_hold_all_their_parts(tmp_path, rows):
    """What is written and read again is what was there, in one tensor for gate and up."""
    from safemoe_jax.checkpoints.huggingface import _disk_arrays

    names = (f"{LAYER}.gate_up",), (f"{LAYER}.down",)
    tables = {
        "interleaved": interleaved_expert_rows(),
        "llama4": fused_expert_rows(*names, transpose=False),
        "granite": fused_expert_rows(*names, transpose=True),
    }
    table = TensorTable(tables[rows])
    params = {name: jnp.asarray(random(*spec.shape)) for name, spec in EXPERTS.items()}
    tensors = by_tensor(published(CONFIG, table, EXPERTS))
    arrays = dict(zip(tensors, map(np.ascontiguousarray, _disk_arrays(tensors, params)), strict=True))
    assert len(arrays) == 4
    got = read(tmp_path, table, EXPERTS, arrays)
    for name, value in params.items():
        np.testing.assert_array_equal(got[name], value)


def test_the_quantisation_of_a_checkpoint_is_not_written(tmp_path):
    """config.json of gpt_oss as it is published names MXFP4; the numbers are then written as they are."""
    from safemoe_jax.checkpoints.huggingface import _config_fields

    raw = {"quantization_config": {"quant_method": "mxfp4"}, "rope_parameters": {}, "eos_token_id": 5}
    params = {"embed.embedding": np.zeros(1, ml_dtypes.bfloat16)}
    fields = json.loads(json.dumps(_config_fields(CONFIG, params, raw)))
    assert "quantization_config" not in fields and "rope_parameters" not in fields
    assert fields["eos_token_id"] == 5 and fields["torch_dtype"] == "bfloat16"
