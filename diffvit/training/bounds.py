"""A bounded lambda (`model.lambda_max`) goes no further beyond its bound, and may come back."""

from __future__ import annotations

import torch
from torch import nn

from diffvit.models.attention import DiffAttention
from diffvit.training.sharding import own_rows, whole


@torch.no_grad()
def hold_lambdas(model: nn.Module) -> None:
    """Drop the gradient of every lambda that is beyond a bound and would be taken further by it.

    To be called with the gradient of the whole global batch: the sign of a part of it is another. Otherwise what is
    learnt runs away, while the lambda that is used stays at its bound, until its gradient, which grows as exp does,
    overflows. A gradient that is not finite stays so. A collective where the model is sharded.
    """
    for layer in model.modules():
        if not isinstance(layer, DiffAttention) or layer.lambda_max is None or layer.lambda_q1.grad is None:
            continue
        vectors = (layer.lambda_q1, layer.lambda_k1, layer.lambda_q2, layer.lambda_k2)
        learned = layer.learned_lambda(*map(whole, vectors))
        slope = whole((layer.lambda_q1.grad * layer.lambda_k1).sum())  # of the sign of the loss's by lambda
        outward = (learned < 0) & (slope > 0) | (learned > layer.lambda_max) & (slope < 0)
        for vector in vectors:
            if vector.grad is not None:
                own_rows(vector.grad).mul_(~outward)
