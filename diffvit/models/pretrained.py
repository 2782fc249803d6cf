"""What a run that starts from weights takes over from the model they are of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from diffvit.config import ModelConfig
from diffvit.manifest import MANIFEST_NAME
from diffvit.models.convert import differential_heads
from diffvit.models.fetched import on_disk
from diffvit.models.origin import TIMM_MODELS, Origin, origin_by_name, origin_of_manifest
from diffvit.models.weights import HUB, find_checkpoint


class UnknownOriginError(ValueError):
    """Weights say nothing of their model."""


def origin_of(source: str) -> Origin:
    """What is known of the model whose weights `source` holds.

    Args:
        source: a run or a checkpoint, or a file, a hub name or a URL that contains one of timm's model names.

    Raises:
        UnknownOriginError: `source` says nothing of its model.
        ValueError: it is not there, or its store is away.
    """
    if not source.startswith(HUB):
        with on_disk(source, only=MANIFEST_NAME) as path:
            found = _origin_at(path, source)
        if found is not None:
            return found
    origin = origin_by_name(source)
    if origin is None:
        raise UnknownOriginError(
            f"{source!r} says nothing of its model's shape; give the file one of these names, before a dot: "
            f"{', '.join(TIMM_MODELS)}; or use pretrain.py with --init.weights and the --model options"
        )
    return origin


def model_from(origin: Origin, variant: str = "") -> ModelConfig:
    """The shape of a model that goes on from these weights on other classes: as `variant`, with the trained positions.

    Raises:
        ValueError: a plain ViT with an odd number of heads cannot become V1.
    """
    model = dataclasses.replace(origin.model, num_classes=0, position_grid=origin.position_grid)
    match variant:
        case "diff" | "diff_v2" if model.variant == "softmax":
            heads = differential_heads(model.num_heads, variant)
            model = dataclasses.replace(model, variant=variant, num_heads=heads)
    return model


def _origin_at(path: Path, source: str) -> Origin | None:
    """That of a run or a checkpoint; None of a file."""
    if path.is_dir():
        checkpoint = find_checkpoint(path)
        try:
            manifest = json.loads((checkpoint / MANIFEST_NAME).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"checkpoint {checkpoint} is damaged: {MANIFEST_NAME} cannot be read ({error})") from None
        return origin_of_manifest(manifest, checkpoint)
    if not path.exists():
        raise ValueError(
            f"init.weights {source!r} does not exist; it must be a run, a checkpoint, a .safetensors file or {HUB}NAME "
            "(a run that began from it goes on by --config of its config.json)"
        )
    if not path.is_file():
        raise ValueError(f"init.weights must be a run, a checkpoint, a .safetensors file or {HUB}NAME, got {source!r}")
    return None
