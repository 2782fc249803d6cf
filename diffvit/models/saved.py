"""A trained model as a checkpoint keeps it: the network, and what must be done to an image before it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torchvision.transforms import v2

from diffvit.config import AugmentConfig, ModelConfig
from diffvit.data.images import decode_image, eval_transform, normalize
from diffvit.manifest import read_manifest
from diffvit.models.fetched import on_disk
from diffvit.models.origin import origin_of_manifest
from diffvit.models.vit import VisionTransformer
from diffvit.models.weights import find_checkpoint, load_weights


@dataclass(frozen=True)
class SavedModel:
    """A model in evaluation mode; `classes` by label, `mean` and `std` by channel of pixels in [0, 1]."""

    model: VisionTransformer
    config: ModelConfig
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_crop_ratio: float
    interpolation: Literal["bilinear", "bicubic"]
    manifest: dict[str, Any]

    @property
    def augment(self) -> AugmentConfig:
        """How its images were resized and cropped to be evaluated."""
        return AugmentConfig(eval_crop_ratio=self.eval_crop_ratio, interpolation=self.interpolation)

    @cached_property
    def transform(self) -> v2.Transform:
        """uint8 (C, any, any) -> uint8 (C, S, S), as the model was evaluated."""
        return eval_transform(self.augment, self.config.image_size)

    def preprocess(self, encoded: bytes, max_pixels: int = 50_000_000) -> Tensor:
        """The model's input (1, C, S, S) of a file's bytes.

        Raises:
            ImageError: no image, or one of more than `max_pixels`.
        """
        pixels = self.transform(decode_image(encoded, self.config.in_channels, max_pixels))
        return normalize(pixels[None], self.mean, self.std)


def load_saved(source: str | Path) -> SavedModel:
    """The model of a run (its best checkpoint) or of a checkpoint's folder, on a disk or at a URL.

    Raises:
        ValueError: `source` is neither, is damaged, or of another version.
    """
    with on_disk(source) as found:
        return _load(find_checkpoint(found))


def _load(folder: Path) -> SavedModel:
    manifest = read_manifest(folder)
    origin = origin_of_manifest(manifest, folder)
    model = VisionTransformer(origin.model)
    load_weights(model, folder)
    interpolation = manifest["data"].get("interpolation", "bilinear")  # earlier checkpoints know no other
    return SavedModel(
        model=model.eval(),
        config=origin.model,
        classes=origin.classes,
        mean=origin.mean,
        std=origin.std,
        eval_crop_ratio=origin.eval_crop_ratio,
        interpolation=interpolation,
        manifest=manifest,
    )
