"""Muon for the matrices of a ViT's blocks, with AdamW for everything else, as one optimiser.

Source: Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024),
https://kellerjordan.github.io/posts/muon/. Letters: R rows and C columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class MuonAdamW(AdamW):
    """Groups of parameters with `muon=True` hold matrices (R, C), and take

        M <- momentum M + (1 - momentum) G;   W <- (1 - lr wd) W - lr sqrt(max(1, R / C)) orth(Nesterov's M).

    AdamW takes the others. Needs whole matrices, so no sharding. A step after `found_inf` was set to 1, as
    `skip_poisoned` does, changes nothing, as with fused AdamW.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            if not group.get("muon"):
                continue
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for weights in by_shape.values():
                self._step_matrices(weights, group)
        return super().step(closure)

    @torch.no_grad()
    def _step_matrices(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """Matrices of one shape, orthogonalised side by side. Takes their gradients away, so that AdamW leaves them."""
        for weight in weights:
            if not self.state[weight]:  # AdamW wants a count of steps in every state that it loads
                self.state[weight] |= {"momentum": torch.zeros_like(weight), "step": weight.new_zeros(())}
        moments = [self.state[weight]["momentum"] for weight in weights]
        poisoned = getattr(self, "found_inf", None)
        keeps = 1.0 if poisoned is None else 1 - poisoned
        gradients = torch.stack([w.grad for w in weights if w.grad is not None])
        before = torch.stack(moments)
        if poisoned is not None:
            gradients = torch.where(poisoned > 0, before, gradients)
        after = before.lerp(gradients, 1 - group["momentum"])
        rows, columns = weights[0].shape
        rate = group["lr"] * keeps
        updates = orthogonalize(gradients.lerp(after, group["momentum"])) * (rate * max(1, rows / columns) ** 0.5)
        for weight, moment, new, update in zip(weights, moments, after, updates, strict=True):
            moment.copy_(new)
            self.state[weight]["step"] += keeps
            weight.mul_(1 - rate * group["weight_decay"]).sub_(update)
            weight.grad = None


def orthogonalize(matrices: Tensor) -> Tensor:
    """(n, R, C) -> (n, R, C): U V' of each matrix U S V', but for singular values between about 0.7 and 1.2.

    Five Newton-Schulz iterations; in bf16 on a GPU, which suffices for them.
    """
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x.bfloat16() if x.is_cuda else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
