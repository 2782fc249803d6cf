"""Where encoded images lie: the embedded sample, prepared shards or an image folder, as numbered, labelled splits.

A split is small to send (columns of paths or row numbers, not images) and reads one image by its number, so any
process can fetch what the order asks for. Nothing here knows of Ray.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from diffvit.config import DataConfig
from diffvit.data.shards import INFO_NAME, open_shards
from diffvit.data.splitting import hold_out
from diffvit.storage import MACHINE_ERRORS, Storage, StorageError, absolute

SAMPLE = "sample"
SAMPLE_FOLDER = Path(__file__).parent / SAMPLE
IMAGE_EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".avif", ".avifs", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"}
)
_TRAIN_FOLDER = "train"
_VAL_FOLDERS = ("val", "valid", "validation", "test")

Labels = npt.NDArray[np.int64]
Indices = npt.NDArray[np.int64]


class Split(Protocol):
    """Images numbered from 0, each with a key that is unique in its data set."""

    @property
    def labels(self) -> Labels: ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...

    def read_many(self, indices: Indices) -> Iterator[bytes | OSError]:
        """The encoded images, in this order; an OSError in the place of one that cannot be read."""
        ...


@dataclass(frozen=True)
class Dataset:
    """A training and a validation split over the same classes; class c is `classes[c]`."""

    classes: tuple[str, ...]
    train: Split
    val: Split
    mean: tuple[float, ...] = ()
    """Of pixels in [0, 1] by channel; empty where nobody counted."""
    std: tuple[float, ...] = ()


@dataclass(frozen=True)
class FolderSplit:
    """Image files under `root`; a key is a file's path below it.

    Where the folder is not there, or the machine fails, that is a StorageError and no fault of an image.
    """

    root: str
    paths: pa.StringArray
    labels: Labels

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, index: int) -> str:
        return str(self.paths[index].as_py())

    def read_many(self, indices: Indices) -> Iterator[bytes | OSError]:
        for index in indices.tolist():
            try:
                yield Path(self.root, self.key(index)).read_bytes()
            except OSError as error:
                if error.errno in MACHINE_ERRORS or not Path(self.root).is_dir():
                    node, reason = socket.gethostname(), error.strerror or error
                    raise StorageError(f"{self.root} cannot be read on the node {node}: {reason}") from None
                yield error


@dataclass(frozen=True)
class SampleSplit:
    """The Parquet file of a split of the embedded sample, found anew wherever the package is installed."""

    name: str

    @property
    def labels(self) -> Labels:
        labels: Labels = _sample_table(self.name)["label"].to_numpy()
        return labels

    def __len__(self) -> int:
        return int(_sample_table(self.name).num_rows)

    def key(self, index: int) -> str:
        return str(_sample_table(self.name)["key"][index].as_py())

    def read_many(self, indices: Indices) -> Iterator[bytes | OSError]:
        images = _sample_table(self.name)["image"]
        return (images[index].as_py() for index in indices.tolist())


@lru_cache
def _sample_table(name: str) -> pa.Table:
    return pq.read_table(SAMPLE_FOLDER / f"{name}.parquet").combine_chunks()


def open_dataset(config: DataConfig) -> Dataset:
    """The data set that `config` names.

    Raises:
        ValueError: no such folder, no class folders, a class without images, classes that differ between the
            splits, or a prepared data set that is not whole; the message names the folder.
        StorageError: the object store is away.
    """
    if config.path == SAMPLE:
        classes = json.loads(_sample_table("train").schema.metadata[b"classes"])
        return Dataset(tuple(classes), SampleSplit("train"), SampleSplit("test"))
    if not config.path:
        raise ValueError(f"data.path is missing: give an image folder or shards (--data.path FOLDER) or '{SAMPLE}'")
    storage = Storage(absolute(config.path))  # workers have other working directories
    try:
        return _open_shards(storage)
    except (FileNotFoundError, NotADirectoryError):
        if storage.is_remote:
            raise ValueError(
                f"data.path {config.path!r} holds no {INFO_NAME}; an object store is read as shards: "
                "ray_jobs/prepare.py makes them"
            ) from None
    return _open_folder(config)


def _open_shards(storage: Storage) -> Dataset:
    info, splits = open_shards(storage)
    return Dataset(tuple(info.classes), splits["train"], splits["val"], tuple(info.mean), tuple(info.std))


def _open_folder(config: DataConfig) -> Dataset:
    root = Path(config.path).expanduser().absolute()
    if not root.is_dir():
        raise ValueError(
            f"data.path must be an image folder or '{SAMPLE}', got {config.path!r}: "
            f"{'it is a file' if root.exists() else 'it does not exist'}"
        )
    named = {name.lower(): root / name for name in _class_folders(root)}  # of Train and train, the last in order
    train_folder = named.get(_TRAIN_FOLDER, root / _TRAIN_FOLDER)
    if not _class_folders(train_folder):  # none, or a class of that name
        return _split_folder(root, config)
    train_files = _files_by_class(train_folder)
    val_folder = next((named[name] for name in _VAL_FOLDERS if name in named), None)
    if val_folder is None:
        return _split_folder(train_folder, config)
    val_files = _files_by_class(val_folder)
    if set(train_files) != set(val_files):
        odd = sorted(set(train_files) ^ set(val_files))
        raise ValueError(
            f"{train_folder} and {val_folder} must hold the same class folders; only one has: {_some(odd)}"
        )
    return Dataset(
        tuple(train_files),
        _folder_split(root, list(train_files.values())),
        _folder_split(root, list(val_files.values())),
    )


def _split_folder(root: Path, config: DataConfig) -> Dataset:
    """Hold `val_fraction` of each class out, the same images for the same `split_seed`."""
    files_by_class = _files_by_class(root)
    everything = _folder_split(root, list(files_by_class.values()))
    train, val = (
        FolderSplit(everything.root, everything.paths.take(pa.array(rows)), everything.labels[rows])
        for rows in hold_out(everything.labels, config.val_fraction, config.split_seed, tuple(files_by_class))
    )
    return Dataset(tuple(files_by_class), train, val)


def _folder_split(root: Path, files_by_class: Sequence[Sequence[Path]]) -> FolderSplit:
    paths = [str(path.relative_to(root)) for files in files_by_class for path in files]
    labels = np.repeat(np.arange(len(files_by_class)), [len(files) for files in files_by_class])
    try:
        return FolderSplit(str(root), pa.array(paths, pa.string()), labels)
    except UnicodeEncodeError as error:
        raise not_utf8(os.fsencode(error.object)) from None


def not_utf8(name: bytes) -> ValueError:
    return ValueError(f"names of files must be UTF-8, got {name.decode(errors='backslashreplace')}; rename it")


def walk(root: Path | str, *above: Path) -> Iterator[tuple[str, list[str]]]:
    """Every folder at and below `root` with the names in it that are no folders. Links to folders are followed.

    Each folder comes once, whatever links lead to it, and those `above` never. Pipes, sockets and devices, of which a
    read may never end, are left out; links to nothing are not.
    """
    seen, folders = {path.resolve() for path in above}, [str(root)]
    while folders:
        folder = folders.pop()
        place = Path(folder).resolve()
        if place in seen:
            continue
        seen.add(place)
        below, files = [], []
        with os.scandir(folder) as found:
            for entry in found:
                there: os.DirEntry[str] | Path = Path(entry.path) if entry.is_symlink() else entry
                if there.is_dir():
                    below.append(entry.path)
                elif there.is_file() or (isinstance(there, Path) and not there.exists()):
                    files.append(entry.name)
        yield folder, files
        folders += sorted(below, reverse=True)


def sort_classes(names: Iterable[str]) -> tuple[str, ...]:
    """By number where all of them are numbers, else by name: the same from a folder and from what is prepared of it."""
    names = sorted(names)
    if all(name.isdecimal() for name in names):
        names.sort(key=int)  # 01 and 1, which are two, stay in the order of their names
    return tuple(names)


def _class_folders(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        return ()
    return sort_classes(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _files_by_class(root: Path) -> dict[str, list[Path]]:
    """`{class: its image files}`, both sorted, so that numbers do not depend on the file system."""
    folders = _class_folders(root)
    if len(folders) < 2:
        raise ValueError(
            f"{root} must hold at least 2 class folders, <class>/<image>, it has "
            + (
                f"only {folders[0]!r}; where that is a folder around the classes, name it instead"
                if folders
                else "none"
            )
        )
    files_by_class = {
        name: sorted(
            Path(folder, file)
            for folder, files in walk(root / name, root)
            for file in files
            if Path(file).suffix.lower() in IMAGE_EXTENSIONS
            and not any(part.startswith(".") for part in (*Path(folder).relative_to(root).parts, file))
        )
        for name in folders
    }
    empty = [name for name, files in files_by_class.items() if not files]
    if empty:
        raise ValueError(
            f"{len(empty)} class folders of {root} hold no images: {_some(empty)} "
            f"(images end in {', '.join(sorted(IMAGE_EXTENSIONS))})"
        )
    return files_by_class


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")
