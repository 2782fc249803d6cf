"""RMSNorm, w x / sqrt(mean(x^2) + eps), over the last dimension.

PyTorch has a fused one for GPUs; on a CPU it makes it of small operations, and its gradient of theirs, each a pass over
memory. Here are three passes and, for the gradient, six.

Source: arXiv 1910.07467, equation 4. Letters: E size of the last dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(..., E) and (E,), of the same dtype -> (..., E)."""
    if x.is_cuda:
        with torch.autocast("cuda", enabled=False):  # it would make and keep a float32 copy; sums are float32 anyway
            return F.rms_norm(x, x.shape[-1:], weight, eps)
    if torch.compiler.is_compiling() or x.dtype not in (torch.float32, torch.float64):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        factor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = x * factor
        ctx.save_for_backward(unit, factor, weight)
        scaled: Tensor = unit * weight
        return scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """With u = x / rms and g the gradient: factor (g w - u mean(g w u)), and the sum of g u."""
        unit, factor, weight = ctx.saved_tensors
        product = (grad * unit).reshape(-1, len(weight))
        minus_mean = torch.mv(product, weight).div_(-len(weight)).view_as(factor)
        return torch.addcmul(grad * weight, unit, minus_mean).mul_(factor), product.sum(0), None
