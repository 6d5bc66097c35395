"""The table machinery: names, slices and layouts by hand-written examples."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.families import olmoe
from safemoe_jax.families.tensor_table import Piece, Source, pieces, published, resolve
from safemoe_jax.models import LayerConfig, LoraConfig, ModelConfig, declare

CONFIG = ModelConfig(
    family="olmoe", vocab_size=10, d_model=8, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=4, norm_eps=0.1,
    n_experts=2, top_k=1, expert_dim=6, qk_norm="full",
)  # fmt: skip


def shapes(config):
    plan = published(config, olmoe.TABLE, declare(config))
    return {piece.name: piece.shape for places in plan.values() for piece in places}


def test_every_published_name_and_shape():
    """Written out from the published checkpoint's index, for one layer."""
    got = shapes(CONFIG)
    layer = {
        "input_layernorm.weight": (8,),
        "self_attn.q_proj.weight": (8, 8),
        "self_attn.k_proj.weight": (4, 8),
        "self_attn.v_proj.weight": (4, 8),
        "self_attn.o_proj.weight": (8, 8),
        "self_attn.q_norm.weight": (8,),
        "self_attn.k_norm.weight": (4,),
        "post_attention_layernorm.weight": (8,),
        "mlp.gate.weight": (2, 8),
        **{
            f"mlp.experts.{e}.{name}_proj.weight": shape
            for e in range(2)
            for name, shape in (("gate", (6, 8)), ("up", (6, 8)), ("down", (8, 6)))
        },
    }
    want = {f"model.layers.{i}.{name}": shape for i in range(3) for name, shape in layer.items()}
    want |= {"model.embed_tokens.weight": (10, 8), "model.norm.weight": (8,), "lm_head.weight": (10, 8)}
    assert got == want


def test_tied_biased_and_adapted():
    assert "lm_head.weight" not in shapes(replace(CONFIG, tie_embeddings=True))
    biased = shapes(replace(CONFIG, attention_bias=True, output_bias=True))
    assert biased["model.layers.2.self_attn.k_proj.bias"] == (4,)
    adapted = replace(CONFIG, lora=LoraConfig(targets=("q_proj", "gate", "mlp.experts.down_proj")))
    assert shapes(adapted) == shapes(CONFIG)


def test_layer_index_counts_through_segments():
    """Segments (dense x 2), (moe x 3): the second repeat of the second segment is layer 3."""
    config = ModelConfig(
        family="x", vocab_size=1, d_model=8, n_layers=5, n_heads=1, n_kv_heads=1, head_dim=8, norm_eps=0.1,
        n_experts=2, top_k=1, expert_dim=6, 
        layers=tuple(map(LayerConfig, ("dense", "dense", "moe", "moe", "moe"))),
    )  # fmt: skip
    got = pieces(config, "segments.1.0.a.kernel", (3, 8, 6), Source("l{layer}", transpose=True))
    assert [(piece.at, piece.name, piece.shape) for piece in got] == [
        ((0,), "l2", (6, 8)),
        ((1,), "l3", (6, 8)),
        ((2,), "l4", (6, 8)),
    ]


@pytest.mark.parametrize("part", [0, 1])
def test_slices_of_a_fused_tensor(part):
    """[E, 2F, D] on disk: gate rows first. A slice through Piece equals a slice of the whole, transposed."""
    disk = np.random.default_rng(0).normal(size=(4, 12, 5))
    whole = disk[:, part * 6 : (part + 1) * 6].transpose(0, 2, 1)
    piece = Piece((0,), "x", disk.shape, Source("x", transpose=True, part=(part, 2)))
    for index in ((slice(1, 3), slice(2, 5), slice(1, 4)), (slice(0, 4), slice(0, 5), slice(0, 6))):
        block = disk[piece.disk_index(index)]
        np.testing.assert_array_equal(block.swapaxes(-1, -2), whole[index])


def test_resolve_names_what_is_wrong():
    specs, found = declare(CONFIG), shapes(CONFIG)
    assert set(resolve(CONFIG, olmoe.TABLE, specs, found, "here")) == set(specs)

    def wrong(message, **changes):
        changed = {k: v for k, v in {**found, **changes}.items() if v is not None}
        with pytest.raises(InputError, match=re.escape(message)) as error:
            resolve(CONFIG, olmoe.TABLE, specs, changed, "here")
        assert error.value.where == "here"

    wrong("'model.norm.weight' is missing", **{"model.norm.weight": None})
    wrong("'model.norm.weight' has shape [9]", **{"model.norm.weight": (9,)})
    wrong("'extra' maps to no parameter", extra=(1,))
    wrong("duplicate", **{"model.layers.0.mlp.experts.gate_up_proj": (2, 12, 8)})


def test_half_fused_checkpoint_is_refused():
    """One layer fused, another per expert: no layout is whole."""
    found = shapes(CONFIG)
    for e in range(2):
        for name in ("gate", "up"):
            del found[f"model.layers.1.mlp.experts.{e}.{name}_proj.weight"]
    found["model.layers.1.mlp.experts.gate_up_proj"] = (2, 12, 8)
    with pytest.raises(InputError, match="duplicate"):
        resolve(CONFIG, olmoe.TABLE, declare(CONFIG), found, "here")
