"""The penalty against torch's KLDivLoss as the published training code uses it, value and gradient."""

import jax
import numpy as np
import pytest
import torch

from safemoe_jax.routing import alignment_penalty, drift


def router_logits(seed, shape=(16, 4, 64)):
    return np.random.default_rng(seed).normal(0, 1.5, shape).astype(np.float32)


def torch_penalty(student_LBE, reference_LBE, temperature):
    """Value and gradient with the published layout: routers stacked to [B, L, E], reduced over B only."""
    student = torch.tensor(student_LBE, requires_grad=True)
    reference = torch.tensor(reference_LBE)
    loss = torch.nn.KLDivLoss(reduction="batchmean")(
        torch.log_softmax(student.transpose(0, 1) / temperature, dim=-1),
        torch.softmax(reference.transpose(0, 1) / temperature, dim=-1),
    )
    loss.backward()
    return loss.item(), student.grad.numpy()


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 1.3])
def test_default_is_batchmean(temperature):
    student, reference = router_logits(0), router_logits(1)
    want, want_gradient = torch_penalty(student, reference, temperature)
    got, gradient = jax.jit(jax.value_and_grad(alignment_penalty), static_argnames="temperature")(
        student, reference, temperature=temperature
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)
    # Where both probabilities are nearly the same, their difference is rounding: hence atol by the largest.
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-5, atol=1e-6 * np.abs(want_gradient).max())


def test_mean_layers_is_batchmean_over_the_number_of_layers():
    student, reference = router_logits(0), router_logits(1)
    want, want_gradient = torch_penalty(student, reference, 0.1)
    got, gradient = jax.value_and_grad(alignment_penalty)(
        student, reference, temperature=0.1, reduction="mean_layers"
    )
    np.testing.assert_allclose(got, want / 16, rtol=1e-5)
    np.testing.assert_allclose(gradient, want_gradient / 16, rtol=1e-5, atol=1e-6 * np.abs(gradient).max())


def test_reverse_is_torch_with_the_arguments_exchanged():
    student = torch.tensor(router_logits(0), requires_grad=True)
    reference = torch.tensor(router_logits(1))
    want = torch.nn.functional.kl_div(
        torch.log_softmax(reference.transpose(0, 1) / 0.5, -1),
        torch.log_softmax(student.transpose(0, 1) / 0.5, -1),
        reduction="batchmean",
        log_target=True,
    )
    want.backward()
    got, gradient = jax.value_and_grad(alignment_penalty)(
        router_logits(0), router_logits(1), temperature=0.5, direction="reverse"
    )
    np.testing.assert_allclose(got, want.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, student.grad.numpy(), rtol=1e-5, atol=1e-6 * np.abs(gradient).max())


def test_drift_is_torch_per_layer():
    student, reference = router_logits(0), router_logits(1)
    pairs = zip(torch.tensor(student), torch.tensor(reference), strict=True)
    want = [
        torch.nn.KLDivLoss(reduction="batchmean")(torch.log_softmax(s, -1), torch.softmax(r, -1)).item()
        for s, r in pairs
    ]
    np.testing.assert_allclose(drift(student, reference), want, rtol=1e-5)
