"""A number kept between bounds while it is learnt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def bounded(value: Tensor, low: float, high: float) -> Tensor:
    """`value` clamped to [low, high], whose gradient still brings it back from beyond a bound, and takes it no further.

    clamp's own gradient is 0 out there, so that what has left could not return; one that is passed on as it comes would
    let `value` run away without end.
    """
    clamped: Tensor = _Bounded.apply(value, low, high)
    return clamped


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(value < low, value > high)
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        below, above = ctx.saved_tensors
        return grad.masked_fill(below & (grad > 0) | above & (grad < 0), 0.0), None, None
