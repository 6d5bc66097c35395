"""FP8 weights with a scale for each 128 x 128, as DeepSeek-V3 is published, against NumPy."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from safemoe_jax.checkpoints.huggingface import load_params, read_config
from safemoe_jax.checkpoints.reading import Loader
from safemoe_jax.checkpoints.safetensors_files import list_tensors, write_arrays
from safemoe_jax.errors import InputError
from safemoe_jax.families import family_of
from safemoe_jax.families.tensor_table import published, resolve
from safemoe_jax.models import declare

FP8 = ml_dtypes.float8_e4m3fn
CONFIG = {
    "model_type": "deepseek_v3", "vocab_size": 64, "hidden_size": 160, "intermediate_size": 192,
    "moe_intermediate_size": 136, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 144, "kv_lora_rank": 32, "qk_nope_head_dim": 40,
    "qk_rope_head_dim": 8, "v_head_dim": 40, "rms_norm_eps": 1e-6, "routed_scaling_factor": 2.5,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]
    },
}  # fmt: skip
UP = "model.layers.1.mlp.experts.2.up_proj.weight"


def dequantised(weight, scales):
    """Square by square."""
    out = weight.astype(np.float32)
    for i, j in np.ndindex(scales.shape):
        out[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scales[i, j]
    return out


def disk_tensors():
    """Every tensor of the published layout: projections in FP8 with scales, the rest in bfloat16."""
    config = family_of("deepseek_v3").read_config(CONFIG)
    rng, arrays = np.random.default_rng(0), {}
    for places in published(config, family_of("deepseek_v3").table, declare(config)).values():
        for piece in places:
            values = rng.standard_normal(piece.shape, np.float32)
            if "_proj" in piece.name:
                arrays[piece.name] = values.astype(FP8)
                shape = [-(-n // 128) for n in piece.shape]
                arrays[f"{piece.name}_scale_inv"] = rng.uniform(0.5, 2.0, shape).astype(np.float32)
            else:
                arrays[piece.name] = values.astype(ml_dtypes.bfloat16)
    return arrays


def write_folder(folder, arrays):
    folder.mkdir()
    write_arrays(folder / "model.safetensors", arrays, {})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def load(folder, dtype=None):
    return load_params(folder, read_config(folder)[0], dtype=dtype)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_weights_are_their_numbers_times_the_scale_of_their_square(tmp_path, dtype):
    arrays = disk_tensors()
    folder = write_folder(tmp_path / "model", arrays)
    config = read_config(folder)[0]
    params = load(folder, dtype)
    places = published(config, family_of("deepseek_v3").table, declare(config))
    scaled = 0
    for name, pieces in places.items():
        for piece in pieces:
            stored, scales = arrays[piece.name], arrays.get(f"{piece.name}_scale_inv")
            want = stored.astype(np.float32) if scales is None else dequantised(stored, scales)
            scaled += scales is not None and scales.size > 1
            got = np.asarray(params[name])[piece.at]
            want = (want.T if piece.source.transpose else want).astype(got.dtype)
            np.testing.assert_array_equal(got, want, err_msg=piece.name)
    assert scaled > 10
    assert params["segments.1.0.moe.experts.up"].dtype == (dtype or ml_dtypes.bfloat16)


def test_a_share_need_not_begin_with_a_square(tmp_path):
    arrays = disk_tensors()
    folder = write_folder(tmp_path / "model", arrays)
    config, entries = read_config(folder)[0], list_tensors(folder / "model.safetensors")
    shapes = {name: entry.shape for name, entry in entries.items()}
    plan = resolve(config, family_of("deepseek_v3").table, declare(config), shapes, "here")
    share, places = ((0, 1), (2, 4), (100, 150), (120, 136)), plan["segments.1.0.moe.experts.up"]
    with Loader(entries) as loader:
        (got,) = loader.read_shares(places, share, [share], np.dtype(np.float32))
    for expert in (2, 3):
        name = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
        want = dequantised(arrays[name], arrays[f"{name}_scale_inv"]).T
        np.testing.assert_array_equal(got[0, expert - 2], want[100:150, 120:136])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{UP}_scale_inv": None}, f"'{UP}' is in FP8, its scales '{UP}_scale_inv' are missing"),
        ({f"{UP}_scale_inv": np.ones((1, 2), np.float32)}, r"are of shape \[1, 2\]"),
        (
            {UP: np.zeros((136, 160), ml_dtypes.bfloat16)},
            f"'{UP}_scale_inv' scales a tensor of type bfloat16",
        ),
        ({UP: np.full((136, 160), np.nan, FP8)}, f"'{UP}' holds NaN"),
        ({"model.norm.weight_scale_inv": np.ones((1, 1), np.float32)}, "scales a tensor of type bfloat16"),
        ({"other_scale_inv": np.ones((1, 1), np.float32)}, "'other_scale_inv' maps to no parameter"),
    ],
    ids=["missing", "shape", "bfloat16", "nan", "norm", "unknown"],
)
def test_weights_and_scales_that_do_not_fit(tmp_path, changes, message):
    arrays = {name: value for name, value in {**disk_tensors(), **changes}.items() if value is not None}
    with pytest.raises(InputError, match=message):
        load(write_folder(tmp_path / "model", arrays))
