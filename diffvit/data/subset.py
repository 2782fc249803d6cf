"""A part of a split, and a training set parted in two so that a search is judged on images it never trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from diffvit.data.datasets import Dataset, Indices, Labels, Split
from diffvit.data.splitting import hold_out


@dataclass(frozen=True)
class Subset:
    """Sample i is sample `rows[i]` of `split`; keys stay those of the data set."""

    split: Split
    rows: Indices

    @property
    def labels(self) -> Labels:
        labels: Labels = self.split.labels[self.rows]
        return labels

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        return self.split.key(int(self.rows[index]))

    def read_many(self, indices: Indices) -> Iterator[bytes | OSError]:
        return self.split.read_many(self.rows[indices])


@dataclass(frozen=True)
class Excerpt(Subset):
    """A part that stands for the whole split: what goes by a split's size goes by that of the whole."""


def parted_for_search(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    """The training set alone, `fraction` of each class held out of it to judge by in the place of validation.

    Raises:
        ValueError: a class with a single training image.
    """
    kept, held_out = hold_out(dataset.train.labels, fraction, seed, dataset.classes)
    return dataclasses.replace(dataset, train=Subset(dataset.train, kept), val=Subset(dataset.train, held_out))
