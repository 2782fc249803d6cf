"""A picture of what the last block attends to, on a few images: both softmax maps and their difference.

Letters: B images, P patches of a side, S image side.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from diffvit.config import RunConfig
from diffvit.data.images import normalize
from diffvit.models.vit import VisionTransformer

_CELL_INCHES = 1.1


@torch.no_grad()
def attention_figure(model: VisionTransformer, images: npt.NDArray[np.uint8], config: RunConfig) -> Figure:
    """One column an image, one row a map of the last block, averaged over heads.

    A cell shows how much the class token (with pool='avg': the mean of all patches) attends to each patch. The maps
    A1 and A2 share a colour scale in a column; their difference has zero in white, negative attention in blue.

    Args:
        model: evaluated in eval mode and left as it was.
        images: (B, C, S, S), as the data pipeline gives them.
        config: for the model's pooling and patch grid, and the data's mean and standard deviation.
    """
    rows = _rows(model, images, config)
    count = len(images)
    figure = Figure(figsize=(_CELL_INCHES * (count + 1), _CELL_INCHES * (len(rows) + 1)), layout="constrained", dpi=90)
    axes = figure.subplots(len(rows) + 1, count, squeeze=False)
    for column, image in enumerate(images):
        axes[0][column].imshow(image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255)
    axes[0][0].set_ylabel("image")
    top = torch.stack([row for label, row in rows.items() if label != _DIFFERENCE]).amax(dim=(0, 2, 3))
    for axes_row, (label, maps) in zip(axes[1:], rows.items(), strict=True):
        axes_row[0].set_ylabel(label)
        for cell, attention, highest in zip(axes_row, maps, top, strict=True):
            _draw(cell, attention, float(highest), signed=label == _DIFFERENCE)
    for cell in axes.flat:
        cell.set(xticks=[], yticks=[])
    return figure


_DIFFERENCE = "A1 − λ A2"


def _rows(model: VisionTransformer, images: npt.NDArray[np.uint8], config: RunConfig) -> dict[str, Tensor]:
    """`{label: (B, P, P)}` of the last block, the mean over heads."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    pixels = normalize(torch.from_numpy(images).to(device), config.data.mean, config.data.std)
    maps = model.attention_maps(pixels)[-1]
    model.train(was_training)
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


def _draw(cell: Axes, attention: Tensor, highest: float, *, signed: bool) -> None:
    if signed:
        limit = float(attention.abs().max())
        cell.imshow(attention.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    else:
        cell.imshow(attention.numpy(), cmap="viridis", vmin=0, vmax=highest)
