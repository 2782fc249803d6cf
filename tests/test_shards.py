"""The shard format: any Parquet reader takes it, and each image is found by one ranged read."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import ObjectStore

from diffvit.config import DataConfig
from diffvit.data.datasets import open_dataset
from diffvit.data.shards import (
    FORMAT_VERSION,
    INDEX_SCHEMA,
    INFO_NAME,
    ROW_GROUP_BYTES,
    DatasetInfo,
    SplitInfo,
    index_name,
    is_damaged,
    open_shards,
    read_index,
    read_info,
    write_info,
    write_shard,
)
from diffvit.storage import Storage, StorageError

IMAGES = [bytes([i]) * (3 * i + 1) for i in range(7)]


def make_dataset(storage: Storage) -> DatasetInfo:
    """Seven 'images' in two shards of train, and one in val."""
    splits = {}
    for split, cuts in (("train", [(0, 4), (4, 6)]), ("val", [(6, 7)])):
        shards, parts = [], []
        for number, (first, end) in enumerate(cuts):
            labels, keys = [i % 2 for i in range(first, end)], [f"k{i}" for i in range(first, end)]
            info, offsets = write_shard(storage, f"{split}/{number:05d}.parquet", IMAGES[first:end], labels, keys)
            shards.append(info)
            lengths = [len(image) for image in IMAGES[first:end]]
            columns = [[number] * len(keys), offsets, lengths, labels, keys]
            parts.append(
                pa.table([pa.array(c, f.type) for c, f in zip(columns, INDEX_SCHEMA, strict=True)], INDEX_SCHEMA.names)
            )
        index = pa.concat_tables(parts)
        sink = pa.BufferOutputStream()
        pq.write_table(index, sink)
        storage.write(index_name(split), sink.getvalue())
        splits[split] = SplitInfo(index.num_rows, [1, 1], shards)
    info = DatasetInfo(FORMAT_VERSION, "x", {}, ["a", "b"], splits, [0.5], [0.25], (1, 2.0, 3), (1, 2.0, 3), 0)
    write_info(storage, info)
    return info


def test_any_reader_takes_a_shard(tmp_path: Path) -> None:
    make_dataset(Storage(str(tmp_path)))
    table = pq.read_table(tmp_path / "train/00000.parquet")
    assert table["image"].to_pylist() == IMAGES[:4]
    assert table["label"].to_pylist() == [0, 1, 0, 1]
    assert table["key"].to_pylist() == ["k0", "k1", "k2", "k3"]


READ = "import pickle, sys; sys.stdout.buffer.write(pickle.load(sys.stdin.buffer).read(5))"


def test_a_relative_path_holds_for_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives them other working directories."""
    make_dataset(Storage(str(tmp_path / "set")))
    monkeypatch.chdir(tmp_path)
    split = pickle.dumps(open_dataset(DataConfig(path="set")).train)
    worker = subprocess.run([sys.executable, "-c", READ], cwd="/", input=split, stdout=subprocess.PIPE, check=True)
    assert worker.stdout == IMAGES[5]


@pytest.mark.parametrize("where", ["local", "s3"])
def test_images_come_in_the_order_asked_for(tmp_path: Path, where: str, request: pytest.FixtureRequest) -> None:
    uri = str(tmp_path)
    if where == "s3":
        store: ObjectStore = request.getfixturevalue("object_store")
        uri = store.uri(f"shards-{tmp_path.name}")
    make_dataset(Storage(uri))
    info, splits = open_shards(Storage(uri))
    assert info == make_dataset(Storage(uri))
    train = splits["train"]
    assert list(train.read_many(np.array([5, 0, 3, 5]))) == [IMAGES[i] for i in (5, 0, 3, 5)]
    assert [train.key(i) for i in range(len(train))] == [f"k{i}" for i in range(6)]
    assert train.labels.tolist() == [0, 1] * 3


