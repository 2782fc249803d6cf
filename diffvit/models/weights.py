"""Weights from elsewhere: our runs and checkpoints, safetensors, timm's and microsoft/unilm's layouts.

Nothing is unpickled. What does not fit is listed in one error, and the model is then as it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffvit.config import ModelConfig
from diffvit.manifest import MANIFEST_NAME, WEIGHTS_NAME, best_there, read_manifest
from diffvit.models.convert import convert_plain, is_plain
from diffvit.models.fetched import on_disk
from diffvit.models.origin import Origin, origin_by_name, origin_of_manifest
from diffvit.models.vit import VisionTransformer, resample_positions

HUB = "hf-hub:"
_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_UNILM_NAMES = {"out_proj": "proj", "o_proj": "proj", "subln": "sub_norm"}
"""unilm's names of what is not Q, K or V: V1's output projection, V2's, V1's norm."""


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did beyond copying."""

    resampled: tuple[str, ...] = ()
    """Position embeddings brought to the model's grid."""
    replaced: tuple[str, ...] = ()
    """Parameters of the classifier that were left as initialised."""
    converted: bool = False
    """Whether they were a plain ViT's and the model is not."""
    changed: tuple[str, ...] = ()
    """Fields of V1's lambda that the weights were trained with otherwise: the model computes something else."""

    def __str__(self) -> str:
        done = ["converted from a plain ViT"] if self.converted else []
        done += [f"trained with another {name}" for name in self.changed]
        done += ["positions resampled to the model's grid"] if self.resampled else []
        return ", ".join([*done, "a new classifier" if self.replaced else "their own classifier"])


def load_weights(
    model: VisionTransformer,
    source: str | Path | Mapping[str, Tensor],
    *,
    replace_head: bool = False,
    from_plain: bool = False,
    classes: tuple[str, ...] = (),
) -> LoadReport:
    """Load `source` into `model`, with the gates of V2 as far open as they were.

    Args:
        model: changed only if everything fits.
        source: a run's folder (its best checkpoint), a checkpoint's folder or a .safetensors file, each on a disk or
            at an s3:// or gs:// URL; hf-hub:OWNER/NAME (its model.safetensors, where huggingface_hub is installed); or
            a state dict. timm's names are ours; unilm's separate q/k/v projections are joined; positions of another
            grid resampled.
        replace_head: leave the classifier as initialised where the source has one of another size or for other classes,
            or none.
        from_plain: the weights are a start to train from: a plain ViT's are converted where the model is differential
            (`diffvit.models.convert`), and V1's lambda may begin elsewhere, as in a search, which the report tells.
        classes: names of the model's, by label; a source that names others has a classifier for other classes.

    Raises:
        ValueError: `source` is nothing of these, is damaged, or does not fit; every name that does not is listed. Heads
            and fixed positions, which no shape shows, are checked where the source tells them: a checkpoint, or
            timm's name.
    """
    read, origin = _read(source)
    _require_tensors(read)
    weights = join_unilm_projections(dict(read))
    converted = from_plain and model.config.variant != "softmax" and is_plain(weights)
    if converted:
        weights = convert_plain(weights, model, None if origin is None else origin.model.num_heads)
    changed = () if origin is None else _changed_lambda(origin.model, model.config)
    if origin is not None:
        _require_same_function(origin, model, converted, () if from_plain else changed)
    own = model.state_dict()
    resampled = _resample_positions(weights, own, model)
    replaced = []
    if replace_head:
        others = origin is not None and bool(origin.classes and classes) and origin.classes != classes
        replaced = [
            n for n in own if n.startswith("head.") and (others or n not in weights or weights[n].shape != own[n].shape)
        ]
        for name in list(weights):
            if name.startswith("head.") and (name in replaced or name not in own):
                del weights[name]
    _require_fit(weights, own, replaced)
    model.load_state_dict({**own, **weights})
    if origin is not None and not converted:
        model.open_gates(origin.gate_opening)
    return LoadReport(tuple(resampled), tuple(replaced), converted, changed)


def _require_tensors(weights: Mapping[str, object]) -> None:
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            inside = f"; its weights may be those inside: give source[{name!r}]" if isinstance(value, Mapping) else ""
            raise ValueError(
                f"weights must map names of parameters to tensors, got {type(value).__name__} for {name!r}{inside}"
            )


def _read(source: str | Path | Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Origin | None]:
    """Weights, and what is known of them."""
    if isinstance(source, Mapping):
        return source, None
    if str(source).startswith(HUB):
        return _read_safetensors(_download(str(source).removeprefix(HUB))), origin_by_name(str(source))
    with on_disk(source) as path:
        return _read_path(path, str(source))


