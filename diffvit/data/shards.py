"""The format of a prepared data set: Parquet shards of encoded images, an index, and `dataset.json`.

<folder>/dataset.json            classes, splits, shards with sha256, channel statistics; written last, so that a
                                 folder without it is not a data set
<folder>/<split>/00000.parquet   `image` (encoded bytes), `label`, `key`: any Parquet reader takes them
<folder>/index/<split>.parquet   where in its shard each image lies: `shard`, `offset`, `length`, `label`, `key`
<folder>/quarantine.parquet      `key` and `reason` of every image that was left out

Images are stored uncompressed (they are compressed already) and plainly encoded, so each lies in one piece at a known
place: the sample that the order asks for is read by one ranged read, from a disk or an object store, and no more (a
process asks an object store for a shard's size once, before its first image of it). The order of training can then be
a true permutation of the whole set.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, TypeAdapter, ValidationError

from diffvit.storage import Storage, StorageError

FORMAT_VERSION = 1
INFO_NAME = "dataset.json"
QUARANTINE_NAME = "quarantine.parquet"
ROW_GROUP_BYTES = 4 * 2**20
"""Encoded images in a row group, for readers that stream the shards."""

_SHARD_SCHEMA = pa.schema([("image", pa.binary()), ("label", pa.int64()), ("key", pa.string())])
INDEX_SCHEMA = pa.schema(
    [("shard", pa.int32()), ("offset", pa.int64()), ("length", pa.int32()), ("label", pa.int64()), ("key", pa.string())]
)
_READ_THREADS = 16
"""Ranged reads of a process that may wait for an object store at the same time."""


@dataclass(frozen=True)
class ShardInfo:
    """One Parquet file: `name` is its path below the data set."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    images: int
    bytes: int
    row_groups: int
    sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """One split; `class_counts[c]` images of class c."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    images: int
    class_counts: list[int]
    shards: list[ShardInfo]


@dataclass(frozen=True)
class DatasetInfo:
    """`dataset.json`.

    `mean` and `std` are of pixels in [0, 1] by channel, each image weighing the same, over the training split (one
    value where every image is grey). `width` and `height`: smallest, mean and largest, over all splits.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    format_version: int
    source: str
    options: dict[str, Any]
    classes: list[str]
    splits: dict[str, SplitInfo]
    mean: list[float]
    std: list[float]
    width: tuple[int, float, int]
    height: tuple[int, float, int]
    quarantined: int
    ignored: dict[str, int] = field(default_factory=dict)
    """Files of the source that are no images, by extension."""


_INFO = TypeAdapter(DatasetInfo)


def write_info(storage: Storage, info: DatasetInfo) -> None:
    storage.write(INFO_NAME, _INFO.dump_json(info, indent=2) + b"\n")


