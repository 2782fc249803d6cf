"""The CPU's RMSNorm beside PyTorch's, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffvit.models.rms_norm import rms_norm


@pytest.mark.parametrize("shape", [(3, 5, 2, 7), (4, 3), (1,)])
def test_has_the_values_and_gradients_of_torch(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    weight = 0.5 + torch.rand(shape[-1], dtype=torch.float64, generator=generator)
    grad = torch.randn(shape, dtype=torch.float64, generator=generator)
    ours, theirs = ([t.clone().requires_grad_() for t in (x, weight)] for _ in range(2))
    normed, expected = rms_norm(*ours, 1e-2), F.rms_norm(theirs[0], shape[-1:], theirs[1], 1e-2)
    torch.testing.assert_close(normed, expected)
    for mine, yours in zip(
        torch.autograd.grad(normed, ours, grad), torch.autograd.grad(expected, theirs, grad), strict=True
    ):
        torch.testing.assert_close(mine, yours)


def test_a_head_of_zeros_stays_zero_and_half_precision_is_left_to_torch() -> None:
    zeros = torch.zeros(2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(rms_norm(zeros, torch.ones(4), 1e-5).sum(), zeros)
    torch.testing.assert_close(grad, torch.full((2, 4), 1e-5**-0.5))
    half = torch.full((3, 4), 1000.0, dtype=torch.float16)  # whose squares it cannot hold
    torch.testing.assert_close(rms_norm(half, torch.ones(4, dtype=torch.float16), 1e-5), torch.ones_like(half))
