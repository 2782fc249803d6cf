"""From encoded bytes to the model's input: decode, augment, crop. Nothing here knows of Ray or of files.

Images stay uint8 until they reach the device (`normalize`), so that what travels between processes is a quarter of
the float32 size. Letters: C channels, S side of the model's input.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision import io as tv_io
from torchvision.transforms import v2

from diffvit.config import AugmentConfig
from diffvit.data.rand_augment import RandAugment

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
"""The only ones of PIL's that are tried: others start programs (Ghostscript for EPS) on what a stranger wrote.
PIL's JPEG reader takes MPO too."""
_LARGEST_RESIZED_PIXELS = 50_000_000
_JPEG_MAGIC = b"\xff\xd8\xff"
_TIFF_BITS = 258
"""TIFF's number for the bits of a sample."""
_TORCHVISION_PLACE = re.compile(r"^\w+, [^,]+:[0-9]+, ")
"""Where torchvision's errors were raised, on the machine that it was built on: "decode_jpeg, FILE.cpp:LINE, reason"."""
_PHOTO_MEAN, _PHOTO_STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
"""ImageNet's by channel, in grey levels."""


class ImageError(ValueError):
    """An image that cannot be used, with the reason."""


def decode_image(encoded: bytes, channels: int, max_pixels: int) -> Tensor:
    """The picture as people see it: EXIF rotation applied, alpha on white, other depths in 8 bits, first frame only.

    Args:
        encoded: the bytes of a file that PIL reads.
        channels: 1 for grey, 3 for RGB (grey is replicated).
        max_pixels: the largest width x height to decode; checked in the header, before any pixel is.

    Returns:
        uint8 (channels, height, width).

    Raises:
        ImageError: not an image of FORMATS, truncated, larger than `max_pixels`, or of numbers that are no pixels.
    """
    with _opened(encoded, max_pixels) as image:
        if encoded.startswith(_JPEG_MAGIC) and image.mode in ("L", "RGB"):
            return _decode_jpeg(encoded, channels)
        picture = _upright(image)
        if picture.mode in ("LA", "RGBA"):
            rgba = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        picture = picture.convert("L" if channels == 1 else "RGB")
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        return pixels.view(picture.height, picture.width, channels).permute(2, 0, 1)


def read_picture(encoded: bytes, max_pixels: int) -> tuple[Image.Image, str]:
    """The picture upright, with 8 bits a channel, as L, LA, RGB or RGBA; and its format as PIL calls it.

    Raises:
        ImageError: as `decode_image`.
    """
    with _opened(encoded, max_pixels) as image:
        return _upright(image), str(image.format)


@contextmanager
def _opened(encoded: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """The image before its pixels are decoded; what the body then meets is an ImageError."""
    with warnings.catch_warnings():
        # max_pixels replaces PIL's own bound, and torchvision's deprecation concerns us and not the user
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise ImageError(str(error)) from None
        except UnidentifiedImageError:  # whose text has an address, another one each time
            raise ImageError(f"not a readable image: none of {', '.join(FORMATS)}") from None
        except MemoryError:  # the machine's fault and not the image's
            raise
        except Exception as error:  # PIL's plug-ins raise whatever their parsers do
            raise ImageError(f"not a readable image: {error}") from None
        if image.width * image.height > max_pixels:
            raise ImageError(f"{image.width} x {image.height} pixels, more than max_pixels = {max_pixels}")
        try:
            yield image
        except (MemoryError, ImageError):
            raise
        except Exception as error:  # as above
            raise ImageError(f"does not decode: {error}") from None


def _decode_jpeg(encoded: bytes, channels: int) -> Tensor:
    mode = tv_io.ImageReadMode.GRAY if channels == 1 else tv_io.ImageReadMode.RGB
    data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    try:
        decoded: Tensor = tv_io.decode_jpeg(data, mode=mode, apply_exif_orientation=True)
    except RuntimeError as error:
        raise ImageError(f"does not decode: {_TORCHVISION_PLACE.sub('', str(error))}") from None
    return decoded


def _upright(image: Image.Image) -> Image.Image:
    """EXIF rotation applied, and whatever PIL's mode is turned into L, LA, RGB or RGBA."""
    bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS)  # which a turned copy lacks
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        return _in_eight_bits(image, {1: 255.0, 255: 1.0})
    if image.mode.startswith("I"):  # PIL's own conversion would clip at 255
        largest = 4095 if bits == (12,) else 65_535
        grey = _in_eight_bits(image, {largest: 255 / largest})
        if image.has_transparency_data:
            seen = np.asarray(image) != image.info["transparency"]
            grey.putalpha(Image.fromarray(seen.astype(np.uint8) * 255))
        return grey
    if image.has_transparency_data:
        return image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _in_eight_bits(image: Image.Image, scales: dict[int, float]) -> Image.Image:
    """To grey; `scales` has what to multiply by, by the largest value that a pixel may then have."""
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    scale = next((scale for bound, scale in scales.items() if 0 <= low <= high <= bound), None)
    if scale is None:
        ranges = " or ".join(f"0 to {bound}" for bound in scales)
        raise ImageError(f"pixels from {low:g} to {high:g}, expected {ranges}")
    return Image.fromarray((pixels * scale + 0.5).astype(np.uint8))


