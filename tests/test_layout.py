"""Classes, splits and shards of a prepared data set, from entries alone."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from diffvit.data.datasets import sort_classes
from diffvit.data.layout import Layout, plan_layout
from diffvit.data.sources import ENTRY_SCHEMA


def entries(*rows: tuple[str, str | None, str | None], length: int = 10) -> pa.Table:
    """Rows of (key, split, class)."""
    return pa.Table.from_pylist(
        [{"key": k, "split": s, "class_name": c, "file": k, "offset": 0, "length": length} for k, s, c in rows],
        schema=ENTRY_SCHEMA,
    )


def many(count: int, split: str | None = None, prefix: str = "") -> list[tuple[str, str | None, str]]:
    return [(f"{prefix}{i}", split, "ab"[i % 2]) for i in range(count)]


def plan(table: pa.Table, shard_bytes: int = 50, seed: int = 0) -> Layout:
    return plan_layout(table, val_fraction=0.25, seed=seed, shard_bytes=shard_bytes)


def keys_of(layout: Layout, split: str) -> list[str]:
    keys = layout.entries["key"].to_pylist()
    return [keys[i] for name, first, end in layout.shards if name.startswith(split) for i in range(first, end)]


def test_every_image_is_in_one_shard_shuffled_and_balanced() -> None:
    layout = plan(entries(*many(40)))
    train, val = keys_of(layout, "train"), keys_of(layout, "val")
    assert sorted(train + val, key=int) == [str(i) for i in range(40)]
    assert train != sorted(train, key=int)
    assert len(val) == 10
    assert sum(int(key) % 2 for key in val) == 5
    assert [end - first for _, first, end in layout.shards] == [5] * 8  # 50 bytes a shard, 10 an image
    assert layout.labels.tolist() == [int(key) % 2 for key in train + val]
    assert (plan(entries(*many(40))).entries).equals(layout.entries)
    assert not plan(entries(*many(40)), seed=1).entries.equals(layout.entries)


def test_splits_of_the_source_stay() -> None:
    table = entries(*many(8, "train", "t"), *many(4, "val", "v"), *many(2, "test", "x"), ("u", None, "a"))
    layout = plan(table)
    assert sorted(keys_of(layout, "val")) == ["v0", "v1", "v2", "v3"]
    assert sorted(keys_of(layout, "test")) == ["x0", "x1"]
    assert "u" in keys_of(layout, "train")


def test_a_test_split_stands_in_for_validation() -> None:
    layout = plan(entries(*many(8, "train", "t"), *many(2, "test", "x")))
    assert sorted(keys_of(layout, "val")) == ["x0", "x1"]
    assert keys_of(layout, "test") == []


def test_what_cannot_be_used_is_named() -> None:
    table = entries(*many(8), ("nameless", None, None), ("3", None, "a"), ("there", "beside", "a"))
    layout = plan(table)
    assert layout.quarantined == (
        ("nameless", "no label"),
        ("3", "another image has the same key"),
        ("there", "outside of the folders train, val and test"),
    )
    assert layout.entries.num_rows == 8


def test_classes_that_are_numbers_sort_as_numbers() -> None:
    assert sort_classes({"10", "9", "2"}) == ("2", "9", "10")
    assert sort_classes({"10", "9", "x"}) == ("10", "9", "x")
    names = ["01", "1", "001", "2", "02"]
    assert {sort_classes(set(names[i:] + names[:i])) for i in range(5)} == {("001", "01", "1", "02", "2")}


def numbered(*rows: tuple[str, int | None]) -> pa.Table:
    """Two images of each (class, its number)."""
    return pa.Table.from_pylist(
        [
            {"key": f"{i}-{n}", "class_name": c, "label": label, "length": 10}
            for i, (c, label) in enumerate(rows)
            for n in (0, 1)
        ],
        schema=ENTRY_SCHEMA,
    )


def test_classes_stay_in_the_sources_own_order() -> None:
    layout = plan(numbered(("trouser", 1), ("bag", 8), ("t-shirt", 0)))
    assert layout.classes == ("t-shirt", "trouser", "bag")
    names = layout.entries["class_name"].to_pylist()
    assert [layout.classes[label] for label in layout.labels] == names
    # where it has none, or contradicts itself, by name
    assert plan(numbered(("b", 0), ("a", None))).classes == ("a", "b")
    assert plan(numbered(("b", 0), ("a", 0))).classes == ("a", "b")
    with pytest.raises(ValueError, match="classes must differ in name, the source calls 134 and 517 'crane'"):
        plan(numbered(("crane", 134), ("x", 200), ("crane", 517)))


def test_tiny_images_spread_over_shards() -> None:
    layout = plan(entries(*many(20_000), length=1), shard_bytes=2**30)
    assert [name for name, *_ in layout.shards if name.startswith("train")] == [
        f"train/0000{i}.parquet" for i in (0, 1)
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the source holds no images"),
        ([("a", None, None)], r"none of the 1 images found can be used; the first: a: no label"),
        ([("a", None, "x"), ("b", None, "x")], "at least 2 classes, the source has only 'x'"),
        (many(4, "val"), "no training images, only those of a validation or test split"),
        ([*many(4, "train"), ("v", "val", "zebra")], "1 classes have no training images: zebra"),
        ([*many(4), ("v", None, "zebra")], "class 'zebra' has one image"),
    ],
)
def test_refusals(rows: list[tuple[str, str | None, str | None]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(entries(*rows))


def test_labels_follow_their_images() -> None:
    layout = plan(entries(*many(30)))
    for key, label, name in zip(
        layout.entries["key"].to_pylist(), layout.labels, layout.entries["class_name"].to_pylist(), strict=True
    ):
        assert layout.classes[label] == name == "ab"[int(key) % 2]
    assert np.bincount(layout.labels).tolist() == [15, 15]
