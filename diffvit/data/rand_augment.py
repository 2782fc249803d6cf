"""RandAugment (arXiv 1909.13719) as three programs have it: torchvision, Big Vision and timm.

They share its idea, a few operations drawn anew for each image, and differ in which ones there are and in what a
magnitude means to them, so a recipe names the program that its paper used. Magnitudes are torchvision's, 0 to 30; the
other two count to 10, and an operation here takes the share of the largest, 0 to 1.

Sources: google-research/big_vision, pp/archive/autoaugment.py at 0127fb6; huggingface/pytorch-image-models,
data/auto_augment.py, the policy `rand-...-inc1`, in which every operation gets stronger with the magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from diffvit.config import AugmentConfig

Operation = Callable[[Tensor, float], Tensor]
"""(uint8 image (C, H, W), share of the largest magnitude) -> uint8 (C, H, W)."""

_BIG_VISION_SIDE = 224
"""The image side that Big Vision's shifts of 100 px and its half box of 40 px are meant for."""


class RandAugment(v2.Transform):  # type: ignore[misc]  # torchvision ships no types
    """uint8 (C, H, W) -> uint8 (C, H, W): `rand_augment_layers` operations, each drawn with replacement.

    An operation is applied with `rand_augment_probability`, at a magnitude drawn from a normal distribution around
    `rand_augment_magnitude`, kept in 0 to 30.
    """

    def __init__(self, augment: AugmentConfig) -> None:
        super().__init__()
        self._layers, self._probability = augment.rand_augment_layers, augment.rand_augment_probability
        self._magnitude, self._std = float(augment.rand_augment_magnitude), augment.rand_augment_magnitude_std
        self._operations = _OPERATIONS[augment.rand_augment](augment.policy_fill)

    def forward(self, image: Tensor) -> Tensor:
        for _ in range(self._layers):
            if torch.rand(()) < self._probability:
                drawn = torch.normal(torch.tensor(self._magnitude), self._std).item()
                operation = self._operations[_below(len(self._operations))]
                image = operation(image, min(max(drawn, 0.0), 30.0) / 30)
        return image


_WITHOUT_MAGNITUDE: list[Operation] = [
    lambda image, _: F.autocontrast(image),
    lambda image, _: F.equalize(image),
    lambda image, _: F.invert(image),
]


def _torchvision(fill: int | tuple[int, ...]) -> list[Operation]:
    """Its own choice among 14, of which it keeps one object for each whole magnitude."""
    by_magnitude = [v2.RandAugment(1, magnitude, fill=fill) for magnitude in range(31)]
    return [lambda image, share: by_magnitude[round(30 * share)](image)]


def _big_vision(fill: int | tuple[int, ...]) -> list[Operation]:
    """Colours only ever get stronger with the magnitude; at the largest one solarizing does nothing."""

    def enhanced(share: float) -> float:
        return 1.8 * share + 0.1

    def in_pixels(pixels: int, share: float, image: Tensor) -> int:
        return int(pixels * share) * image.shape[-1] // _BIG_VISION_SIDE

    return [
        *_WITHOUT_MAGNITUDE,
        lambda image, share: F.rotate(image, _either_way(30 * share), fill=fill),
        lambda image, share: F.posterize(image, int(4 * share)),
        lambda image, share: _solarized(image, int(256 * share)),
        lambda image, share: F.adjust_saturation(image, enhanced(share)),
        lambda image, share: _contrasted_from_size(image, enhanced(share)),
        lambda image, share: F.adjust_brightness(image, enhanced(share)),
        lambda image, share: F.adjust_sharpness(image, enhanced(share)),
        lambda image, share: _moved(image, fill, shear=(_either_way(0.3 * share), 0)),
        lambda image, share: _moved(image, fill, shear=(0, _either_way(0.3 * share))),
        lambda image, share: _moved(image, fill, shift=(_either_way(in_pixels(100, share, image)), 0)),
        lambda image, share: _moved(image, fill, shift=(0, _either_way(in_pixels(100, share, image)))),
        lambda image, share: _cut_out(image, in_pixels(40, share, image), fill),
        lambda image, share: _brightened_where_dark(image, int(110 * share)),
    ]


