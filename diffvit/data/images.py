"""From encoded bytes to the model's input: decode, augment, crop. Nothing here knows of Ray or of files.

Images stay uint8 until they reach the device (`normalize`), so that what travels between processes is a quarter of
the float32 size. Letters: C channels, S side of the model's input.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import io as tv_io
from torchvision.transforms import v2

from diffvit.config import AugmentConfig

_JPEG_MAGIC = b"\xff\xd8\xff"
_PHOTO_MEAN, _PHOTO_STD = 114.4, 57.6
"""ImageNet's, averaged over its channels, in grey levels."""


class ImageError(ValueError):
    """An image that cannot be used, with the reason."""


def decode_image(encoded: bytes, channels: int, max_pixels: int) -> Tensor:
    """The picture as people see it: EXIF rotation applied, alpha on white, 16 bits scaled to 8, first frame only.

    Args:
        encoded: the bytes of a file that PIL reads.
        channels: 1 for grey, 3 for RGB (grey is replicated).
        max_pixels: the largest width x height to decode; checked in the header, before any pixel is.

    Returns:
        uint8 (channels, height, width).

    Raises:
        ImageError: not an image, truncated, or larger than `max_pixels`.
    """
    with warnings.catch_warnings():
        # max_pixels replaces PIL's own bound, and torchvision's deprecation concerns us and not the user
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(encoded))
        except Image.DecompressionBombError as error:
            raise ImageError(str(error)) from None
        except Exception as error:  # PIL's plug-ins raise whatever their parsers do
            raise ImageError(f"not a readable image: {error}") from None
        if image.width * image.height > max_pixels:
            raise ImageError(f"{image.width} x {image.height} pixels, more than data.max_pixels = {max_pixels}")
        try:
            if encoded.startswith(_JPEG_MAGIC) and image.mode in ("L", "RGB"):
                return _decode_jpeg(encoded, channels)
            return _decode_any(image, channels)
        except Exception as error:  # as above
            raise ImageError(f"does not decode: {error}") from None


def _decode_jpeg(encoded: bytes, channels: int) -> Tensor:
    mode = tv_io.ImageReadMode.GRAY if channels == 1 else tv_io.ImageReadMode.RGB
    data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    decoded: Tensor = tv_io.decode_jpeg(data, mode=mode, apply_exif_orientation=True)
    return decoded


def _decode_any(image: Image.Image, channels: int) -> Tensor:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel; PIL's own conversion would clip at 255
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    elif image.mode in ("PA", "LA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    image = image.convert("L" if channels == 1 else "RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, channels).permute(2, 0, 1)


def train_transform(augment: AugmentConfig, image_size: int) -> v2.Transform:
    """uint8 (C, any, any) -> uint8 (C, S, S), drawing from torch's global generator, which the caller seeds."""
    steps: list[v2.Transform] = []
    match augment.crop:
        case "inception":
            interpolation = v2.InterpolationMode(augment.interpolation)
            steps.append(
                v2.RandomResizedCrop(image_size, scale=augment.crop_scale, interpolation=interpolation, antialias=True)
            )
        case "pad":
            steps += [_resize_short_side(augment, image_size), v2.RandomCrop(image_size, padding=augment.padding)]
        case "none":
            steps.append(eval_transform(augment, image_size))
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip(augment.flip))
    if augment.color_jitter:
        steps.append(v2.ColorJitter(*[augment.color_jitter] * 3))
    if augment.auto_augment == "trivial":
        steps.append(v2.TrivialAugmentWide())
    elif augment.auto_augment != "none":
        steps.append(v2.AutoAugment(v2.AutoAugmentPolicy(augment.auto_augment), fill=augment.policy_fill))
    if augment.rand_augment_layers:
        steps.append(_RandAugment(augment))
    if augment.erasing:
        erase = v2.RandomErasing if augment.erasing_fill == "black" else _NoiseErasing
        steps.append(erase(augment.erasing))
    return v2.Compose(steps)


class _RandAugment(v2.Transform):  # type: ignore[misc]  # torchvision ships no types
    """RandAugment whose operations each draw whether they are applied, and how strongly, rounded and kept in 0..30."""

    def __init__(self, augment: AugmentConfig) -> None:
        super().__init__()
        self._layers, self._probability = augment.rand_augment_layers, augment.rand_augment_probability
        self._magnitude, self._std = float(augment.rand_augment_magnitude), augment.rand_augment_magnitude_std
        self._by_magnitude = [v2.RandAugment(1, magnitude, fill=augment.policy_fill) for magnitude in range(31)]

    def forward(self, image: Tensor) -> Tensor:
        for _ in range(self._layers):
            if torch.rand(()) < self._probability:
                drawn = round(torch.normal(torch.tensor(self._magnitude), self._std).item())
                image = self._by_magnitude[min(max(drawn, 0), 30)](image)
        return image


class _NoiseErasing(v2.RandomErasing):  # type: ignore[misc]
    """Random erasing with noise that is N(0, 1) after the usual normalisation, as timm's `pixel` mode."""

    def make_params(self, flat_inputs: list[Tensor]) -> dict[str, Any]:
        params: dict[str, Any] = super().make_params(flat_inputs)
        if params["v"] is not None:
            shape = (flat_inputs[0].shape[0], params["h"], params["w"])
            params["v"] = (_PHOTO_MEAN + _PHOTO_STD * torch.randn(shape)).clamp_(0, 255).to(torch.uint8)
        return params


def eval_transform(augment: AugmentConfig, image_size: int) -> v2.Transform:
    """uint8 (C, any, any) -> uint8 (C, S, S): shorter side to S / eval_crop_ratio, centre crop."""
    side = round(image_size / augment.eval_crop_ratio)
    return v2.Compose([_resize_short_side(augment, side), v2.CenterCrop(image_size)])


def _resize_short_side(augment: AugmentConfig, size: int) -> v2.Transform:
    return v2.Resize(size, interpolation=v2.InterpolationMode(augment.interpolation), antialias=True)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (B, C, S, S) -> float32 (B, C, S, S) on the same device: (x / 255 - mean) / std by channel."""
    mean_c11 = torch.tensor(mean, device=images.device).view(-1, 1, 1)
    std_c11 = torch.tensor(std, device=images.device).view(-1, 1, 1)
    return (images.float() / 255 - mean_c11) / std_c11
