"""A trained model in the layouts of others. Written beside `out` and renamed, so that `out` is whole or not there.

<out>/model.safetensors, config.json   for timm (`diffvit.models.timm_layout`)
<out>/model.onnx                       for ONNX runtimes (`diffvit.models.onnx_layout`)
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from diffvit.config import ExportConfig
from diffvit.manifest import WEIGHTS_NAME
from diffvit.models.onnx_layout import largest_difference, require_onnx, write_onnx
from diffvit.models.saved import SavedModel, load_saved
from diffvit.models.timm_layout import timm_config, timm_weights

CONFIG_NAME = "config.json"
ONNX_NAME = "model.onnx"


@dataclass(frozen=True)
class Exported:
    """What was written; `onnx_difference` to the model's logits, None where it was not looked at."""

    folder: Path
    files: tuple[str, ...]
    onnx_difference: float | None = None


def export(config: ExportConfig) -> Exported:
    """Write the model of `config.checkpoint` in every layout that `config.format` names.

    Raises:
        ValueError: `out` exists, the checkpoint cannot be used, a package is missing, or a layout has no words for the
            model.
        OnnxMismatch: the ONNX file does not compute what the model does.
    """
    out = Path(config.out).expanduser().absolute()
    if os.path.lexists(out):
        raise ValueError(f"out must not exist, got {config.out!r}; choose another --out, or delete it")
    if "onnx" in config.format:
        require_onnx()
    saved = load_saved(config.checkpoint)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        exported = _write(saved, config, unfinished, out)
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    return exported


def _write(saved: SavedModel, config: ExportConfig, folder: Path, out: Path) -> Exported:
    difference = None
    if "timm" in config.format:
        try:
            save_file(timm_weights(saved.model), folder / WEIGHTS_NAME, metadata={"format": "pt"})
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(f"{out.parent} cannot be written: {error}") from None
        (folder / CONFIG_NAME).write_text(json.dumps(timm_config(saved), indent=2) + "\n")
    if "onnx" in config.format:
        write_onnx(saved, folder / ONNX_NAME)
        difference = largest_difference(saved, folder / ONNX_NAME)
    return Exported(out, tuple(sorted(path.name for path in folder.iterdir())), difference)
