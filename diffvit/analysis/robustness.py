"""Images made worse, in three ways and three severities, the same on every call.

    noise       Gaussian noise on every pixel and channel: standard deviation 0.08, 0.18, 0.38 of the full range
                (severities 1, 3 and 5 of ImageNet-C, arXiv 1903.12261)
    blur        Gaussian blur: sigma 1.5 %, 3 % and 6 % of the image's side, so that small images suffer alike
    occlusion   25 %, 50 % and 75 % of the patches replaced by mid grey, at random (arXiv 2105.10497)

Letters: B images, C channels, S image side, P patches of a side.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms.v2 import functional as transforms

Corruption = Literal["noise", "blur", "occlusion"]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
STRENGTHS: dict[Corruption, tuple[float, float, float]] = {
    "noise": (0.08, 0.18, 0.38),
    "blur": (0.015, 0.03, 0.06),
    "occlusion": (0.25, 0.5, 0.75),
}
"""By severity 1, 2, 3."""

_GREY = 128


def corrupt(
    images_BCSS: npt.NDArray[np.uint8], kind: Corruption, severity: int, *, patch_size: int, seed: int
) -> npt.NDArray[np.uint8]:
    """uint8 (B, C, S, S) -> uint8 (B, C, S, S), a function of its arguments alone.

    Args:
        images_BCSS: uint8.
        kind: what is done to them.
        severity: 1, 2 or 3.
        patch_size: side in pixels of what an occlusion covers.
        seed: of the random draws.

    Raises:
        ValueError: another severity.
    """
    if severity not in (1, 2, 3):
        raise ValueError(f"severity must be 1, 2 or 3, got {severity}")
    strength = STRENGTHS[kind][severity - 1]
    generator = np.random.default_rng(seed)
    match kind:
        case "noise":
            noise = generator.standard_normal(images_BCSS.shape, np.float32) * (255 * strength)
            return np.clip(np.rint(images_BCSS + noise), 0, 255).astype(np.uint8)
        case "blur":
            return _blur(images_BCSS, strength * images_BCSS.shape[-1])
        case "occlusion":
            return _occlude(images_BCSS, strength, patch_size, generator)


def _blur(images: npt.NDArray[np.uint8], sigma: float) -> npt.NDArray[np.uint8]:
    side = 2 * max(round(3 * sigma), 1) + 1
    blurred: npt.NDArray[np.uint8] = transforms.gaussian_blur(torch.from_numpy(images.copy()), side, sigma).numpy()
    return blurred


def _occlude(
    images: npt.NDArray[np.uint8], share: float, patch_size: int, generator: np.random.Generator
) -> npt.NDArray[np.uint8]:
    B, _, S, _ = images.shape
    P = S // patch_size
    # the rank of a draw among an image's patches: exactly the share of them in every image
    ranks = generator.random((B, P * P)).argsort(axis=1).argsort(axis=1)
    covered = (ranks < round(share * P * P)).reshape(B, 1, P, P).repeat(patch_size, axis=2).repeat(patch_size, axis=3)
    return np.where(covered, np.uint8(_GREY), images)
