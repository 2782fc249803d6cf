"""Validation batches cut anew: without what could not be read, and none too small for an unbiased estimate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from diffvit.analysis.cka import MIN_BATCH
from diffvit.data.batches import SKIPPED_LABEL, Batch


@dataclass(frozen=True)
class Group:
    """Images that were read, uint8 (n, C, S, S), and their labels (n,)."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


def regroup(batches: Iterable[Batch], size: int) -> Iterator[Group]:
    """Groups of `size` images in the batches' order, skipped ones left out.

    What is left at the end is a smaller group, or, below 4 images, joins the group before it.

    Raises:
        ValueError: `size` below 4, or fewer than 4 images in all.
    """
    if size < MIN_BATCH:
        raise ValueError(f"a group must have at least {MIN_BATCH} images, got {size}")
    rest: Group | None = None
    for batch in batches:
        used = batch.labels != SKIPPED_LABEL
        rest = _join(rest, Group(batch.images[used], batch.labels[used]))
        while len(rest.labels) >= size + MIN_BATCH:
            yield Group(rest.images[:size], rest.labels[:size])
            rest = Group(rest.images[size:], rest.labels[size:])
    if rest is None or len(rest.labels) < MIN_BATCH:
        count = 0 if rest is None else len(rest.labels)
        raise ValueError(f"a comparison needs at least {MIN_BATCH} validation images, got {count}")
    yield rest


def _join(first: Group | None, second: Group) -> Group:
    if first is None:
        return second
    images = np.concatenate([first.images, second.images])
    return Group(images, np.concatenate([first.labels, second.labels]))
