"""How much arithmetic training on one image is: counted by running the model, without its numbers, on no device.

These are model FLOPs: those of the equations, whatever a kernel computes twice to save memory. V1 and V2 subtract the
two maps before they meet the values, which is the least; the fused path of a GPU does more.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffvit.config import ModelConfig
from diffvit.models.vit import VisionTransformer


@lru_cache
def training_flops(config: ModelConfig, train: Literal["all", "head"] = "all") -> int:
    """Floating-point operations of one forward and one backward pass over one image of the config's size.

    Where only the classifier is trained, the backward pass is its own.

    A multiplication and an addition count as two. Matrix products and convolutions are counted; norms, softmax and
    activations, which are a per cent of it, are not.
    """
    with torch.device("meta"):
        model = VisionTransformer(config)
        image = torch.empty(1, config.in_channels, config.image_size, config.image_size)
        model.requires_grad_(train == "all")
        model.head.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        model(image).sum().backward()
    return int(counter.get_total_flops())
