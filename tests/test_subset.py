from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from conftest import make_folder

from diffvit.config import DataConfig
from diffvit.data.datasets import open_dataset
from diffvit.data.subset import Subset, parted_for_search


def test_a_subset_renumbers_and_keeps_keys_labels_and_bytes(folder: Path) -> None:
    whole = open_dataset(DataConfig(path=str(folder))).train
    part = Subset(whole, np.array([35, 0, 13]))
    assert len(part) == 3
    assert part.labels.tolist() == [2, 0, 1]
    assert [part.key(i) for i in range(3)] == ["train/red/011.png", "train/blue/000.png", "train/green/001.png"]
    assert list(part.read_many(np.array([2, 0]))) == [(folder / part.key(i)).read_bytes() for i in (2, 0)]


def test_a_search_never_touches_the_validation_split(folder: Path) -> None:
    dataset = open_dataset(DataConfig(path=str(folder)))
    parted = parted_for_search(dataset, 0.25, seed=0)
    keys = [{split.key(i) for i in range(len(split))} for split in (parted.train, parted.val)]
    assert np.bincount(parted.val.labels).tolist() == [3, 3, 3]  # a quarter of 12 of each class
    assert np.bincount(parted.train.labels).tolist() == [9, 9, 9]
    assert not keys[0] & keys[1]
    assert all(key.startswith("train/") for key in keys[0] | keys[1])
    assert parted.classes == dataset.classes


def test_the_part_is_a_function_of_the_seed(folder: Path) -> None:
    dataset = open_dataset(DataConfig(path=str(folder)))
    first, again, other = (parted_for_search(dataset, 0.25, seed).val for seed in (0, 0, 1))
    assert isinstance(first, Subset)
    assert isinstance(again, Subset)
    assert isinstance(other, Subset)
    assert first.rows.tolist() == again.rows.tolist() != other.rows.tolist()


def test_a_class_of_one_cannot_be_parted(tmp_path: Path) -> None:
    dataset = open_dataset(DataConfig(path=str(make_folder(tmp_path / "few", images_per_class=12, val_per_class=2))))
    one = dataclasses.replace(dataset, train=Subset(dataset.train, np.arange(25)))
    with pytest.raises(ValueError, match="class 'red' has one image"):
        parted_for_search(one, 0.1, seed=0)
