"""A trained model for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffvit.config.checks import require


@dataclass(frozen=True)
class ExportConfig:
    """Which model, and in which layouts."""

    checkpoint: str = ""
    """A run's folder (its best checkpoint) or a checkpoint's."""
    out: str = ""
    """The folder that is made; it must not exist."""
    format: tuple[Literal["timm", "onnx"], ...] = ("timm",)
    """timm: model.safetensors and config.json, as timm.create_model("local-dir:OUT", pretrained=True) loads them; onnx:
    model.onnx, which needs diffvit[export]."""

    def __post_init__(self) -> None:
        require(bool(self.checkpoint), "checkpoint is missing: a run's folder or a checkpoint's (--checkpoint FOLDER)")
        require(bool(self.out), "out is missing: the folder that receives the model (--out FOLDER)")
        require("://" not in self.out, f"out must be a local folder, got {self.out!r}")
        require(bool(self.format), "format must name at least one of timm, onnx")
