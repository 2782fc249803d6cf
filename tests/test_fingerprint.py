from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from diffvit.config import DataConfig
from diffvit.data.datasets import Dataset, open_dataset
from diffvit.data.fingerprint import fingerprint_of
from diffvit.data.subset import Subset


def opened(folder: Path) -> Dataset:
    return open_dataset(DataConfig(path=str(folder)))


def test_it_is_that_of_keys_and_labels_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    before = fingerprint_of(opened(folder))
    assert (before.training.images, before.validation.images) == (36, 15)
    moved = folder.rename(tmp_path / "elsewhere")
    assert fingerprint_of(opened(moved)) == before
    (moved / "val/red/000.png").rename(moved / "val/red/new.png")
    after = fingerprint_of(opened(moved))
    assert after.training == before.training
    assert after.validation != before.validation


def test_the_order_and_the_labels_count(folder: Path) -> None:
    dataset = opened(folder)
    rows = np.arange(36)
    ways = [rows, rows[::-1], np.roll(rows, 1)]
    found = {fingerprint_of(dataclasses.replace(dataset, train=Subset(dataset.train, way))).training for way in ways}
    assert fingerprint_of(dataset).training in found
    assert len(found) == 3
    relabelled = dataclasses.replace(dataset.train, labels=dataset.train.labels[::-1])  # type: ignore[type-var]
    assert fingerprint_of(dataclasses.replace(dataset, train=relabelled)).training not in found


def test_every_key_counts(folder: Path) -> None:
    """With more of them than are hashed at once; the first and the second image are of one class."""
    train = opened(folder).train
    rows = np.zeros(5000, np.int64)
    other = rows.copy()
    other[-1] = 1
    ways = [fingerprint_of(Dataset(("a", "b"), Subset(train, way), train)).training for way in (rows, other)]
    assert ways[0] != ways[1]
