"""What a prepared data set will look like: classes, splits and which image goes into which shard.

A pure function of the entries, the seed and the sizes asked for, so an interrupted preparation comes to the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from diffvit.data.datasets import sort_classes
from diffvit.data.order import SHUFFLE
from diffvit.data.sources import BESIDE
from diffvit.data.splitting import hold_out

Rows = npt.NDArray[np.int64]

_MAX_SHARD_IMAGES = 8192
"""However small they are, so that packing them spreads over the cluster."""


@dataclass(frozen=True)
class Layout:
    """Entries in the order in which they are written. `shards` are (name, first row, end row)."""

    classes: tuple[str, ...]
    entries: pa.Table
    labels: npt.NDArray[np.int64]
    shards: tuple[tuple[str, int, int], ...]
    quarantined: tuple[tuple[str, str], ...]
    """(key, reason) of the entries that are not written."""


def plan_layout(entries: pa.Table, *, val_fraction: float, seed: int, shard_bytes: int) -> Layout:
    """Sort out what cannot be used, hold a validation split out where there is none, shuffle, cut into shards.

    Raises:
        ValueError: no training images, fewer than two classes, or classes that training never sees.
    """
    entries, quarantined = _usable(entries)
    if not entries.num_rows:
        raise ValueError(
            f"none of the {len(quarantined)} images found can be used; the first: {quarantined[0][0]}: "
            f"{quarantined[0][1]}"
            if quarantined
            else "the source holds no images"
        )
    names = entries["class_name"].to_pylist()
    classes = order_classes(names, entries["label"].to_pylist())
    if len(classes) < 2:
        raise ValueError(
            f"a classifier needs at least 2 classes, the source has only {classes[0]!r}; where that is a folder around "
            "the class folders, name it instead"
        )
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number[name] for name in names], np.int64)
    splits = _splits(entries["split"].to_pylist())
    if "val" not in splits:
        train = splits["train"]
        stay, out = hold_out(labels[train], val_fraction, seed, classes)
        splits |= {"train": train[stay], "val": train[out]}
    _require_trained(classes, labels, splits)
    rows, shards = _shuffle_and_cut(splits, entries["length"].to_numpy(), seed, shard_bytes)
    return Layout(classes, entries.take(rows), labels[rows], shards, quarantined)


def order_classes(names: list[str], numbers: list[int | None]) -> tuple[str, ...]:
    """In the source's own order, where it numbers all of its classes in one way; else sorted.

    Raises:
        ValueError: it has two classes of one name, as ImageNet's two cranes are.
    """
    pairs = set(zip(numbers, names, strict=True))
    by_number = dict(sorted((number, name) for number, name in pairs if number is not None))
    if None in numbers or len(by_number) < len(pairs):
        return sort_classes(set(names))
    first: dict[str, int] = {}
    for number, name in by_number.items():
        if first.setdefault(name, number) != number:
            raise ValueError(f"classes must differ in name, the source calls {first[name]} and {number} {name!r}")
    return tuple(by_number.values())


def _usable(entries: pa.Table) -> tuple[pa.Table, tuple[tuple[str, str], ...]]:
    keys, reasons = entries["key"].to_pylist(), entries["reason"].to_pylist()
    seen: set[str] = set()
    columns = (entries[name].to_pylist() for name in ("class_name", "split"))
    for row, (key, class_name, split) in enumerate(zip(keys, *columns, strict=True)):
        if reasons[row] is None and split == BESIDE:
            reasons[row] = "outside of the folders train, val and test"
        if reasons[row] is None and class_name is None:
            reasons[row] = "no label"
        if reasons[row] is None and key in seen:
            reasons[row] = "another image has the same key"
        seen.add(key)
    quarantined = tuple((key, reason) for key, reason in zip(keys, reasons, strict=True) if reason is not None)
    return entries.filter(pc.is_null(pa.array(reasons, pa.string()))), quarantined


def _splits(found: list[str | None]) -> dict[str, Rows]:
    """Rows of each split. Unnamed images are trained on; a test split stands in for a missing validation split."""
    named = np.array([split or "train" for split in found])
    rows = {split: np.flatnonzero(named == split) for split in ("train", "val", "test")}
    if not len(rows["train"]):
        raise ValueError("the source has no training images, only those of a validation or test split")
    if not len(rows["val"]):
        rows["val"], rows["test"] = rows["test"], rows["val"]
    return {split: members for split, members in rows.items() if len(members)}


def _require_trained(classes: tuple[str, ...], labels: npt.NDArray[np.int64], splits: dict[str, Rows]) -> None:
    trained = set(labels[splits["train"]].tolist())
    odd = [classes[label] for label in sorted(set(labels.tolist()) - trained)]
    if odd:
        raise ValueError(f"{len(odd)} classes have no training images: {', '.join(odd[:5])}")


def _shuffle_and_cut(
    splits: dict[str, Rows], lengths: npt.NDArray[np.int64], seed: int, shard_bytes: int
) -> tuple[Rows, tuple[tuple[str, int, int], ...]]:
    order: list[Rows] = []
    shards = []
    start = 0
    for number, (split, members) in enumerate(splits.items()):
        shuffled = np.random.default_rng((seed, SHUFFLE, number)).permutation(members)
        count = max(round(int(lengths[shuffled].sum()) / shard_bytes), -(-len(shuffled) // _MAX_SHARD_IMAGES))
        cuts = np.linspace(start, start + len(shuffled), count + 1).astype(int).tolist()
        shards += [(f"{split}/{i:05d}.parquet", *ends) for i, ends in enumerate(pairwise(cuts))]
        order.append(shuffled)
        start += len(shuffled)
    return np.concatenate(order), tuple(shards)
