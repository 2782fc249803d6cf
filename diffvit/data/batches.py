"""What a rank trains on: a batch, and the stream that it comes from. Light, for processes that only pass batches on.

Letters: B samples in the micro-batch, C channels, S image side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

SKIPPED_LABEL = -100
"""Label of a sample whose image could not be used; no loss and no metric counts it."""


@dataclass(frozen=True)
class Batch:
    """What a rank trains on or evaluates at once.

    A sample that could not be used keeps its place, with a black image and SKIPPED_LABEL, so that every other sample
    stays where the order put it; `skipped` says "key: reason" for each.
    """

    row: int
    images: npt.NDArray[np.uint8]  # (B, C, S, S)
    labels: npt.NDArray[np.int64]  # (B,)
    skipped: tuple[str, ...] = ()
    samples: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # (B,) numbers in the split


class Stream(Protocol):
    """The batches of one rank, in the order of the plans."""

    def train(self, first_step: int) -> Iterator[Batch]:
        """Every micro-batch from global step `first_step` to the end of the run."""
        ...

    def evaluate(self) -> Iterator[Batch]:
        """The rank's share of the validation split; over all ranks each sample comes exactly once."""
        ...

    def preview(self, count: int) -> Batch:
        """`count` fixed validation samples, the same on every call."""
        ...

    def keys(self, samples: npt.NDArray[np.int64]) -> list[str]:
        """The keys of training samples, by their numbers."""
        ...
