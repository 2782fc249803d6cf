"""Images of noise that stand in for a data set that is not there yet: as many, and as long to decode and to augment.

It is taken to be the well-known set that has images of the model's size, or Flowers102 where there are as many classes.
Nothing is fetched. A few images are encoded once and shown over and over.
"""

from __future__ import annotations

import bisect
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffvit.config import ModelConfig, RunConfig
from diffvit.data.datasets import Dataset, open_dataset
from diffvit.data.order import Indices
from diffvit.storage import Storage, absolute

_DIFFERENT_IMAGES = 16
_BEST_QUALITY = 95


@dataclass(frozen=True)
class ImageKind:
    """What an image costs to read and to decode. `bytes`: how long it is, encoded (JPEG; PNG gets what it gets)."""

    width: int
    height: int
    format: str
    mode: str
    bytes: int


@dataclass(frozen=True)
class KnownSet:
    """A public data set, as it is usually stored."""

    name: str
    train: int
    val: int
    classes: int
    kind: ImageKind


FASHION_MNIST = KnownSet("Fashion-MNIST", 60_000, 10_000, 10, ImageKind(28, 28, "PNG", "L", 500))
CIFAR10 = KnownSet("CIFAR-10", 50_000, 10_000, 10, ImageKind(32, 32, "PNG", "RGB", 2_400))
FLOWERS = KnownSet("Flowers102", 1_020, 1_020, 102, ImageKind(667, 500, "JPEG", "RGB", 42_000))
IMAGENET = KnownSet("ImageNet-1k", 1_281_167, 50_000, 1000, ImageKind(500, 375, "JPEG", "RGB", 115_000))
"""500 x 375 is its commonest size; 115 kB are its training tar's 147,897,477,120 bytes by its number of images."""


@dataclass(frozen=True)
class SyntheticSplit:
    """`diffvit.data.datasets.Split` whose image i is `images[i % len(images)]`."""

    labels: npt.NDArray[np.int64]
    images: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        return f"synthetic/{index:08d}"

    def read_many(self, indices: Indices) -> Iterator[bytes]:
        return (self.images[index % len(self.images)] for index in indices.tolist())


def rehearsal_data(config: RunConfig) -> tuple[Dataset, str]:
    """The run's own data where it is there, else a synthetic one in its place; and a line that says what it is like.

    Raises:
        ValueError: what lies at `data.path` cannot be used.
        StorageError: the object store is away.
    """
    real = _find(config)
    if real is not None:
        return real, f"{len(real.train):,} and {len(real.val):,} of {config.data.path}"
    known = _known_set(config.model)
    classes = config.data.classes or tuple(map(str, range(config.model.num_classes or known.classes)))
    images = tuple(encode_noise(known.kind, (config.seed, number)) for number in range(_DIFFERENT_IMAGES))
    train, val = (SyntheticSplit(np.arange(count) % len(classes), images) for count in (known.train, known.val))
    kind, length = known.kind, round(float(np.mean([len(image) for image in images])))
    return Dataset(classes, train, val), (
        f"{known.train:,} and {known.val:,} of noise, like {known.name} (there is no data at data.path = "
        f"{config.data.path!r}): {kind.format}, {kind.width} x {kind.height} px and {length:,} bytes on average, read "
        "from memory, so that a slow disk or object store will not show"
    )


def _find(config: RunConfig) -> Dataset | None:
    """None only where nothing is there: damaged data is no reason to rehearse on noise."""
    try:
        return open_dataset(config.data)
    except ValueError:
        path = config.data.path
        if path and (Path(path).expanduser().is_file() or Storage(absolute(path)).names()):
            raise
        return None


def _known_set(model: ModelConfig) -> KnownSet:
    image_size = model.image_size
    if model.num_classes == FLOWERS.classes:
        return FLOWERS
    if image_size <= FASHION_MNIST.kind.width:
        return FASHION_MNIST
    return CIFAR10 if image_size <= 2 * CIFAR10.kind.width else IMAGENET


def encode_noise(kind: ImageKind, seed: tuple[int, ...]) -> bytes:
    """An image of that kind; a JPEG in the quality that comes nearest to its length."""
    noise = _pink_noise(kind, seed)
    image = Image.fromarray(noise[..., 0] if kind.mode == "L" else noise)

    def encode(quality: int) -> bytes:
        file = io.BytesIO()
        image.save(file, kind.format, quality=quality)
        return file.getvalue()

    if kind.format != "JPEG":
        return encode(0)
    return encode(1 + bisect.bisect_left(range(1, _BEST_QUALITY), kind.bytes, key=lambda quality: len(encode(quality))))


def _pink_noise(kind: ImageKind, seed: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """(height, width, 3): amplitude falls as 1 / frequency, as that of photographs does (Field 1987)."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(kind.height)[:, None], np.fft.rfftfreq(kind.width))
    amplitude = 1 / np.maximum(frequency, 1 / max(kind.width, kind.height))
    phases = np.exp(2j * np.pi * rng.random((4, *frequency.shape)))
    grey, *colours = np.fft.irfft2(amplitude * phases, s=(kind.height, kind.width))
    field = np.stack([grey + 0.3 * colour for colour in colours], axis=-1)
    scaled = 118 + 60 * (field - field.mean()) / field.std()
    pixels: npt.NDArray[np.uint8] = scaled.clip(0, 255).astype(np.uint8)
    return pixels
