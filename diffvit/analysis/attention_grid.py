"""A picture of what the last block attends to, on a few images: both softmax maps and their difference.

Letters: B images, P patches of a side, S image side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from diffvit.config import RunConfig
from diffvit.data.images import normalize
from diffvit.models.attention import AttentionMaps
from diffvit.models.vit import VisionTransformer

_CELL_INCHES = 1.1
T = TypeVar("T")

_DIFFERENCE = "A1 − λ A2"


@torch.no_grad()
def attention_figure(model: VisionTransformer, images: npt.NDArray[np.uint8], config: RunConfig) -> Figure:
    """One column an image, one row a map of the last block, averaged over heads.

    A cell shows how much the class token (with pool='avg': the mean of all patches) attends to each patch. The maps
    A1 and A2 share a colour scale in a column; in their difference white is zero and blue is negative attention.

    Args:
        model: evaluated in eval mode and left as it was.
        images: (B, C, S, S), as the data pipeline gives them.
        config: for the model's pooling and patch grid, and the data's mean and standard deviation.
    """
    rows = _rows(_watched(model, images, config, model.attention_maps)[-1], config)
    figure = Figure(figsize=(_CELL_INCHES * (len(images) + 0.5), _CELL_INCHES * (len(rows) + 1)), dpi=90)
    axes = figure.subplots(len(rows) + 1, 1)
    axes[0].imshow(_strip(images.transpose(0, 2, 3, 1) / 255), cmap="gray", vmin=0, vmax=1)
    axes[0].set_ylabel("image")
    highest = torch.stack([maps for label, maps in rows.items() if label != _DIFFERENCE]).amax(dim=(0, 2, 3))
    for axis, (label, maps) in zip(axes[1:], rows.items(), strict=True):
        signed = label == _DIFFERENCE
        scale = maps.abs().amax(dim=(1, 2)) if signed else highest
        scaled = (maps / scale[:, None, None]).numpy()[..., None]
        scaled = scaled.repeat(config.model.patch_size, axis=1).repeat(config.model.patch_size, axis=2)
        axis.imshow(_strip(scaled), cmap="RdBu_r" if signed else "viridis", vmin=-1 if signed else 0, vmax=1)
        axis.set_ylabel(label)
    for axis in axes:
        axis.set(xticks=[], yticks=[], frame_on=False)
    figure.subplots_adjust(left=0.3 / len(images), right=1, bottom=0, top=1, hspace=0.05)
    return figure


def _strip(cells: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(B, S, S, C) side by side with blank gaps: (S, width), or (S, width, 3) of colour images."""
    side, _, channels = cells.shape[1:]
    blank = np.full((side, side // 14 + 1, channels), np.nan if channels == 1 else 1.0)
    strip = np.concatenate([part for cell in cells for part in (cell, blank)][:-1], axis=1)
    return strip[..., 0] if channels == 1 else strip


@torch.no_grad()
def mean_gates(model: VisionTransformer, images: npt.NDArray[np.uint8], config: RunConfig) -> list[float]:
    """`VisionTransformer.mean_gates` of images as the data pipeline gives them, (B, C, S, S)."""
    return _watched(model, images, config, model.mean_gates)


def _watched(
    model: VisionTransformer, images: npt.NDArray[np.uint8], config: RunConfig, look: Callable[[Tensor], list[T]]
) -> list[T]:
    """What `look` sees of the images in the model's eval mode."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    pixels = normalize(torch.from_numpy(images).to(device), config.data.mean, config.data.std)
    seen = look(pixels)
    model.train(was_training)
    return seen


def _rows(maps: AttentionMaps, config: RunConfig) -> dict[str, Tensor]:
    """`{label: (B, P, P)}` of a block, the mean over heads."""
    named = {"A1": maps.positive}
    if maps.negative is not None:
        named |= {"A2": maps.negative, _DIFFERENCE: maps.combined}
    return {label: _over_patches(attention, config) for label, attention in named.items()}


def _over_patches(attention: Tensor, config: RunConfig) -> Tensor:
    """(B, H, N, N) -> (B, P, P): what the pooled token sees of each patch."""
    side = config.model.image_size // config.model.patch_size
    prefix = attention.shape[-1] - side * side
    mean_over_heads = attention.float().mean(dim=1)
    query = mean_over_heads[:, 0] if config.model.pool == "token" else mean_over_heads[:, prefix:].mean(dim=1)
    return query[:, prefix:].reshape(-1, side, side).cpu()
