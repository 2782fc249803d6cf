"""Finds out what a source is made of, and goes through any part of it.

A *unit* is a part that one task indexes: a tar, a Parquet file, a split of a torchvision set, or a whole folder.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa

from diffvit.config import SourceOptions
from diffvit.data.datasets import IMAGE_EXTENSIONS, SAMPLE, SAMPLE_FOLDER, not_utf8
from diffvit.data.parquet_images import index_parquet
from diffvit.data.shards import INFO_NAME, open_shards, read_info
from diffvit.data.sources import (
    BESIDE,
    ENTRY_SCHEMA,
    Entry,
    Kind,
    Staging,
    Unit,
    extension_of,
    is_hidden,
    is_image,
    split_of_path,
    with_ignored,
)
from diffvit.data.tars import index_tar
from diffvit.data.torchvision_sets import find_splits, index_torchvision
from diffvit.storage import Storage, absolute

TORCHVISION = "torchvision:"
Config = TypeVar("Config", bound=SourceOptions)
Stamp = tuple[int, int]
"""Bytes of a file, and when it was last changed, in nanoseconds."""
_OPTIONS_OF_ONE_KIND: dict[str, Kind] = {
    "tar_is_class": "tar",
    "image_column": "parquet",
    "label_column": "parquet",
    "root": "torchvision",
    "download": "torchvision",
}
_ENTRIES_AT_ONCE = 50_000
_TAR_EXTENSIONS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def find_units(source: str, options: SourceOptions) -> list[Unit]:
    """The parts of the source.

    Raises:
        ValueError: nothing there, nothing that holds images, several kinds at once, or options of another kind.
    """
    units = _units_of(source, options)
    kind = units[0].kind
    for name, its_kind in _OPTIONS_OF_ONE_KIND.items():
        asked = getattr(options, name)
        if asked and kind != its_kind:
            raise ValueError(
                f"{name} is for a {its_kind} source, {source!r} is a {kind} one, got {asked!r}; leave it out"
            )
    return units


def _units_of(source: str, options: SourceOptions) -> list[Unit]:
    if source == SAMPLE:
        source = str(SAMPLE_FOLDER)
    if source.startswith(TORCHVISION):
        name = source.removeprefix(TORCHVISION)
        return [
            Unit("torchvision", options.root, (f"{name}/{split}",), (size,))
            for split, size in find_splits(name, options)
        ]
    storage, files = _list(source)
    if INFO_NAME in files:
        _, prepared_at = files[INFO_NAME]
        return [
            Unit("shards", storage.uri, (split,), (info.images,), changed_ns=(prepared_at,))
            for split, info in read_info(storage).splits.items()
        ]
    by_kind: dict[Kind, dict[str, Stamp]] = {"folder": {}, "tar": {}, "parquet": {}}
    ignored: Counter[str] = Counter()
    for name, stamp in files.items():
        kind = _kind_of(name)
        if is_hidden(name):
            ignored["(hidden)"] += 1
        elif kind is not None:
            by_kind[kind][name] = stamp
        else:
            ignored[extension_of(name)] += 1
    found = [kind for kind, names in by_kind.items() if names]
    if not found:
        raise ValueError(
            f"source {source!r} holds no images, tars or Parquet files among its {len(files)} files "
            f"(images end in {', '.join(sorted(IMAGE_EXTENSIONS))})"
        )
    if len(found) > 1:
        counts = ", ".join(f"{len(by_kind[kind])} {kind} files" for kind in found)
        raise ValueError(f"source {source!r} must be of one kind, it holds {counts}; name a subfolder")
    (kind,) = found
    stamps = by_kind[kind]
    if kind == "folder":  # listing is all there is to do
        sizes, changed = zip(*stamps.values(), strict=True)
        return [Unit(kind, storage.uri, tuple(stamps), sizes, ignored, changed)]
    no_files = [name for name, (size, _) in stamps.items() if size < 0]
    if no_files:
        raise ValueError(
            f"source {source!r} holds {len(no_files)} {kind} files that are links to nothing, or no files, such as "
            f"{no_files[0]!r}: bring them back, or remove them"
        )
    units = [Unit(kind, storage.uri, (name,), (size,), changed_ns=(at,)) for name, (size, at) in stamps.items()]
    return [replace(units[0], ignored=ignored), *units[1:]]


def with_absolute_paths(config: Config) -> Config:
    """The same options for a process with another working directory, such as a task's."""
    changed: dict[str, Any] = {}
    for field in ("source", "images", "out", "labels", "root"):
        value = getattr(config, field, "")
        if value and value != SAMPLE and not value.startswith(TORCHVISION):
            changed[field] = absolute(value)
    return replace(config, **changed)