def _read_path(path: Path, source: str) -> tuple[Mapping[str, Tensor], Origin | None]:
    """`path` is where `source`, which may name a model of timm's, lies on the disk."""
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ValueError(
            f"weights must be a run, a checkpoint folder or a .safetensors file, got {str(path)!r}: not found"
        )
    if path.suffix != ".safetensors":
        hint = "pickled files can run code when read; convert it to safetensors" if path.suffix in _PICKLED else ""
        raise ValueError(f"weights must be a .safetensors file, got {str(path)!r}{'; ' + hint if hint else ''}")
    return _read_safetensors(path), origin_by_name(source)


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint that `folder` is, or the best one of the run that it is; of a run that was cut, of what it has.

    Raises:
        ValueError: it is neither.
    """
    if (folder / "results.json").is_file():
        named = _checkpoint_of_run(folder)
        folder = named if named.exists() else best_there(folder) or named
    elif not (folder / MANIFEST_NAME).is_file():
        folder = best_there(folder) or folder
    if not (folder / MANIFEST_NAME).is_file():
        raise ValueError(f"{folder} is neither a run with a checkpoint nor a checkpoint ({MANIFEST_NAME})")
    return folder


def _read_folder(folder: Path) -> tuple[Mapping[str, Tensor], Origin | None]:
    folder = find_checkpoint(folder)
    manifest = read_manifest(folder)
    if WEIGHTS_NAME not in manifest["sha256"]:
        raise ValueError(f"checkpoint {folder} has no weights: {MANIFEST_NAME} does not name {WEIGHTS_NAME}")
    origin = origin_of_manifest(manifest, folder) if "model" in manifest else None
    return _read_safetensors(folder / WEIGHTS_NAME), origin


def _checkpoint_of_run(run: Path) -> Path:
    """The best checkpoint's folder, else the last one's; relative to the run or absolute."""
    try:
        results = json.loads((run / "results.json").read_text())
        names = [(results.get(which) or {}).get("checkpoint") for which in ("best", "last")]
    except (json.JSONDecodeError, AttributeError):
        raise ValueError(f"run {run} is damaged: results.json cannot be read; give a checkpoint's folder") from None
    name = names[0] or names[1]
    if not name:
        raise ValueError(f"run {run} has saved no checkpoint yet")
    return Path(run, name)


def _download(name: str) -> Path:
    """`model.safetensors` of a model on the Hugging Face hub, in its cache."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ValueError(f"{HUB}{name} needs huggingface_hub: pip install -e '.[timm]'") from None
    try:
        return Path(hf_hub_download(name, WEIGHTS_NAME))
    except Exception as error:  # no network, no such model, no such file: each has a type of its own
        raise ValueError(f"{HUB}{name} cannot be fetched: {error}") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    return tensors


def join_unilm_projections(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn unilm's `q_proj`, `k_proj`, `v_proj` into our `qkv` and its other names into ours; other layouts pass.

    Rows need no reordering: unilm too keeps the two maps of head i at places 2i and 2i + 1, in V1 and in V2.
    Projections that are not three, or not of one width, pass as they are, to be reported.
    """
    joined: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        base = f"{parent}." if parent else ""
        parts = [f"{base}{part}.{kind}" for part in ("q_proj", "k_proj", "v_proj")]
        fit = [part in weights and weights[part].ndim and weights[part].shape[1:] == tensor.shape[1:] for part in parts]
        if name in parts and all(fit):
            joined[f"{base}qkv.{kind}"] = torch.cat([weights[part] for part in parts])
        elif leaf in _UNILM_NAMES:
            joined[f"{base}{_UNILM_NAMES[leaf]}.{kind}"] = tensor
        else:
            joined[name] = tensor
    return joined


def _resample_positions(weights: dict[str, Tensor], own: dict[str, Tensor], model: VisionTransformer) -> list[str]:
    name = "pos_embed"
    if name not in weights or name not in own or weights[name].shape == own[name].shape or weights[name].ndim != 3:
        return []
    prefix = own[name].shape[1] - model.grid**2
    patches = weights[name].shape[1] - prefix
    if weights[name].shape[2] != own[name].shape[2] or math.isqrt(max(patches, 0)) ** 2 != patches:
        return []  # another width or other tokens: reported as not fitting
    weights[name] = resample_positions(weights[name], prefix, (model.grid, model.grid))
    return [name]


def _changed_lambda(was: ModelConfig, now: ModelConfig) -> tuple[str, ...]:
    names = ("lambda_init", "lambda_max") if was.variant == now.variant == "diff" else ()
    return tuple(name for name in names if getattr(was, name) != getattr(now, name))


def _require_same_function(origin: Origin, model: VisionTransformer, converted: bool, changed: tuple[str, ...]) -> None:
    """What the shapes of the weights do not show, but what the model computes depends on."""
    was, config = origin.model, model.config
    if not converted and was.variant == config.variant and was.num_heads != config.num_heads:
        raise ValueError(
            f"the weights are of a model with model.num_heads = {was.num_heads}, got {config.num_heads}: "
            "heads cut otherwise compute something else"
        )
    for name in changed:
        before, now = getattr(was, name), getattr(config, name)
        raise ValueError(
            f"the weights were trained with model.{name} = {before!r}, got {now!r}: that computes something else"
        )
    grid = origin.position_grid
    if grid is not None and config.pos_embed == "sincos2d" and (config.position_grid or config.grid) != grid:
        raise ValueError(
            f"the weights were trained with sincos2d positions for {grid} x {grid} patches: another size "
            f"needs model.position_grid = {grid}, which resamples them, got {config.position_grid} for a grid of "
            f"{config.grid}"
        )


def _require_fit(weights: dict[str, Tensor], own: dict[str, Tensor], replaced: list[str]) -> None:
    def shape(tensor: Tensor) -> str:
        return " x ".join(map(str, tensor.shape)) or "scalar"

    problems = [f"missing: {name} ({shape(own[name])})" for name in own if name not in weights and name not in replaced]
    problems += [f"unexpected: {name} ({shape(tensor)})" for name, tensor in weights.items() if name not in own]
    problems += [
        f"another shape: {name} is {shape(tensor)}, the model's {shape(own[name])}"
        for name, tensor in weights.items()
        if name in own and tensor.shape != own[name].shape
    ]
    problems += [
        f"not floating-point: {name} is {tensor.dtype}; quantised weights need their scales, convert them first"
        for name, tensor in weights.items()
        if name in own and not tensor.is_floating_point()
    ]
    if problems:
        head = any("head." in problem for problem in problems)
        hint = "; replace_head=True keeps the model's own classifier" if head else ""
        raise ValueError("the weights do not fit the model" + hint + ":\n  " + "\n  ".join(problems))
