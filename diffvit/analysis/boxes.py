"""Where attention falls on images with boxes, asked of every run at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from diffvit.analysis.measure import RunMeasures
from diffvit.data.boxes import BoxedImage, BoxedSplit


def look_at_boxes(
    measures: Sequence[RunMeasures], boxes: BoxedSplit | None, limit: int, batch_size: int, seed: int
) -> dict[str, int] | None:
    """Ask every run about `limit` images of which a box is in view, drawn by `seed`; None without boxes.

    `images` were looked at; `without_box` of the split have none; of the others that were read, `out_of_view` show
    nothing of their boxes, because the centre crop cuts them off or because they cannot be read.

    Raises:
        ValueError: a box that is not within its image.
    """
    if boxes is None:
        return None
    out_of_view = 0

    def in_view() -> Iterator[BoxedImage]:
        nonlocal out_of_view
        for image in boxes.images(measures[0].run.config, seed):
            if image.inside.any():
                yield image
            else:
                out_of_view += 1

    chosen = islice(in_view(), limit)
    while group := list(islice(chosen, batch_size)):
        images, inside = np.stack([image.pixels for image in group]), np.stack([image.inside for image in group])
        for measure in measures:
            measure.look_at_boxes(images, inside)
    return {
        "images": measures[0].boxed.images,
        "without_box": boxes.images_in_split - len(boxes),
        "out_of_view": out_of_view,
    }