def test_offsets_hold_over_row_groups_and_pages(tmp_path: Path) -> None:
    """Images larger and smaller than a page, two row groups, empty ones and ones that repeat."""
    rng = np.random.default_rng(0)
    images = [rng.bytes(n) for n in (0, 1, ROW_GROUP_BYTES // 2, 70, 2**20, 0, ROW_GROUP_BYTES, 5, 5)]
    images += [images[3]] * 3
    storage = Storage(str(tmp_path))
    info, offsets = write_shard(storage, "x.parquet", images, [0] * 12, [str(i) for i in range(12)])
    assert info.row_groups > 1
    for image, offset in zip(images, offsets, strict=True):
        assert storage.read_range("x.parquet", offset, len(image)) == image
    assert len(set(zip(offsets, map(len, images), strict=True))) == 12


def test_damage_is_found(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    info = make_dataset(storage)
    shards = info.splits["train"].shards
    index = read_index(storage, "train")
    parts = [index.filter(pc.equal(index["shard"], number)) for number in range(2)]
    assert [is_damaged(storage, *pair) for pair in zip(shards, parts, strict=True)] == [False, False]
    other = parts[0].set_column(3, "label", pc.add(parts[0]["label"], 1))
    assert is_damaged(storage, shards[0], other)
    assert is_damaged(storage, shards[0], parts[0].slice(1))
    shard = tmp_path / "train/00001.parquet"
    content = bytearray(shard.read_bytes())
    content[20] ^= 1
    shard.write_bytes(content)
    assert [is_damaged(storage, *pair) for pair in zip(shards, parts, strict=True)] == [False, True]
    shard.write_bytes(content[:-1])
    with pytest.raises(
        ValueError, match=r"1 of 2 shards of .* are missing or have another size .* train/00001.parquet"
    ):
        open_shards(storage)
    shard.unlink()
    with pytest.raises(ValueError, match="1 of 2 shards"):
        open_shards(storage)


def test_a_shard_lost_while_training_is_no_bad_image(tmp_path: Path) -> None:
    """It must stop the run instead of leaving thousands of samples out as unreadable."""
    make_dataset(Storage(str(tmp_path)))
    _, splits = open_shards(Storage(str(tmp_path)))
    (tmp_path / "train/00001.parquet").unlink()
    with pytest.raises(StorageError, match=r"shard train/00001.parquet of .* cannot be read"):
        list(splits["train"].read_many(np.array([5])))
    (tmp_path / "train/00001.parquet").write_bytes(b"short")
    with pytest.raises(StorageError, match=r"shard train/00001.parquet of .* is cut short"):
        list(splits["train"].read_many(np.array([5])))


def test_info_of_another_version_or_damaged(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    info = make_dataset(storage)
    write_info(storage, dataclasses.replace(info, format_version=FORMAT_VERSION + 1))
    with pytest.raises(ValueError, match=f"format version {FORMAT_VERSION + 1}; this diffvit reads {FORMAT_VERSION}"):
        read_info(storage)
    storage.write(INFO_NAME, b'{"format_version": 1}')
    with pytest.raises(ValueError, match=f"{INFO_NAME} is damaged"):
        read_info(storage)


def test_an_index_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    make_dataset(storage)
    storage.write(index_name("train"), storage.read(index_name("val")))
    with pytest.raises(ValueError, match=f"lists 1 images, {INFO_NAME} 6"):
        open_shards(storage)


def test_a_split_is_small_to_send(tmp_path: Path) -> None:
    """Every rank is sent it: 24 bytes an image and its key."""
    storage = Storage(str(tmp_path))
    make_dataset(storage)
    split = open_shards(storage)[1]["train"]
    assert sum(column.itemsize for column in (split.shard, split.offset, split.length, split.labels)) <= 24


@pytest.mark.parametrize("content", [None, b"PAR1 and no more"])
def test_an_index_that_is_missing_or_damaged_is_named(tmp_path: Path, content: bytes | None) -> None:
    storage = Storage(str(tmp_path))
    make_dataset(storage)
    storage.delete(index_name("train"))
    if content is not None:
        storage.write(index_name("train"), content)
    with pytest.raises(ValueError, match=r"index/train.parquet is missing or damaged; copy or prepare"):
        open_dataset(DataConfig(path=str(tmp_path)))
