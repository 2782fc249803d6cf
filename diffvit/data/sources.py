"""Where encoded images lie: the embedded sample or an image folder, as numbered, labelled splits.

A split is small to send (columns of paths or row numbers, not images) and reads one image by its number, so any
process can fetch what the order asks for. Nothing here knows of Ray.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from diffvit.config import DataConfig

SAMPLE = "sample"
IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
_TRAIN_FOLDER = "train"
_VAL_FOLDERS = ("val", "validation", "test")
_SPLIT_STREAM = 3  # apart from the streams of order.py

Labels = npt.NDArray[np.int64]


class Split(Protocol):
    """Images numbered from 0, each with a key that is unique in its data set."""

    @property
    def labels(self) -> Labels: ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...

    def read(self, index: int) -> bytes:
        """The encoded image; OSError when it cannot be read."""
        ...


@dataclass(frozen=True)
class Dataset:
    """A training and a validation split over the same classes; class c is `classes[c]`."""

    classes: tuple[str, ...]
    train: Split
    val: Split


@dataclass(frozen=True)
class FolderSplit:
    """Image files under `root`; a key is a file's path below it."""

    root: str
    paths: pa.StringArray
    labels: Labels

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, index: int) -> str:
        return str(self.paths[index].as_py())

    def read(self, index: int) -> bytes:
        return Path(self.root, self.key(index)).read_bytes()


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

    def read(self, index: int) -> bytes:
        encoded: bytes = _sample_table(self.name)["image"][index].as_py()
        return encoded


@lru_cache
def _sample_table(name: str) -> pa.Table:
    return pq.read_table(Path(__file__).parent / SAMPLE / f"{name}.parquet").combine_chunks()


def open_dataset(config: DataConfig) -> Dataset:
    """The data set that `config` names.

    Raises:
        ValueError: no such folder, no class folders, a class without images, or classes that differ between the
            splits; the message names the folder.
    """
    if config.path == SAMPLE:
        classes = json.loads(_sample_table("train").schema.metadata[b"classes"])
        return Dataset(tuple(classes), SampleSplit("train"), SampleSplit("test"))
    return _open_folder(config)


def _open_folder(config: DataConfig) -> Dataset:
    if not config.path:
        raise ValueError(f"data.path is missing: give an image folder (--data.path FOLDER) or '{SAMPLE}'")
    root = Path(config.path).expanduser().absolute()
    if not root.is_dir():
        raise ValueError(
            f"data.path must be an image folder or '{SAMPLE}', got {config.path!r}: "
            f"{'it is a file' if root.exists() else 'it does not exist'}"
        )
    if not (root / _TRAIN_FOLDER).is_dir():
        return _split_folder(root, config)
    train_files = _files_by_class(root / _TRAIN_FOLDER)
    val_folder = next((root / name for name in _VAL_FOLDERS if (root / name).is_dir()), None)
    if val_folder is None:
        return _split_folder(root / _TRAIN_FOLDER, config)
    val_files = _files_by_class(val_folder)
    if set(train_files) != set(val_files):
        odd = sorted(set(train_files) ^ set(val_files))
        raise ValueError(
            f"{root / _TRAIN_FOLDER} and {val_folder} must hold the same class folders; only one has: {_some(odd)}"
        )
    return Dataset(
        tuple(train_files),
        _folder_split(root, list(train_files.values())),
        _folder_split(root, list(val_files.values())),
    )


def _split_folder(root: Path, config: DataConfig) -> Dataset:
    """Hold `val_fraction` of each class out, the same images for the same `split_seed`."""
    rng = np.random.default_rng((config.split_seed, _SPLIT_STREAM))
    train_files, val_files = [], []
    files_by_class = _files_by_class(root)
    for name, files in files_by_class.items():
        if len(files) < 2:
            raise ValueError(f"class folder {root / name} has one image; a split into training and validation needs 2")
        held_out = min(max(math.floor(len(files) * config.val_fraction + 0.5), 1), len(files) - 1)
        shuffled = [files[i] for i in rng.permutation(len(files))]
        val_files.append(sorted(shuffled[:held_out]))
        train_files.append(sorted(shuffled[held_out:]))
    return Dataset(tuple(files_by_class), _folder_split(root, train_files), _folder_split(root, val_files))


def _folder_split(root: Path, files_by_class: Sequence[Sequence[Path]]) -> FolderSplit:
    paths = [str(path.relative_to(root)) for files in files_by_class for path in files]
    labels = np.repeat(np.arange(len(files_by_class)), [len(files) for files in files_by_class])
    return FolderSplit(str(root), pa.array(paths, pa.string()), labels)


def _files_by_class(root: Path) -> dict[str, list[Path]]:
    """`{class: its image files}`, both sorted by name, so that numbers do not depend on the file system."""
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise ValueError(f"{root} has no class folders; expected <class>/<image> below it")
    files_by_class = {
        name: sorted(
            Path(folder, file)
            for folder, _, files in os.walk(root / name)
            for file in files
            if Path(file).suffix.lower() in IMAGE_EXTENSIONS and not file.startswith(".")
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
