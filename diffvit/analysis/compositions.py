"""Pictures of which it is known where the object is, made of the data itself: an object on clutter.

Photographs of objects have them in the middle. So the middle of one image is taken for its object and pasted on a
background of patches of the batch's *other* images, each from a random place; what belongs to the object is then known
to the patch, without anyone having drawn boxes. The object lands near the middle more often than at the edge, as
objects do. Attention outside of it is attention to clutter.

Letters: B images, C channels, S image side, P patches of a side, Q patches of a side of the object.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Compositions:
    """Attributes:
    images: uint8 (B, C, S, S).
    inside: (B, P P), True for the patches of the object.
    """

    images: npt.NDArray[np.uint8]
    inside: npt.NDArray[np.bool_]


def compose(images_BCSS: npt.NDArray[np.uint8], patch_size: int, seed: int, object_share: float = 0.5) -> Compositions:
    """One composition of each image, on clutter of the others; a function of its arguments alone.

    Args:
        images_BCSS: uint8, two images or more.
        patch_size: side of a patch in pixels; objects and clutter keep to the grid of patches.
        seed: of the places and of the clutter.
        object_share: side of the object over that of the image, rounded to patches; 1 to P - 1 of them.

    Raises:
        ValueError: fewer than two images, or fewer than 2 x 2 patches.
    """
    B, _, S, _ = images_BCSS.shape
    P = S // patch_size
    if B < 2:
        raise ValueError(f"compositions need at least 2 images, the clutter is made of the others; got {B}")
    if P < 2 or S % patch_size:
        raise ValueError(f"the side must be 2 or more whole patches of {patch_size} pixels, got {S} pixels")
    Q = min(max(round(object_share * P), 1), P - 1)
    generator = np.random.default_rng(seed)
    composed = _clutter(images_BCSS, patch_size, generator)
    inside = np.zeros((B, P, P), np.bool_)
    middle = (S - Q * patch_size) // 2
    for place, image in enumerate(images_BCSS):
        # half the sum of two draws is a triangle, highest in the middle; halves are rounded up or down by a coin
        row, column = (generator.integers(0, P - Q + 1, (2, 2)).sum(0) + generator.integers(0, 2, 2)) // 2
        side = Q * patch_size
        top, left = row * patch_size, column * patch_size
        composed[place, :, top : top + side, left : left + side] = image[
            :, middle : middle + side, middle : middle + side
        ]
        inside[place, row : row + Q, column : column + Q] = True
    return Compositions(composed, inside.reshape(B, P * P))


def _clutter(images: npt.NDArray[np.uint8], patch_size: int, generator: np.random.Generator) -> npt.NDArray[np.uint8]:
    """(B, C, S, S): every patch from a random place of a random other image, at any pixel and not on the grid."""
    B, C, S, _ = images.shape
    P = S // patch_size
    # 1 to B - 1 further on, so that no image is its own clutter
    source = (np.arange(B)[:, None, None] + generator.integers(1, B, (B, P, P))) % B
    tops, lefts = generator.integers(0, S - patch_size + 1, (2, B, P, P))
    within = np.arange(patch_size)
    rows = tops[..., None, None] + within[:, None]
    columns = lefts[..., None, None] + within[None, :]
    patches = images[source[..., None, None], :, rows, columns]  # (B, P, P, patch, patch, C)
    return np.ascontiguousarray(patches.transpose(0, 5, 1, 3, 2, 4).reshape(B, C, S, S))