def read_info(storage: Storage) -> DatasetInfo:
    """`dataset.json` of a prepared folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another version, or damaged.
    """
    try:
        info = _INFO.validate_json(storage.read(INFO_NAME))
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(
            f"{storage.uri}/{INFO_NAME} is damaged: {'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        ) from None
    if info.format_version != FORMAT_VERSION:
        raise ValueError(
            f"{storage.uri}/{INFO_NAME} has format version {info.format_version}; this diffvit reads {FORMAT_VERSION}"
        )
    return info


def index_name(split: str) -> str:
    return f"index/{split}.parquet"


def write_shard(
    storage: Storage, name: str, images: list[bytes], labels: list[int], keys: list[str]
) -> tuple[ShardInfo, list[int]]:
    """Write one shard; its description, and where in the file each image begins."""
    table = pa.table([pa.array(images, pa.binary()), labels, keys], schema=_SHARD_SCHEMA)
    rows = max(ROW_GROUP_BYTES * len(images) // max(sum(map(len, images)), 1), 1)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=rows, compression="none", use_dictionary=False, write_statistics=False)
    content = sink.getvalue().to_pybytes()
    metadata = pq.read_metadata(pa.BufferReader(content))
    storage.write(name, content)
    info = ShardInfo(name, len(images), len(content), metadata.num_row_groups, hashlib.sha256(content).hexdigest())
    return info, _image_offsets(content, metadata, images)


def _image_offsets(content: bytes, metadata: pq.FileMetaData, images: list[bytes]) -> list[int]:
    """A plainly encoded value is its length in four bytes and its bytes; pages only put headers between values."""
    offsets: list[int] = []
    for group in range(metadata.num_row_groups):
        position = metadata.row_group(group).column(0).data_page_offset
        for image in images[len(offsets) : len(offsets) + metadata.row_group(group).num_rows]:
            position = content.index(struct.pack("<I", len(image)) + image, position) + 4
            offsets.append(position)
            position += len(image)
    return offsets


@dataclass(frozen=True)
class ShardSplit:
    """One split of a prepared data set (`diffvit.data.datasets.Split`)."""

    storage: Storage
    shards: tuple[str, ...]
    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    length: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int64]
    keys: pa.StringArray

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        return str(self.keys[index].as_py())

    def read(self, index: int) -> bytes:
        """One image.

        Raises:
            StorageError: the shard cannot be read, its store stayed away, or it is shorter than the index says.
        """
        name, length = self.shards[self.shard[index]], int(self.length[index])
        try:
            content = self.storage.read_range(name, int(self.offset[index]), length)
        except (OSError, StorageError) as error:
            raise StorageError(f"shard {name} of {self.storage.uri} cannot be read: {error}") from None
        if len(content) != length:
            raise StorageError(f"shard {name} of {self.storage.uri} is cut short; copy or prepare the data set again")
        return content

    def read_many(self, indices: npt.NDArray[np.int64]) -> Iterator[bytes]:
        """Images in the order of `indices`; those of an object store are fetched side by side."""
        if not self.storage.is_remote:
            yield from map(self.read, indices.tolist())
            return
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            yield from pool.map(self.read, indices.tolist())


def open_shards(storage: Storage) -> tuple[DatasetInfo, dict[str, ShardSplit]]:
    """A prepared data set and its splits.

    Raises:
        FileNotFoundError: `storage` holds none.
        ValueError: it is of another version or incomplete.
    """
    info = read_info(storage)
    return info, {name: _open_split(storage, name, split) for name, split in info.splits.items()}


def _open_split(storage: Storage, name: str, split: SplitInfo) -> ShardSplit:
    sizes = storage.sizes(name)
    wrong = [shard.name for shard in split.shards if sizes.get(shard.name) != shard.bytes]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(split.shards)} shards of {storage.uri} are missing or have another size than "
            f"{INFO_NAME} says, among them {wrong[0]}; copy or prepare the data set again"
        )
    try:
        table = read_index(storage, name)
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise ValueError(
            f"{storage.uri}/{index_name(name)} is missing or damaged; copy or prepare the data set again: {error}"
        ) from None
    if table.num_rows != split.images:
        raise ValueError(
            f"{storage.uri}/{index_name(name)} lists {table.num_rows} images, {INFO_NAME} {split.images}; "
            "copy or prepare the data set again"
        )
    columns = {column: table[column].to_numpy() for column in ("shard", "offset", "length", "label")}
    return ShardSplit(
        storage=storage,
        shards=tuple(shard.name for shard in split.shards),
        shard=columns["shard"],
        offset=columns["offset"],
        length=columns["length"],
        labels=columns["label"],
        keys=table["key"].chunk(0) if table.num_rows else pa.array([], pa.string()),
    )


def is_damaged(storage: Storage, shard: ShardInfo, index: pa.Table) -> bool:
    """Whether its sha256 is not the one in `dataset.json`, or `index`, its rows of the index, not what it holds.

    Reads all of it.
    """
    content = storage.read(shard.name)
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        return True
    places = zip(index["offset"].to_pylist(), index["length"].to_pylist(), strict=True)
    images = pa.array([content[at : at + length] for at, length in places], pa.binary())
    expected = pa.table([images, index["label"], index["key"]], schema=_SHARD_SCHEMA)
    return not expected.equals(pq.read_table(pa.BufferReader(content)))


def read_index(storage: Storage, split: str) -> pa.Table:
    """A row of INDEX_SCHEMA for every image of the split."""
    file = pq.ParquetFile(pa.BufferReader(storage.read(index_name(split))))  # read_table needs three times as long
    return file.read().cast(INDEX_SCHEMA).combine_chunks()