def _list(source: str) -> tuple[Storage, dict[str, Stamp]]:
    """The files, hidden ones too, sorted; of -1 bytes what is there by name alone."""
    storage = Storage(absolute(source))
    head, mark, query = source.partition("?") if storage.is_remote else (source, "", "")
    if _kind_of(head) is not None:
        parent, _, name = head.rstrip("/").rpartition("/")
        folder = Storage((parent or ("" if storage.is_remote else "/" if head.startswith("/") else ".")) + mark + query)
        stamp = folder.stamp(name)
        if stamp is not None:
            return folder, {name: stamp}
    if storage.is_remote:
        stamps = storage.stamps().items()
        files = {name: (size if all(name.split("/")) else -1, changed) for name, (size, changed) in stamps}
    else:
        files = dict(sorted(_files_below(Path(storage.path()))))
    if not files:
        raise ValueError(f"source {source!r} does not exist or is empty")
    return storage, files


def _files_below(folder: Path, name: str = "", *above: Path) -> Iterator[tuple[str, Stamp]]:
    """Name and stamp of each. Links to folders are followed, but not to one that they lie in, without end."""
    place = folder.resolve()
    if place in above or not folder.is_dir():
        return
    with os.scandir(folder) as found:
        for entry in found:
            below = f"{name}{entry.name}"
            try:
                found_there = entry.stat()
            except OSError:  # a link to nothing, or to itself
                yield _text(below), (-1, 0)
                continue
            if stat.S_ISDIR(found_there.st_mode):
                yield from _files_below(folder / entry.name, f"{below}/", *above, place)
            elif not stat.S_ISREG(found_there.st_mode):
                yield _text(below), (-1, 0)
            elif _text(below) != below:
                raise not_utf8(os.fsencode(entry.path))
            else:
                yield below, (found_there.st_size, found_there.st_mtime_ns)


def index_unit(unit: Unit, options: SourceOptions, staging: Staging) -> pa.Table:
    """The entries of one unit; needs no other unit, so units can be gone through anywhere."""
    index: Callable[[Unit, SourceOptions, Staging], Iterator[Entry]]
    match unit.kind:
        case "folder":
            index = _index_folder
        case "tar":
            index = index_tar
        case "parquet":
            index = index_parquet
        case "shards":
            index = _index_shards
        case "torchvision":
            index = index_torchvision
    tables = [ENTRY_SCHEMA.empty_table()]
    try:
        entries = index(unit, options, staging)
        while some := list(islice(entries, _ENTRIES_AT_ONCE)):  # as Python's objects they take eight times the room
            tables.append(pa.Table.from_pylist([_row(entry, unit) for entry in some], schema=ENTRY_SCHEMA))
    finally:
        staging.close()
    return with_ignored(pa.concat_tables(tables).combine_chunks(), unit.ignored)


def _row(entry: Entry, unit: Unit) -> dict[str, Any]:
    return {
        **vars(entry),
        "key": _text(entry.key),
        "class_name": None if entry.class_name is None else _text(entry.class_name),
        "location": entry.location or unit.location,
    }


def _text(name: str) -> str:
    """Names and labels in a tar, and names of links to nothing, may be of any encoding; what is not UTF-8 is written as
    its code.
    """
    return name.encode("utf-8", "backslashreplace").decode()


def _index_folder(unit: Unit, options: SourceOptions, _: Staging) -> Iterator[Entry]:
    """`[<split>/]<class>/…/<image>`, as torchvision's ImageFolder reads it.

    Where no split's folder has class folders, one called `train` is a class of railway pictures, unless a file of
    labels says the classes and there are no other folders.
    """
    places = [split_of_path(name) for name in unit.files]
    has_splits = any(split and len(rest) > 1 for split, rest in places) or (
        bool(options.labels)
        and any(split for split, _ in places)
        and all(split or len(rest) == 1 for split, rest in places)
    )
    for name, size, (split, rest) in zip(unit.files, unit.sizes, places, strict=True):
        if not has_splits:
            split, rest = None, PurePosixPath(name).parts
        elif split is None:
            split, rest = BESIDE, rest[-1:]
        if size < 0:
            reason = "a link to nothing, or no file" if all(name.split("/")) else "a part of its name is empty"
            yield Entry(key=name, file=name, split=split, reason=reason)
            continue
        yield Entry(key=name, file=name, length=size, split=split, class_name=rest[0] if len(rest) > 1 else None)


def _index_shards(unit: Unit, _: SourceOptions, __: Staging) -> Iterator[Entry]:
    """A prepared data set as a source: its images lie in the shards as in a tar."""
    info, splits = open_shards(Storage(unit.location))
    (name,) = unit.files
    split = splits[name]
    for number in range(len(split)):
        yield Entry(
            key=split.key(number),
            file=split.shards[split.shard[number]],
            offset=int(split.offset[number]),
            length=int(split.length[number]),
            split=name,
            class_name=info.classes[split.labels[number]],
        )


def _kind_of(name: str) -> Kind | None:
    lower = name.lower()
    if lower.endswith(_TAR_EXTENSIONS):
        return "tar"
    if lower.endswith(".parquet"):
        return "parquet"
    return "folder" if is_image(name) else None
