"""Boxes that someone drew around the objects of validation images, and where they lie in what a model sees of them.

The file is CSV with a header that names at least `key,x0,y0,x1,y1`. A key is an image's in the data set (a path below
an image folder, the `key` of shards); the corners are pixels of the image as it is stored there, turned as EXIF says,
with 0, 0 at the top left, so that the whole of it is 0, 0, width, height. A key may have several lines: its object is
all of their boxes together.

Letters: C channels, S image side.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision import tv_tensors

from diffvit.config import RunConfig
from diffvit.data.datasets import Split
from diffvit.data.images import ImageError, decode_image, eval_transform
from diffvit.data.order import DRAW

_CORNERS = ("x0", "y0", "x1", "y1")


@dataclass(frozen=True)
class Box:
    """Corners (x0, y0, x1, y1), and the line that says so."""

    corners: tuple[float, float, float, float]
    line: int


@dataclass(frozen=True)
class BoxedImage:
    """What a model sees of an image, uint8 (C, S, S), and which pixels of it lie in a box, bool (S, S).

    All pixels are outside where the crop has cut the boxes off, or where the image cannot be read.
    """

    pixels: npt.NDArray[np.uint8]
    inside: npt.NDArray[np.bool_]


class BoxedSplit:
    """The images of a split that have boxes.

    Raises:
        ValueError: not such a file, with the number of the line.
    """

    def __init__(self, path: str, split: Split) -> None:
        self.path, self._split = path, split
        self._boxes = _read(Path(path).expanduser(), split)

    def __len__(self) -> int:
        return len(self._boxes)

    @property
    def images_in_split(self) -> int:
        """With boxes or without."""
        return len(self._split)

    def images(self, config: RunConfig, shuffle_seed: int | None = None) -> Iterator[BoxedImage]:
        """Every one of them, as a model of `config` is evaluated on it; in the split's order, or as a seed draws it.

        Raises:
            ValueError: a box that is not within its image.
        """
        model = config.model
        transform = eval_transform(config.augment, model.image_size)
        indices = np.array(sorted(self._boxes), np.int64)
        if shuffle_seed is not None:
            indices = np.random.default_rng((shuffle_seed, DRAW)).permutation(indices)
        for index, encoded in zip(indices.tolist(), self._split.read_many(indices), strict=True):
            try:
                if isinstance(encoded, OSError):
                    raise encoded
                picture = decode_image(encoded, model.in_channels, config.data.max_pixels)
            except (ImageError, OSError):
                sides = (model.image_size, model.image_size)
                yield BoxedImage(np.zeros((model.in_channels, *sides), np.uint8), np.zeros(sides, np.bool_))
                continue
            seen, boxes = transform(picture, self._within(picture, index))
            yield BoxedImage(seen.numpy(), _pixels_inside(boxes, model.image_size))

    def _within(self, picture: Tensor, index: int) -> tv_tensors.BoundingBoxes:
        height, width = picture.shape[-2:]
        for box in self._boxes[index]:
            if box.corners[2] > width or box.corners[3] > height:
                raise ValueError(
                    f"{self.path}, line {box.line}: a box must lie within its image, got {_listed(box.corners)} in "
                    f"{self._split.key(index)!r} of {width} x {height} pixels"
                )
        corners = torch.tensor([box.corners for box in self._boxes[index]], dtype=torch.float64)
        return tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width))


def _read(path: Path, split: Split) -> dict[int, list[Box]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"boxes must be a CSV file, {str(path)!r} cannot be read: {error}") from None
    lines = csv.DictReader(io.StringIO(text, newline=""))
    missing = [name for name in ("key", *_CORNERS) if name not in (lines.fieldnames or ())]
    if missing:
        raise ValueError(f"{path}, line 1: a header must name key,{','.join(_CORNERS)}; it lacks {', '.join(missing)}")
    indices = {split.key(index): index for index in range(len(split))}
    boxes: dict[int, list[Box]] = {}
    for row in lines:
        where = f"{path}, line {lines.line_num}"
        if row["key"] not in indices:
            raise ValueError(
                f"{where}: no validation image has the key {row['key']!r}; one that there is: {next(iter(indices))!r}"
            )
        boxes.setdefault(indices[row["key"]], []).append(Box(_corners(row, where), lines.line_num))
    if not boxes:
        raise ValueError(f"{path} holds no boxes, only a header")
    return boxes


def _corners(row: dict[str, str | None], where: str) -> tuple[float, float, float, float]:
    try:
        x0, y0, x1, y1 = corners = tuple(float(row[name] or "") for name in _CORNERS)
    except ValueError:
        raise ValueError(f"{where}: corners must be four numbers, got {_listed(row[n] for n in _CORNERS)}") from None
    if not (0 <= x0 < x1 < math.inf and 0 <= y0 < y1 < math.inf):
        raise ValueError(f"{where}: a box must have 0 <= x0 < x1 and 0 <= y0 < y1, got {_listed(corners)}")
    return x0, y0, x1, y1


def _pixels_inside(boxes: Tensor, side: int) -> npt.NDArray[np.bool_]:
    """(S, S): the pixels whose centre lies in one of the boxes (n, 4)."""
    centres = torch.arange(side) + 0.5
    x0, y0, x1, y1 = (corner[:, None] for corner in boxes.unbind(1))
    columns, rows = (centres >= x0) & (centres < x1), (centres >= y0) & (centres < y1)
    inside: npt.NDArray[np.bool_] = (rows[:, :, None] & columns[:, None, :]).any(0).numpy()
    return inside


def _listed(values: Iterable[object]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
