"""Holding images out of a training set, class by class."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from diffvit.data.order import HOLD_OUT

Rows = npt.NDArray[np.int64]


def hold_out(labels: npt.NDArray[np.int64], fraction: float, seed: int, classes: Sequence[str]) -> tuple[Rows, Rows]:
    """Rows that stay and rows that are held out, both sorted: about `fraction` of each class, and the same for a seed.

    At least one image of each class is held out and one stays.

    Raises:
        ValueError: a class has one image only.
    """
    rng = np.random.default_rng((seed, HOLD_OUT))
    held_out = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < 2:
            raise ValueError(
                f"class {classes[label]!r} has one image; a split into training and validation needs 2 of each class"
            )
        count = min(max(math.floor(len(rows) * fraction + 0.5), 1), len(rows) - 1)
        held_out.append(rows[rng.permutation(len(rows))[:count]])
    out = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), out), out
