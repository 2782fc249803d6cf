"""The shape of a model whose weights lie somewhere: our checkpoints say it themselves, timm's names are known here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from diffvit.config import ModelConfig, model_preset
from diffvit.manifest import MANIFEST_NAME
from diffvit.models.fetched import on_disk
from diffvit.models.weights import HUB, find_checkpoint

_MODEL = TypeAdapter(ModelConfig)

_SBB: dict[str, Any] = {
    "variant": "diff",
    "image_size": 256,
    "mlp_ratio": 5,
    "init_values": 1e-5,
    "class_token": False,
    "no_embed_class": True,
    "reg_tokens": 1,
    "pool": "avg",
}
TIMM_MODELS: dict[str, ModelConfig] = {
    "vit_dwee_patch16_reg1_gap_256": ModelConfig(**_SBB, embed_dim=256, depth=14, num_heads=4),
    "vit_dlittle_patch16_reg1_gap_256": ModelConfig(**{**_SBB, "mlp_ratio": 5.6}, embed_dim=320, depth=14, num_heads=5),
    "vit_tiny_patch16_224": model_preset("tiny", "softmax"),
    "vit_small_patch16_224": model_preset("small", "softmax"),
    "vit_base_patch16_224": model_preset("base", "softmax"),
}
"""timm's names: the Diff-ViTs trained on ImageNet (81.80 and 83.24 % top-1 as timm reports), and plain ViTs."""


def shape_of(source: str) -> ModelConfig:
    """The config of the model whose weights `source` holds, without its number of classes.

    Args:
        source: a run or a checkpoint, or a file, a hub name or a URL that contains one of timm's model names.

    Raises:
        ValueError: `source` says nothing of its model.
    """
    if source.startswith(HUB):
        return _known_shape(source)
    with on_disk(source, only=MANIFEST_NAME) as path:
        return _shape_at(path, source)


def _shape_at(path: Path, source: str) -> ModelConfig:
    if path.is_dir():
        manifest = find_checkpoint(path) / MANIFEST_NAME
        try:
            model = _MODEL.validate_json(json.dumps(json.loads(manifest.read_text())["model"]))
        except (ValidationError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{manifest} is damaged or of another version: {error}") from None
        return dataclasses.replace(model, num_classes=0)
    if not path.is_file():
        raise ValueError(f"init.weights must be a run, a checkpoint, a .safetensors file or {HUB}NAME, got {source!r}")
    return _known_shape(source)


def _known_shape(source: str) -> ModelConfig:
    for name, config in TIMM_MODELS.items():
        if name in source:
            return config
    raise ValueError(
        f"{source!r} says nothing of its model's shape; name the file after one of {', '.join(TIMM_MODELS)}, "
        "or use pretrain.py with --init.weights and the --model options"
    )
