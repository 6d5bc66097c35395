"""Checkpoints read into 8 and 4 bits: the same as rounding the whole model, without ever holding it."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from safemoe_jax.errors import InputError
from safemoe_jax.model import Model, load_pretrained
from safemoe_jax.models import LoraConfig
from safemoe_jax.models.lora import add_adapters
from safemoe_jax.models.quantisation import quantise_params
from tests.models.quantisable import OLMOE, drawn

TOKENS = np.arange(12, dtype=np.int32)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "float"
    Model(OLMOE, drawn()).save_pretrained(path)
    return path


@pytest.mark.parametrize("method", ["int8", "int4", "int4-64"])
def test_read_is_loaded_and_rounded(folder, method):
    whole = load_pretrained(folder)
    config, wanted = quantise_params(whole.config, whole.params, method)
    found = load_pretrained(folder, quantisation=method)
    assert found.config == config and set(found.params) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(found.params[name], value, err_msg=name)
        assert found.params[name].dtype == value.dtype


def test_saving_writes_the_rounded_weights_as_floats(folder, tmp_path):
    model = load_pretrained(folder, quantisation="int8")
    model.save_pretrained(tmp_path / "merged")
    again = load_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(again(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_on_quantised_weights_loads_onto_the_floats(folder, tmp_path):
    model = load_pretrained(folder, quantisation="int8")
    lora = LoraConfig(4, targets=("q_proj", "v_proj"))
    config, params = add_adapters(model.config, model.params, lora, jax.random.key(1))
    params = {k: v + 0.1 if k.endswith("lora_b") else v for k, v in params.items()}
    trained = Model(config, params, name=str(folder), hf_config=model.hf_config)
    trained.save_adapter(tmp_path / "adapter")
    found = load_pretrained(folder, adapter=tmp_path / "adapter", quantisation="int8")
    np.testing.assert_array_equal(found(TOKENS).logits, trained(TOKENS).logits)
    assert load_pretrained(folder, adapter=tmp_path / "adapter").config.quantisation is None


def test_refusals(folder):
    with pytest.raises(InputError, match="quantisation 'int3'"):
        load_pretrained(folder, quantisation="int3")
