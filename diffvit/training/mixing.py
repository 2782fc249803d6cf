"""Mixup and CutMix: images and targets of two samples mixed.

Partners are neighbours in the order of the epoch (samples 2i and 2i + 1 of a step), and the step draws one share for
all of them, so what is mixed depends neither on the number of workers nor on accumulation.

Sources: mixup arXiv 1710.09412; CutMix arXiv 1905.04899. Letters: B samples in the micro-batch, S image side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffvit.config import AugmentConfig
from diffvit.data.batches import SKIPPED_LABEL
from diffvit.data.order import mixing_seed


@dataclass(frozen=True)
class Targets:
    """`own_share` (B,) of the target is `labels` (B,), the rest `partner_labels` (B,); None where nothing is mixed."""

    labels: Tensor
    partner_labels: Tensor | None = None
    own_share: Tensor | None = None


def mix(images: Tensor, labels: Tensor, config: AugmentConfig, seed: int, step: int) -> tuple[Tensor, Targets]:
    """Mixed images (B, C, S, S), B even, and their targets, for global step `step`.

    A sample whose image, or whose partner's, was skipped is left as it is.
    """
    if not config.mixup and not config.cutmix:
        return images, Targets(labels)
    rng = np.random.default_rng(mixing_seed(seed, step))
    if config.mix_probability < 1 and rng.random() >= config.mix_probability:
        return images, Targets(labels)
    cuts = bool(config.cutmix) and (not config.mixup or rng.random() < 0.5)
    alpha = config.cutmix if cuts else config.mixup
    share = rng.beta(alpha, alpha)
    partners = torch.arange(len(labels), device=labels.device) ^ 1
    pairs = ((labels != SKIPPED_LABEL) & (labels[partners] != SKIPPED_LABEL)).view(-1, 1, 1, 1)
    if cuts:
        mixed = images.clone()
        y, x, share = cut_box(images.shape[-1], share, rng)
        mixed[..., y, x] = images[partners][..., y, x]
    else:
        mixed = torch.lerp(images[partners], images, share)
    own_share = torch.where(pairs.flatten(), share, 1.0)
    return torch.where(pairs, mixed, images), Targets(labels, labels[partners], own_share)


def cut_box(side: int, share: float, rng: np.random.Generator) -> tuple[slice, slice, float]:
    """Rows and columns of CutMix's rectangle, and the share of the image outside of it.

    Its sides are sqrt(1 - share) of the image's, its centre is anywhere, and what sticks out is cut off.
    """
    half = round(side * (1 - share) ** 0.5) / 2
    centre_y, centre_x = rng.integers(side, size=2)
    top, bottom = (int(np.clip(centre_y + d, 0, side)) for d in (-half, half))
    left, right = (int(np.clip(centre_x + d, 0, side)) for d in (-half, half))
    return slice(top, bottom), slice(left, right), 1 - (bottom - top) * (right - left) / side**2
