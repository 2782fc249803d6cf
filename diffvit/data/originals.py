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
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from diffvit.data.sources import IMAGE_EXTENSIONS
from diffvit.storage import Storage

ENTRY_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),  # null where the source does not say
        ("class_name", pa.string()),  # null where the image has none
        ("location", pa.string()),  # of the folder that holds the file
        ("file", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("reason", pa.string()),  # why it cannot be used; null where it can
    ]
)
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_SPLIT_IN_NAME = re.compile(r"(?<![a-z])(train|validation|valid|val|test)(?![a-z])")

Kind = Literal["folder", "tar", "parquet", "shards", "torchvision"]


@dataclass(frozen=True)
class Unit:
    """A part of a source that one task goes through; `files` as the source names them."""

    kind: Kind
    location: str
    files: tuple[str, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One image, as a row of ENTRY_SCHEMA."""

    key: str
    file: str
    offset: int = 0
    length: int = -1
    split: str | None = None
    class_name: str | None = None
    location: str | None = None
    reason: str | None = None


def listing_digest(units: Sequence[Unit]) -> str:
    """One number for the names and sizes of all files of a source."""
    listing = json.dumps([(unit.files, unit.sizes) for unit in units])
    return hashlib.sha256(listing.encode()).hexdigest()


class Staging:
    """Receives the images of a unit, one after the other, into one file."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.location, self.name, self._storage = storage.uri, name, storage
        self._position = 0
        self._file: pa.NativeFile | None = None

    def add(self, content: bytes) -> int:
        """Where the image begins."""
        if self._file is None:
            self._file = self._storage.open_for_writing(self.name)
        self._file.write(content)
        self._position += len(content)
        return self._position - len(content)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def split_of_path(name: str) -> tuple[str | None, tuple[str, ...]]:
    """The split that the first folder of `name` says, and the path below it."""
    parts = PurePosixPath(name).parts
    split = _SPLITS.get(parts[0].lower()) if len(parts) > 1 else None
    return split, parts[1:] if split else parts


def split_of_file(name: str) -> str | None:
    """The split that a tar's or a Parquet file's name says (`train-00000-of-00294.parquet`)."""
    found = _SPLIT_IN_NAME.findall(name.lower())
    return _SPLITS[found[-1]] if found else None


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_EXTENSIONS and not is_hidden(name)


def read_labels(path: str) -> dict[str, str]:
    """`{image name without folder and extension: class}` of a `--labels` file.

    Raises:
        ValueError: there is no such file, or a line has no class.
    """
    if not path:
        return {}
    folder, _, name = path.rpartition("/")
    try:
        text = Storage(folder or ".").read(name).decode()
    except FileNotFoundError:
        raise ValueError(f"labels must name a file, got {path!r}: there is none") from None
    labels = {}
    for number, row in enumerate(csv.reader(io.StringIO(text)), start=1):
        if not row:
            continue
        if len(row) < 2 or not row[1].split():
            raise ValueError(f"{path}, line {number}: expected 'image name,class', got {','.join(row)!r}")
        labels[Path(row[0]).stem] = row[1].split()[0]
    return labels


def write_entries(storage: Storage, name: str, entries: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(entries, sink)
    storage.write(name, sink.getvalue())


def read_entries(storage: Storage, name: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(storage.read(name)), schema=ENTRY_SCHEMA)


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)
