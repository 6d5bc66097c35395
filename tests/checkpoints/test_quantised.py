"""Checkpoints read into 8 and 4 bits: the same as rounding the whole model, without ever holding it."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from safemoe_jax.checkpoints.reading import Loader
from safemoe_jax.errors import InputError
from safemoe_jax.model import Model, load_pretrained
from safemoe_jax.models import LoraConfig, declare
from safemoe_jax.models.lora import add_adapters
from safemoe_jax.models.quantisation import quantise_params, quantised_weights
from safemoe_jax.parallel.mesh import MESH_AXES
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


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_one_layer_of_a_rounded_weight_is_in_floats_at_a_time(folder, monkeypatch, method):
    reads, read_shares = [], Loader.read_shares

    def noted(*arguments):
        (share,) = read_shares(*arguments)
        reads.append((share.shape, share.dtype))
        return [share]

    monkeypatch.setattr(Loader, "read_shares", noted)
    load_pretrained(folder, quantisation=method)
    rounded = quantised_weights(OLMOE, method)
    kept = [spec.shape for name, spec in declare(OLMOE).items() if name not in rounded]
    layers = [(1, *spec.shape[1:]) for spec in rounded.values() for _ in range(spec.shape[0])]
    assert {spec.shape[0] for spec in rounded.values()} == {OLMOE.n_layers}
    assert reads == [(shape, np.float32) for shape in kept + layers]


def test_a_mesh_that_does_not_divide_the_pairs_is_refused(folder):
    """64 inputs over 64 devices: as 32 pairs they are not. Before anything is read: the devices are not."""
    mesh = AbstractMesh((1, 64, 1, 1), MESH_AXES)
    with pytest.raises(InputError, match=r"does not divide 'segments.*' in int4: \(3, 32, "):
        load_pretrained(folder, mesh=mesh, quantisation="int4")


def test_refusals(folder):
    with pytest.raises(InputError, match="quantisation 'int3'"):
        load_pretrained(folder, quantisation="int3")
