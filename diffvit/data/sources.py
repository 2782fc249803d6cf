"""Where images come from before they are shards: a folder, tars, Parquet or a torchvision data set.

Whatever the source, what comes out is a table of *entries*: which file holds an image, where in it, its key, its
class and its split. A source that cannot be read at any place (a compressed tar, a Parquet column, an array in memory)
is first copied, image by image, into a *staging* file that can. What follows then reads every source in the same way.

Splits are recognised by folder or file names: `train`, and `val`, `valid`, `validation` or `test`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.compute as pc

from diffvit.data.datasets import IMAGE_EXTENSIONS
from diffvit.storage import Storage

ENTRY_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),  # train, val, test or BESIDE; null where the source has no splits
        ("class_name", pa.string()),  # null where the image has none
        ("label", pa.int64()),  # the number that the source itself gives the class; null where it gives none
        ("location", pa.string()),  # of the folder that holds the file
        ("file", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("reason", pa.string()),  # why it cannot be used; null where it can
    ]
)
BESIDE = "beside"
"""The split of images that lie beside the folders of splits: not trained on, and predicted like others."""
_IGNORED = b"ignored"
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_SPLIT_IN_NAME = re.compile(r"(?<![a-z])(train|validation|valid|val|test)(?![a-z])")

_IMAGENET_COLUMNS = ["ImageId", "PredictionString"]
"""Of LOC_val_solution.csv."""

_STAGED_BYTES = 32 * 2**20
_READ_AHEAD_BYTES = 8 * 2**20
"""An object store is read in such pieces; asking it for each header of a tar would take a round trip an image."""

Kind = Literal["folder", "tar", "parquet", "shards", "torchvision"]


@dataclass(frozen=True)
class Unit:
    """A part of a source that one task goes through; `files` as the source names them."""

    kind: Kind
    location: str
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    ignored: Counter[str] = field(default_factory=Counter)
    """How many files beside these are no images, by extension; indexing a tar adds those in it."""
    changed_ns: tuple[int, ...] = ()
    """When each file was last changed; none where they are no files."""


@dataclass(frozen=True)
class Entry:
    """One image, as a row of ENTRY_SCHEMA."""

    key: str
    file: str
    offset: int = 0
    length: int = -1
    split: str | None = None
    class_name: str | None = None
    label: int | None = None
    location: str | None = None
    reason: str | None = None


def listing_digest(units: Sequence[Unit]) -> str:
    """One number for names, sizes and times of the last change of all files of a source."""
    listing = json.dumps([(unit.files, unit.sizes, unit.changed_ns) for unit in units])
    return hashlib.sha256(listing.encode()).hexdigest()


class Staging:
    """Receives the images of a unit, one after the other, into files `<name>-00000.bin`, …, each written at once.

    An upload that breaks off cannot be continued, so what is written to a store must be small enough to write again.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name = storage, name
        self._files = 0
        self._held = bytearray()

    def add(self, content: bytes) -> dict[str, Any]:
        """Where the image lies, as fields of its Entry."""
        if self._held and len(self._held) + len(content) > _STAGED_BYTES:
            self.close()
        place = {"location": self._storage.uri, "file": self._file, "offset": len(self._held), "length": len(content)}
        self._held += content
        return place

    def close(self) -> None:
        """Write what is still held."""
        if self._held:
            self._storage.write(self._file, bytes(self._held))
            self._files += 1
            self._held.clear()

    @property
    def _file(self) -> str:
        return f"{self._name}-{self._files:05d}.bin"


class _RemoteFile(io.RawIOBase):
    """An object as a file whose every read waits for a store that is away, as `Storage.read_range` does."""

    def __init__(self, storage: Storage, name: str, size: int) -> None:
        self._storage, self._name, self._size = storage, name, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._position)
        content = self._storage.read_range(self._name, self._position, length) if length > 0 else b""
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def open_original(unit: Unit) -> BinaryIO:
    """The only file of a unit, seekable, open for reading.

    Raises:
        FileNotFoundError: it is not there any more.
        StorageError: the store stayed away; from reads too.
    """
    storage, (name,), (size,) = Storage(unit.location), unit.files, unit.sizes
    if not storage.is_remote:
        return Path(storage.path(name)).open("rb")
    return io.BufferedReader(_RemoteFile(storage, name, size), _READ_AHEAD_BYTES)


def split_called(name: str) -> str | None:
    return _SPLITS.get(name.lower())


def split_of_path(name: str) -> tuple[str | None, tuple[str, ...]]:
    """The split that the first folder of `name` says, and the path below it."""
    parts = PurePosixPath(name).parts
    split = split_called(parts[0]) if len(parts) > 1 else None
    return split, parts[1:] if split else parts


