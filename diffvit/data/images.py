"""From encoded bytes to the model's input: decode, augment, crop. Nothing here knows of Ray or of files.

Images stay uint8 until they reach the device (`normalize`), so that what travels between processes is a quarter of
the float32 size. Letters: C channels, S side of the model's input.
"""

from __future__ import annotations

import io
import warnings

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import io as tv_io
from torchvision.transforms import v2

from diffvit.config import AugmentConfig

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
"""The only ones of PIL's that are tried: others start programs (Ghostscript for EPS) on what a stranger wrote."""
_JPEG_MAGIC = b"\xff\xd8\xff"


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
            steps.append(v2.RandomResizedCrop(image_size, scale=augment.crop_scale, antialias=True))
        case "pad":
            steps += [_resize_short_side(image_size), v2.RandomCrop(image_size, padding=augment.padding)]
        case "none":
            steps.append(eval_transform(augment, image_size))
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip(augment.flip))
    if augment.color_jitter:
        steps.append(v2.ColorJitter(*[augment.color_jitter] * 3))
    if augment.auto_augment == "trivial":
        steps.append(v2.TrivialAugmentWide())
    elif augment.auto_augment != "none":
        steps.append(v2.AutoAugment(v2.AutoAugmentPolicy(augment.auto_augment)))
    if augment.rand_augment_layers:
        steps.append(_rand_augment(augment))
    if augment.erasing:
        steps.append(v2.RandomErasing(augment.erasing))
    return v2.Compose(steps)


class _NoisyRandAugment(v2.Transform):  # type: ignore[misc]  # torchvision ships no types
    """RandAugment whose magnitude each image draws from a normal distribution, rounded and kept in 0..30."""

    def __init__(self, layers: int, magnitude: int, std: float) -> None:
        super().__init__()
        self._by_magnitude = [v2.RandAugment(layers, m) for m in range(31)]
        self._magnitude, self._std = float(magnitude), std

    def forward(self, image: Tensor) -> Tensor:
        drawn = round(torch.normal(torch.tensor(self._magnitude), self._std).item())
        augmented: Tensor = self._by_magnitude[min(max(drawn, 0), 30)](image)
        return augmented


def _rand_augment(augment: AugmentConfig) -> v2.Transform:
    layers, magnitude, std = (
        augment.rand_augment_layers,
        augment.rand_augment_magnitude,
        augment.rand_augment_magnitude_std,
    )
    return _NoisyRandAugment(layers, magnitude, std) if std else v2.RandAugment(layers, magnitude)


def eval_transform(augment: AugmentConfig, image_size: int) -> v2.Transform:
    """uint8 (C, any, any) -> uint8 (C, S, S): shorter side to S / eval_crop_ratio, centre crop."""
    return v2.Compose([_resize_short_side(round(image_size / augment.eval_crop_ratio)), v2.CenterCrop(image_size)])


def _resize_short_side(size: int) -> v2.Transform:
    return v2.Resize(size, antialias=True)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (B, C, S, S) -> float32 (B, C, S, S) on the same device: (x / 255 - mean) / std by channel."""
    mean_c11 = torch.tensor(mean, device=images.device).view(-1, 1, 1)
    std_c11 = torch.tensor(std, device=images.device).view(-1, 1, 1)
    return (images.float() / 255 - mean_c11) / std_c11
