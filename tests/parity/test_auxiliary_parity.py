"""The load-balancing loss against transformers, for each family whose models have one.

The torch models are tiny and random; what they return as `aux_loss` is compared, so that their top_k, their
attention mask and their layers without a router are in it. The z-loss is compared with torch's arithmetic.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from safemoe_jax.routing.auxiliary import load_balancing_loss, z_loss

COMMON = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EIGHT = {"num_experts": 8, "num_experts_per_tok": 3}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 3}
FAMILIES = {
    "olmoe": EIGHT | {"intermediate_size": 16},
    "qwen2_moe": EIGHT | {"decoder_sparse_step": 2, "moe_intermediate_size": 16},
    "qwen3_moe": EIGHT | {"mlp_only_layers": [1], "moe_intermediate_size": 16, "head_dim": 8},
    "mixtral": LOCAL,
    "gpt_oss": LOCAL | {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "phimoe": LOCAL | {"num_experts_per_tok": 2},
    "granitemoe": LOCAL,
    "ernie4_5_moe": {
        "moe_num_experts": 8, "moe_k": 3, "moe_layer_start_index": 1, "moe_intermediate_size": 16,
        "moe_num_shared_experts": 1,
    },
}  # fmt: skip
MOE_LAYERS = {"qwen2_moe": 2, "qwen3_moe": 3, "ernie4_5_moe": 3}
MASKS = {"all real": [[1] * 9, [1] * 9], "right-padded": [[1] * 9, [1] * 5 + [0] * 4]}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> tuple[str, torch.nn.Module]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **COMMON | FAMILIES[request.param])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # routers far from even, so that the loss is not just top_k
        for name, value in model.named_parameters():
            if name.endswith(("gate.weight", "router.weight")):
                value.normal_(std=1.0)
    return request.param, model


def torch_output(model, mask, *, routers):
    tokens = torch.randint(3, 64, mask.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask, labels=tokens, output_router_logits=routers)


def stacked(router_logits, mask) -> np.ndarray:
    layers = [layer.float().numpy().reshape(*mask.shape, -1) for layer in router_logits]
    return np.stack(layers)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_load_balancing_loss_of_each_family(family, mask):
    name, model = family
    mask = torch.tensor(mask)
    out = torch_output(model, mask, routers=True)
    logits = stacked(out.router_logits, mask)
    assert logits.shape == (MOE_LAYERS.get(name, 4), 2, 9, 8)
    top_k = model.config.num_experts_per_tok
    ours = float(load_balancing_loss(logits, mask.numpy(), top_k=top_k))
    assert abs(ours - top_k) > 0.05, "an even load would hide a wrong loss"
    assert ours == pytest.approx(float(out.aux_loss), rel=1e-6)
    weighted = float(out.loss - torch_output(model, mask, routers=False).loss)
    assert weighted == pytest.approx(model.config.router_aux_loss_coef * ours, abs=2e-6)


def test_gradient_of_the_load_balancing_loss_equals_torch():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = np.random.default_rng(0).normal(size=(3, 2, 7, 8), scale=2).astype(np.float32)
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3])
    layers = tuple(torch.tensor(layer.reshape(-1, 8), requires_grad=True) for layer in logits)
    load_balancing_loss_func(layers, 8, 2, torch.tensor(mask)).backward()
    theirs = np.stack([layer.grad.numpy().reshape(2, 7, 8) for layer in layers])
    ours = jax.grad(lambda x: load_balancing_loss(x, mask, top_k=2))(logits)
    assert np.abs(theirs).max() > 1e-3
    np.testing.assert_allclose(ours, theirs, atol=1e-7)


def test_z_loss_and_its_gradient_equal_torch():
    values = np.random.default_rng(0).normal(size=(3, 2, 7, 8), scale=5).astype(np.float32)
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3])
    logits = torch.tensor(values, requires_grad=True)
    real = torch.tensor(mask, dtype=torch.bool)
    theirs = torch.logsumexp(logits, -1).pow(2)[:, real].mean()
    theirs.backward()
    assert float(z_loss(values, mask)) == pytest.approx(theirs.item(), rel=1e-6)
    ours = jax.grad(lambda x: z_loss(x, mask))(values)
    np.testing.assert_allclose(ours, logits.grad.numpy(), atol=1e-6)