def _timm(fill: int | tuple[int, ...]) -> list[Operation]:
    """Bilinear where timm is bicubic or, for its own recipes, either: torchvision turns no tensor bicubically."""
    smooth = InterpolationMode.BILINEAR

    def enhanced(share: float) -> float:
        return 1 + _either_way(0.9 * share)

    return [
        *_WITHOUT_MAGNITUDE,
        lambda image, share: F.rotate(image, _either_way(30 * share), smooth, fill=fill),
        lambda image, share: F.posterize(image, 4 - int(4 * share)),
        lambda image, share: _solarized(image, 256 - int(256 * share)),
        lambda image, share: _brightened_where_dark(image, int(110 * share)),
        lambda image, share: F.adjust_saturation(image, enhanced(share)),
        lambda image, share: F.adjust_contrast(image, enhanced(share)),
        lambda image, share: F.adjust_brightness(image, enhanced(share)),
        lambda image, share: F.adjust_sharpness(image, enhanced(share)),
        lambda image, share: _moved(image, fill, smooth, shear=(_either_way(0.3 * share), 0)),
        lambda image, share: _moved(image, fill, smooth, shear=(0, _either_way(0.3 * share))),
        lambda image, share: _moved(image, fill, smooth, shift=(_either_way(0.45 * share * image.shape[-1]), 0)),
        lambda image, share: _moved(image, fill, smooth, shift=(0, _either_way(0.45 * share * image.shape[-2]))),
    ]


_OPERATIONS: dict[str, Callable[[int | tuple[int, ...]], list[Operation]]] = {
    "torchvision": _torchvision,
    "big_vision": _big_vision,
    "timm": _timm,
}


def _below(bound: int) -> int:
    return int(torch.randint(bound, ()))


def _either_way(amount: float) -> float:
    return amount if torch.rand(()) < 0.5 else -amount


def _solarized(image: Tensor, threshold: int) -> Tensor:
    solarized: Tensor = F.solarize(image, threshold) if threshold <= 255 else image
    return solarized


def _brightened_where_dark(image: Tensor, by: int) -> Tensor:
    """SolarizeAdd: what is below 128 gets brighter by `by`."""
    return torch.where(image < 128, (image.short() + by).clamp_(max=255).to(torch.uint8), image)


def _contrasted_from_size(image: Tensor, factor: float) -> Tensor:
    """Away from a grey that is the number of pixels / 256, where the mean was meant: Big Vision trained with this."""
    grey = min(image.shape[-2] * image.shape[-1] // 256, 255)
    return ((image.float() - grey) * factor + grey).clamp_(0, 255).to(torch.uint8)


def _cut_out(image: Tensor, half_side: int, fill: int | tuple[int, ...]) -> Tensor:
    """A square of twice `half_side` around any pixel, what of it lies in the image, gets the fill."""
    row, column = (_below(side) for side in image.shape[-2:])
    top, left = max(row - half_side, 0), max(column - half_side, 0)
    image = image.clone()
    image[:, top : row + half_side, left : column + half_side] = torch.tensor(fill, dtype=torch.uint8).view(-1, 1, 1)
    return image


def _moved(
    image: Tensor,
    fill: int | tuple[int, ...],
    interpolation: InterpolationMode = InterpolationMode.NEAREST,
    *,
    shift: tuple[float, float] = (0, 0),
    shear: tuple[float, float] = (0, 0),
) -> Tensor:
    """Shifted to the right and down by pixels, and sheared by so many a row (column) away from the top left corner."""
    degrees = [math.degrees(math.atan(by)) for by in shear]
    moved: Tensor = F.affine(image, 0.0, [*shift], 1.0, degrees, interpolation, fill, [0, 0])
    return moved