def split_of_file(name: str) -> str | None:
    """The split that a tar's or a Parquet file's name says (`train-00000-of-00294.parquet`)."""
    found = _SPLIT_IN_NAME.findall(name.lower())
    return _SPLITS[found[-1]] if found else None


def is_image(name: str) -> bool:
    return extension_of(name) in IMAGE_EXTENSIONS and not is_hidden(name)


def join_entries(units: Sequence[Unit], parts: Sequence[pa.Table]) -> pa.Table:
    """The entries of all units; where the own keys of several Parquet files overlap, after each file's name."""
    entries = pa.concat_tables(parts)
    distinct = sum(pc.count_distinct(part["key"]).as_py() for part in parts)
    if units[0].kind != "parquet" or pc.count_distinct(entries["key"]).as_py() == distinct:
        return entries
    files = pa.array([unit.files[0] for unit, part in zip(units, parts, strict=True) for _ in range(part.num_rows)])
    keys = pc.binary_join_element_wise(files, entries["key"], "/")
    return entries.set_column(entries.schema.get_field_index("key"), ENTRY_SCHEMA.field("key"), keys)


def label_entries(entries: pa.Table, labels: dict[str, str]) -> pa.Table:
    """The entries, with the class of `read_labels` where they have none.

    Raises:
        ValueError: no label is of an entry without a class.
    """
    if not labels:
        return entries
    stems = [PurePosixPath(key).stem for key in entries["key"].to_pylist()]
    classes = entries["class_name"].to_pylist()
    names = [found or labels.get(stem) for stem, found in zip(stems, classes, strict=True)]
    if names == classes:
        reasons = entries["reason"].to_pylist()
        without = next((s for s, found, bad in zip(stems, classes, reasons, strict=True) if not (found or bad)), None)
        raise ValueError(
            f"labels (--labels FILE) must name images that have no class of their own, none of its {len(labels)} names "
            f"does, such as {next(iter(labels))!r}"
            + (f"; such an image is {without!r}" if without else "; no image is without: leave --labels out")
        )
    place = entries.schema.get_field_index("class_name")
    return entries.set_column(place, ENTRY_SCHEMA.field("class_name"), pa.array(names, pa.string()))


def read_labels(path: str) -> dict[str, str]:
    """`{image name without folder and extension: class}` of a `--labels` file.

    In ImageNet's own, which begins with a line of column names, boxes follow the class.

    Raises:
        ValueError: there is no such file, it is not UTF-8, a line has no class, or two lines give one image two.
    """
    if not path:
        return {}
    head, mark, query = path.partition("?") if "://" in path else (path, "", "")
    folder, _, name = head.rpartition("/")
    try:
        content = Storage((folder or ("/" if head.startswith("/") else ".")) + mark + query).read(name)
        text = content.decode("utf-8-sig")  # spreadsheets write a mark in front
    except FileNotFoundError:
        raise ValueError(f"labels must name a file, got {path!r}: there is none") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"labels must be a file in UTF-8, {path!r} is not: {error}") from None
    labels: dict[str, str] = {}
    has_boxes = False
    for number, row in enumerate(_rows_of(text, path), start=1):
        if not row:
            continue
        if number == 1 and row == _IMAGENET_COLUMNS:
            has_boxes = True
            continue
        if len(row) < 2 or not row[1].split():
            raise ValueError(f"{path}, line {number}: expected 'image name,class', got {','.join(row)!r}")
        image, label = Path(row[0]).stem, row[1].split()[0] if has_boxes else row[1].strip()
        if labels.setdefault(image, label) != label:
            raise ValueError(
                f"{path}, line {number}: an image {image!r} is {label!r} here and {labels[image]!r} above; names count "
                "without folder and extension"
            )
    return labels


def _rows_of(text: str, path: str) -> Iterator[list[str]]:
    try:
        yield from csv.reader(io.StringIO(text))
    except csv.Error as error:
        raise ValueError(f"labels must be a file of 'image name,class' lines, {path!r} is not: {error}") from None


def places_of(entries: pa.Table) -> list[Storage]:
    """Every folder or store that holds the images."""
    return [Storage(location) for location in pc.unique(entries["location"]).to_pylist()]


def with_ignored(entries: pa.Table, ignored: Mapping[str, int]) -> pa.Table:
    """The table, with the number of files that are no images, by extension."""
    return entries.replace_schema_metadata({_IGNORED: json.dumps(ignored)})


def ignored_in(entries: pa.Table) -> Counter[str]:
    """What `with_ignored` noted."""
    return Counter(json.loads((entries.schema.metadata or {}).get(_IGNORED, b"{}")))


def extension_of(name: str) -> str:
    """In lower case, with its dot; '(none)' where there is none."""
    return PurePosixPath(name).suffix.lower() or "(none)"


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)
