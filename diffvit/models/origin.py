"""What is known of a model whose weights lie somewhere: a checkpoint's manifest says it, timm's names say it here."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from diffvit.config import ModelConfig, model_preset

_MODEL = TypeAdapter(ModelConfig)
_Channels = tuple[float, ...]

_SBB: dict[str, Any] = {
    "image_size": 256,
    "mlp_ratio": 5,
    "init_values": 1e-5,
    "class_token": False,
    "no_embed_class": True,
    "reg_tokens": 1,
    "pool": "avg",
}
_WEE: dict[str, Any] = {**_SBB, "embed_dim": 256, "depth": 14, "num_heads": 4}
_LITTLE: dict[str, Any] = {**_SBB, "embed_dim": 320, "depth": 14, "num_heads": 5, "mlp_ratio": 5.6}
TIMM_MODELS: dict[str, ModelConfig] = {
    "vit_dwee_patch16_reg1_gap_256": ModelConfig("diff", **_WEE),
    "vit_dlittle_patch16_reg1_gap_256": ModelConfig("diff", **_LITTLE),
    "vit_wee_patch16_reg1_gap_256": ModelConfig("softmax", **_WEE),
    "vit_little_patch16_reg1_gap_256": ModelConfig("softmax", **_LITTLE),
    "vit_tiny_patch16_224": model_preset("tiny", "softmax"),
    "vit_small_patch16_224": model_preset("small", "softmax"),
    "vit_base_patch16_224": model_preset("base", "softmax"),
    "vit_tiny_patch16_384": model_preset("tiny", "softmax", image_size=384),
    "vit_small_patch16_384": model_preset("small", "softmax", image_size=384),
    "vit_base_patch16_384": model_preset("base", "softmax", image_size=384),
}
"""timm's names: the Diff-ViTs trained on ImageNet (81.80 and 83.24 % top-1 as timm reports), and plain ViTs."""

_INCEPTION: tuple[_Channels, _Channels] = ((0.5,) * 3, (0.5,) * 3)
IMAGENET_STATISTICS: tuple[_Channels, _Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP: tuple[_Channels, _Channels] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_OTHER_STATISTICS = {".dino": IMAGENET_STATISTICS, ".mae": IMAGENET_STATISTICS, ".bamboo": _CLIP}
"""By timm's tag, which follows the model's name; every other one has Inception's."""


@dataclass(frozen=True)
class Origin:
    """What weights were trained as, and on what."""

    model: ModelConfig
    mean: _Channels = ()
    """Of pixels in [0, 1], by channel; with `std`, what an image is normalised by."""
    std: _Channels = ()
    classes: tuple[str, ...] = ()
    """By label; empty where they are not known."""
    eval_crop_ratio: float = 0.875
    gate_opening: float = 1.0
    """How far the second maps of V2 are let in, 0 to 1."""

    @property
    def position_grid(self) -> int | None:
        """Patches of a side for which sincos2d positions were made; None for learned ones."""
        return None if self.model.pos_embed == "learned" else self.model.position_grid or self.model.grid


def origin_by_name(source: str) -> Origin | None:
    """That of a file, a URL or a hub name that has one of timm's model names, to its end or to timm's tag behind a dot.

    Else of a folder above it. `vit_base_patch16_224_mae` and `samvit_base_patch16_224` are other models.
    """
    for part, (name, model) in itertools.product(reversed(source.split("/")), TIMM_MODELS.items()):
        found = re.search(rf"(?<![a-z0-9]){name}(?:_in21k)?(?=(\.[^.]*)?(\.|$))", part)
        if found:
            mean, std = _OTHER_STATISTICS.get((found[1] or "").partition("_")[0], _INCEPTION)
            return Origin(model, mean, std)
    return None


def origin_of_manifest(manifest: Mapping[str, Any], checkpoint: Path) -> Origin:
    """That of a checkpoint, from its `checkpoint.json`.

    Raises:
        ValueError: the manifest is of another version.
    """
    try:
        model = _MODEL.validate_json(json.dumps(manifest["model"]))
        data = manifest["data"]
        mean, std, classes = tuple(data["mean"]), tuple(data["std"]), tuple(data["classes"])
        crop_ratio, gate_opening = float(data["eval_crop_ratio"]), float(manifest.get("gate_opening", 1.0))
    except (ValidationError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {checkpoint} is of another version of diffvit: {error}") from None
    return Origin(model, mean, std, classes, crop_ratio, gate_opening)
