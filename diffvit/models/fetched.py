"""A run, a checkpoint or a file of weights wherever it lies, as one on this machine's disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from diffvit.manifest import CHECKPOINT_FOLDER
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
    run = "results.json" in names
    wanted = f"{_checkpoint_of(store.read('results.json'), which)}/" if run else ""
    if wanted not in ("", "none/") and not any(name.startswith(wanted) for name in names):
        wanted = ""  # deleted: who reads the copy takes the best of the others, as from a disk
    for name in names:
        folder, _, file = name.rpartition("/")
        in_checkpoint = name.startswith(wanted) and (CHECKPOINT_FOLDER.fullmatch(folder) or not run)
        if in_checkpoint and only not in (None, file):
            continue
        if not in_checkpoint and folder.startswith(("checkpoint_step_", "audit")):
            continue
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        store.fetch(name, copy / name)


def _checkpoint_of(results: bytes, which: str) -> str:
    """Its folder's name; `none` where there is none, or `results` are damaged, which who reads the copy tells."""
    try:
        content = json.loads(results)
        return str((content.get(which) or content.get("last") or {}).get("checkpoint") or "none")
    except (ValueError, AttributeError):
        return "none"
