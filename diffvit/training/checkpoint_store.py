"""The checkpoints in a run's folder: which there are, which of them are whole, and which are kept.

A reader never sees half of one: on a disk it is written beside its place and moved there, and moved away before it is
deleted; in an object store its manifest, without which it is not a checkpoint, comes last and goes first.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from diffvit.config import CheckpointConfig, ModelConfig
from diffvit.manifest import CHECKPOINT_FOLDER, MANIFEST_NAME, read_manifest
from diffvit.models.origin import origin_of_manifest
from diffvit.scratch import scratch_folder
from diffvit.storage import Storage, StorageError, sync
from diffvit.training.checkpoint import Snapshot, checkpoint_name

_MANIFEST = re.compile(rf"{CHECKPOINT_FOLDER.pattern}/{re.escape(MANIFEST_NAME)}")
_PARTIAL, _DELETED = ".partial-", ".deleted-"

Warn = Callable[[str], None]


class Superseded(RuntimeError):
    """The run has gone on elsewhere, and this process may not write to it any more."""


@dataclass(frozen=True)
class Entry:
    """A checkpoint, as its manifest describes it."""

    step: int
    metrics: dict[str, Any]

    @property
    def name(self) -> str:
        return checkpoint_name(self.step)


class CheckpointStore:
    """The checkpoints of one run, in a folder or below a URL. One process at a time writes; any number may read.

    Readers wait for a store that is away, as long as `checkpoint.retry_minutes` says; who writes is told at once.
    """

    def __init__(self, folder: str | Path, config: CheckpointConfig) -> None:
        self._storage, self._config = Storage(str(folder), 60 * config.retry_minutes), config
        self._hasty = Storage(str(folder), retry_seconds=0)

    def entries(self) -> list[Entry]:
        """Every checkpoint whose manifest can be read, by step; its files may still turn out to be damaged."""
        return _entries(self._storage)

    def newest_whole(self, warn: Warn, up_to: int | None = None, model: ModelConfig | None = None) -> Entry | None:
        """The last checkpoint (at or before step `up_to`) of which every file is what its manifest says.

        Args:
            warn: hears of those that are passed over.
            up_to: a step, or None for all.
            model: pass over what others have saved, as somebody may have copied there.

        Returns:
            None where nothing was ever saved.

        Raises:
            ValueError: there are checkpoints, and none can be used.
        """
        found = {CHECKPOINT_FOLDER.fullmatch(name.split("/")[0]) for name in self._storage.sizes() if "/" in name}
        steps = sorted({int(match[1]) for match in found if match}, reverse=True)
        problems = []
        for step in steps:
            if up_to is not None and step > up_to:
                continue
            try:
                with self.opened(step) as folder:
                    manifest = read_manifest(folder)
                    if model is not None and origin_of_manifest(manifest, folder).model != model:
                        raise ValueError(f"checkpoint {folder} is of another model than the run's")
                    return Entry(step, manifest["metrics"])
            except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
                if not (self._storage.is_remote and isinstance(error, FileNotFoundError)):  # there: an upload was cut
                    problems.append(str(error))
                warn(f"{checkpoint_name(step)} is passed over: {error}")
        if problems:
            raise ValueError(
                f"none of the {len(problems)} checkpoints in {self._storage.uri} can be used; delete them to start "
                f"from the first step, or put one back. The last one: {problems[0]}"
            )
        return None

    @contextmanager
    def opened(self, step: int) -> Iterator[Path]:
        """The checkpoint's folder on a local disk, for as long as the `with` block runs."""
        name = checkpoint_name(step)
        if not self._storage.is_remote:
            yield Path(self._storage.path(name))
            return
        with scratch_folder() as folder:
            for file in self._storage.names(name):
                self._storage.fetch(f"{name}/{file}", folder / file)
            yield folder

    def sweep(self) -> None:
        """Delete what a writer that was killed left half done."""
        self._storage.sweep()
        if not self._storage.is_remote:
            for prefix in (_PARTIAL, _DELETED):
                for left in Path(self._storage.path()).glob(f"{prefix}*"):
                    shutil.rmtree(left, ignore_errors=True)
            return
        with suppress(StorageError):
            names = self._hasty.sizes()
            found = {name.split("/")[0] for name in names if CHECKPOINT_FOLDER.fullmatch(name.split("/")[0])}
            for name in found - {name.split("/")[0] for name in names if _MANIFEST.fullmatch(name)}:
                self._hasty.delete_folder(name)

    def put(self, snapshot: Snapshot, before_publishing: Callable[[], None] = lambda: None) -> None:
        """Write a checkpoint, in the place of one of the same step if there is one.

        Args:
            snapshot: the checkpoint.
            before_publishing: called when all of it is written, and no reader sees it yet; may raise.

        Raises:
            OSError, StorageError: the store is away or full; nothing of it is left where a reader looks.
        """
        if self._storage.is_remote:
            self._upload(snapshot, before_publishing)
            return
        target = Path(self._storage.path(checkpoint_name(snapshot.step)))
        partial = target.with_name(_PARTIAL + target.name)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            snapshot.write(partial)
            for path in (*partial.iterdir(), partial):
                sync(path)
            before_publishing()
            self._delete(target.name)
            partial.rename(target)
            sync(target.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def describe(self, step: int, metrics: dict[str, Any]) -> None:
        """Put `metrics` in the place of those of a checkpoint that is there.

        Raises:
            OSError, StorageError: the store is away or full, and the metrics are the old ones.
        """
        name = f"{checkpoint_name(step)}/{MANIFEST_NAME}"
        manifest = json.loads(self._hasty.read(name)) | {"metrics": metrics}
        self._hasty.write(name, (json.dumps(manifest, indent=2) + "\n").encode())

    def _upload(self, snapshot: Snapshot, before_publishing: Callable[[], None]) -> None:
        name = checkpoint_name(snapshot.step)
        with scratch_folder() as folder:
            snapshot.write(folder)
            files = sorted(folder.iterdir(), key=lambda file: file.name == MANIFEST_NAME)
            self._delete(name)
            for file in files:
                if file.name == MANIFEST_NAME:
                    before_publishing()
                with pa.memory_map(str(file)) as mapped:
                    self._hasty.write(f"{name}/{file.name}", mapped.read_buffer())

    def drop_others(self, newest: int, pinned: Collection[int] = ()) -> None:
        """Delete what `kept_steps` does not name, up to step `newest`."""
        entries = [entry for entry in _entries(self._hasty) if entry.step <= newest]
        kept = kept_steps(entries, self._config.keep_last, self._config.keep_every_epochs) | {*pinned}
        for entry in entries:
            if entry.step not in kept:
                self._delete(entry.name)

    def _delete(self, name: str) -> None:
        """Delete a checkpoint, if it is there: for whoever reads at once."""
        if self._storage.is_remote:
            self._hasty.delete(f"{name}/{MANIFEST_NAME}")
            self._hasty.delete_folder(name)
            return
        folder = Path(self._storage.path(name))
        if folder.exists():
            away = folder.with_name(_DELETED + name)
            if away.exists():
                shutil.rmtree(away)
            folder.rename(away)
            shutil.rmtree(away, ignore_errors=True)


def _entries(storage: Storage) -> list[Entry]:
    found = []
    for name in storage.sizes():
        match = _MANIFEST.fullmatch(name)
        if not match:
            continue
        try:
            metrics = json.loads(storage.read(name))["metrics"]
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            continue
        found.append(Entry(int(match[1]), metrics))
    return sorted(found, key=lambda entry: entry.step)


def newest_written(folder: str) -> str | None:
    """Name of the newest checkpoint of a run, which may be a damaged one; None where there is none, or none in reach.

    For who asks often: it reads no file and does not wait for a store that is away.
    """
    storage = Storage(folder, retry_seconds=0)
    with suppress(OSError, StorageError):
        for name in sorted(storage.names(), reverse=True):
            if _MANIFEST.fullmatch(f"{name}/{MANIFEST_NAME}") and storage.size(f"{name}/{MANIFEST_NAME}") is not None:
                return name
    return None


def kept_steps(entries: Sequence[Entry], keep_last: int, keep_every_epochs: int | None = None) -> set[int]:
    """Steps of the last `keep_last` checkpoints, of the best (top-1; the first of equals), and of every so many epochs.

    `entries` by step. Only checkpoints at the end of an epoch, which were evaluated, can be the best.
    """
    evaluated = [entry for entry in entries if "top1" in entry.metrics]
    kept = {entry.step for entry in entries[-keep_last:]}
    if evaluated:
        kept.add(max(evaluated, key=lambda entry: float(entry.metrics["top1"])).step)
    if keep_every_epochs:
        kept |= {entry.step for entry in evaluated if entry.metrics["epoch"] % keep_every_epochs == 0}
    return kept
