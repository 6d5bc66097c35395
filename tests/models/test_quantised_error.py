"""`experiments/quantised_error.py`: two families measured and written; every family can be."""

from __future__ import annotations

import json

import pytest

from experiments.quantised_error import CONFIGS, METHODS, main, network
from safemoe_jax.families import FAMILIES
from safemoe_jax.models.params import count
from safemoe_jax.models.quantisation import quantised_weights
from safemoe_jax.models.transformer import declare


def test_it_measures_and_writes_both_files(tmp_path):
    main(["--families", "olmoe", "gpt_oss", "--seeds", "1", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "quantised_error.json").read_text())["measurements"]
    assert [(row["family"], row["method"]) for row in rows] == [
        (family, method) for family in ("olmoe", "gpt_oss") for method in METHODS
    ]
    for eight, four, coarse in (rows[:3], rows[3:]):
        assert 0 < eight["logits"] < 0.2 < four["logits"] < coarse["logits"] < 1
        assert 1 > eight["experts"] > four["experts"] > 0.5 and 1 > eight["tokens"] > four["tokens"] > 0.3
        assert all(0 < a < b for a, b in zip(*(r["router_kl_by_layer"] for r in (eight, four)), strict=True))
        sizes = [row["megabytes"] for row in (eight, four, coarse)]
        assert eight["float32_megabytes"] / 2.5 > sizes[0] > sizes[1] > sizes[2]
    page = (tmp_path / "quantised_error.md").read_text()
    assert "`python experiments/quantised_error.py`" in page and "| gpt_oss | float32 |" in page
    assert page.count("\n| | int4-64 |") == 2


def test_every_moe_family_is_there():
    """But for a second name of one that is."""
    dense, twice = {"llama", "qwen3"}, {"llama4"}
    assert set(CONFIGS) == set(FAMILIES) - dense - twice


@pytest.mark.parametrize("family", CONFIGS)
def test_the_networks_are_of_their_family_and_can_be_rounded_by_every_method(family):
    config = network(family)
    assert config.family == family and config.n_moe_layers >= 3
    for method in METHODS:
        chosen = quantised_weights(config, method)
        assert count(chosen) > 0.8 * count(declare(config))