def train_transform(augment: AugmentConfig, image_size: int) -> v2.Transform:
    """uint8 (C, any, any) -> uint8 (C, S, S), drawing from torch's global generator, which the caller seeds."""
    steps: list[v2.Transform] = []
    match augment.crop:
        case "inception" | "inception_tf":
            crop = v2.RandomResizedCrop if augment.crop == "inception" else _TensorFlowCrop
            interpolation = v2.InterpolationMode(augment.interpolation)
            steps.append(crop(image_size, scale=augment.crop_scale, interpolation=interpolation, antialias=True))
        case "pad":
            steps += [_ResizeShortSide(augment, image_size), v2.RandomCrop(image_size, padding=augment.padding)]
        case "none":
            steps.append(eval_transform(augment, image_size))
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip(augment.flip))
    if augment.color_jitter:
        steps.append(v2.ColorJitter(*[augment.color_jitter] * 3))
    if augment.auto_augment == "trivial":
        steps.append(v2.TrivialAugmentWide(fill=augment.policy_fill))
    elif augment.auto_augment != "none":
        steps.append(v2.AutoAugment(v2.AutoAugmentPolicy(augment.auto_augment), fill=augment.policy_fill))
    if augment.rand_augment_layers:
        steps.append(RandAugment(augment))
    if augment.erasing:
        erase = v2.RandomErasing if augment.erasing_fill == "black" else _NoiseErasing
        steps.append(erase(augment.erasing))
    return v2.Compose(steps)


class _TensorFlowCrop(v2.RandomResizedCrop):  # type: ignore[misc]  # torchvision ships no types
    """The Inception crop as TensorFlow's `sample_distorted_bounding_box` draws it, which Big Vision uses.

    For a proportion drawn from 0.75 to 1.33 every height is equally likely that gives an allowed area, where
    torchvision draws the area: small crops come more often.
    """

    def make_params(self, flat_inputs: list[Tensor]) -> dict[str, Any]:
        height, width = v2.functional.get_size(flat_inputs[0])
        least, most = (share * height * width for share in self.scale)
        for _ in range(100):
            proportion = torch.empty(()).uniform_(0.75, 1.33).item()
            low = round((least / proportion) ** 0.5)
            high = min(round((most / proportion) ** 0.5), height, int((width + 0.5) / proportion))
            rows = _between(min(low, high), high)
            columns = round(rows * proportion)
            if rows > 0 and 0 < columns <= width and least <= rows * columns <= most:
                top, left = _between(0, height - rows), _between(0, width - columns)
                return {"top": top, "left": left, "height": rows, "width": columns}
        return {"top": 0, "left": 0, "height": height, "width": width}


def _between(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


class _NoiseErasing(v2.RandomErasing):  # type: ignore[misc]
    """Random erasing with noise that is about N(0, 1) after ImageNet's normalisation, as timm's `pixel` mode.

    Only about, because a pixel stays within 0 and 255.
    """

    def make_params(self, flat_inputs: list[Tensor]) -> dict[str, Any]:
        params: dict[str, Any] = super().make_params(flat_inputs)
        if params["v"] is not None:
            channels = flat_inputs[0].shape[0]
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_PHOTO_MEAN, _PHOTO_STD))
            if channels != 3:
                mean, std = mean.mean(), std.mean()
            noise = torch.randn(channels, params["h"], params["w"])
            params["v"] = (mean + std * noise).clamp_(0, 255).to(torch.uint8)
        return params


def eval_transform(augment: AugmentConfig, image_size: int) -> v2.Transform:
    """uint8 (C, any, any) -> uint8 (C, S, S): shorter side to S / eval_crop_ratio, centre crop."""
    side = round(image_size / augment.eval_crop_ratio)
    return v2.Compose([_ResizeShortSide(augment, side), v2.CenterCrop(image_size)])


class _ResizeShortSide(v2.Resize):  # type: ignore[misc]  # torchvision ships no types
    """Refuses a strip so narrow that its long side would fill the memory."""

    def __init__(self, augment: AugmentConfig, size: int) -> None:
        super().__init__(size, interpolation=v2.InterpolationMode(augment.interpolation), antialias=True)
        self._short_side = size

    def check_inputs(self, flat_inputs: list[Any]) -> None:
        short, long = sorted(v2.functional.get_size(flat_inputs[0]))
        if self._short_side * self._short_side * long > _LARGEST_RESIZED_PIXELS * short:
            raise ImageError(
                f"{long} x {short} pixels, too narrow to be resized to {self._short_side} on its short side"
            )


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, C, S, S) -> float32 (B, C, S, S) on the same device: (x / 255 - mean) / std by channel."""
    return (images.float() / 255 - _by_channel(tuple(mean), images.device)) / _by_channel(tuple(std), images.device)


@lru_cache
def _by_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1), made once: a tensor made of numbers goes to a GPU by a copy that waits for all its work."""
    with torch.inference_mode(False):  # for whoever asks next
        return torch.tensor(values, device=device).view(-1, 1, 1)
