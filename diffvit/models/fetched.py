"""A run, a checkpoint or a file of weights wherever it lies, as one on this machine's disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from diffvit.manifest import CHECKPOINT_FOLDER, MANIFEST_NAME, best_there
from diffvit.scratch import scratch_folder
from diffvit.storage import Storage, StorageError


@contextmanager
def on_disk(source: str | Path, which: Literal["best", "last"] = "best", only: str | None = None) -> Iterator[Path]:
    """What `source` names, for as long as the `with` block runs: itself, or a copy of what lies at a URL.

    Args:
        source: a path, or an s3:// or gs:// URL.
        which: the checkpoint of a run that is copied, with the run's own files.
        only: the one file of that checkpoint that is needed.

    Raises:
        ValueError: there is nothing at the URL, or its store is away.
    """
    if "://" not in str(source):
        yield Path(source).expanduser()
        return
    url = str(source).partition("?")[0].rstrip("/")
    with scratch_folder() as folder:
        copy = folder / url.rpartition("/")[2]
        try:
            _fetch(Storage(str(source)), copy, which, only)
        except (FileNotFoundError, StorageError) as error:
            raise ValueError(f"{url} cannot be read: {error}") from None
        try:
            yield copy
        except ValueError as error:
            raise ValueError(str(error).replace(str(copy), url)) from None


def _fetch(store: Storage, copy: Path, which: str, only: str | None) -> None:
    names = list(store.sizes())
    if not names:
        head, mark, query = store.uri.partition("?")
        parent, _, name = head.rstrip("/").rpartition("/")
        Storage(f"{parent}{mark}{query}").fetch(name, copy)
        return
    if MANIFEST_NAME not in names:
        wanted = _wanted(store, names, copy, which)
        names = [name for name in names if _is_of_run(name) or name.startswith(f"{wanted}/")]
    for name in names:
        folder, _, file = name.rpartition("/")
        in_checkpoint = MANIFEST_NAME in names or CHECKPOINT_FOLDER.fullmatch(folder)
        if not in_checkpoint or only in (None, file):
            _fetch_file(store, name, copy)


def _wanted(store: Storage, names: list[str], copy: Path, which: str) -> str:
    """The folder of the checkpoint to copy: that of `results.json`, or the best of what is there, as from a disk.

    Raises:
        FileNotFoundError: these are not the files of a run, and a mistaken URL may have terabytes below it.
    """
    run = "results.json" in names
    there = {name.rpartition("/")[0] for name in names if name.endswith(f"/{MANIFEST_NAME}")}
    there = {folder for folder in there if CHECKPOINT_FOLDER.fullmatch(folder)}
    if not run and not there:
        raise FileNotFoundError(f"it is neither a run with a checkpoint nor a checkpoint ({MANIFEST_NAME})")
    named = _checkpoint_of(store.read("results.json"), which) if run else ""
    if named in ("none", *there):
        return named
    for folder in there:
        _fetch_file(store, f"{folder}/{MANIFEST_NAME}", copy)
    best = best_there(copy)
    return best.name if best else "none"


def _is_of_run(name: str) -> bool:
    """Of the files of a run, whether it lies neither in a checkpoint nor in its audit."""
    return not name.rpartition("/")[0].startswith(("checkpoint_step_", "audit"))


def _fetch_file(store: Storage, name: str, copy: Path) -> None:
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    store.fetch(name, copy / name)


def _checkpoint_of(results: bytes, which: str) -> str:
    """Its folder's name; `none` where there is none, or `results` are damaged, which who reads the copy tells."""
    try:
        content = json.loads(results)
        return str((content.get(which) or content.get("last") or {}).get("checkpoint") or "none")
    except (ValueError, AttributeError):
        return "none"
