"""A trained model as a checkpoint keeps it: the network, and what must be done to an image before it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from diffvit.config import ModelConfig
from diffvit.manifest import read_manifest
from diffvit.models.fetched import on_disk
from diffvit.models.vit import VisionTransformer
from diffvit.models.weights import find_checkpoint, load_weights

_MODEL = TypeAdapter(ModelConfig)


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


def load_saved(source: str | Path) -> SavedModel:
    """The model of a run (its best checkpoint) or of a checkpoint's folder, on a disk or at a URL.

    Raises:
        ValueError: `source` is neither, is damaged, or of another version.
    """
    with on_disk(source) as found:
        return _load(find_checkpoint(found))


def _load(folder: Path) -> SavedModel:
    manifest = read_manifest(folder)
    try:
        config = _MODEL.validate_json(json.dumps(manifest["model"]))
        data = manifest["data"]
        found = (tuple(data["classes"]), tuple(data["mean"]), tuple(data["std"]), float(data["eval_crop_ratio"]))
        interpolation = data.get("interpolation", "bilinear")  # earlier checkpoints know no other
    except (ValidationError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {folder} is of another version of diffvit: {error}") from None
    model = VisionTransformer(config)
    load_weights(model, folder)
    return SavedModel(model.eval(), config, *found, interpolation, manifest)
