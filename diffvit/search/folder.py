"""`<storage>/<name>/`: the folder of a sweep, and what is checked before it is used.

sweep.json     recipe, search and space, written before the first trial
study.db       Optuna's study and every record (`diffvit.search.records`)
trials/        one folder a trial: config.json, tensorboard/
finalists/     one folder a finalist and seed, with its last checkpoint
trials.csv, best.json, results.json, report.html
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffvit.search.config import SweepConfig, differing_sweep_fields, sweep_from_json, sweep_to_json

SWEEP_FILE = "sweep.json"
_LOCK_FILE = ".lock"


def open_sweep(sweep: SweepConfig) -> None:
    """Make sure that the sweep can be written and is not another one of the same name.

    Raises:
        ValueError: the name is taken by a sweep with another recipe, space or way of judging (or by any, with
            `resume` off), by something that is no sweep, or the folder cannot be written.
    """
    folder, name = sweep.run.folder, sweep.run.name
    existing = folder / SWEEP_FILE
    if existing.exists():
        if not sweep.run.resume:
            raise ValueError(f"sweep {name!r} exists in {folder}; choose another --name or leave --resume on")
        differing = differing_sweep_fields(sweep_from_json(existing.read_bytes(), str(existing)), sweep)
        if differing:
            lines = "".join(f"\n  {field}: {old!r} there, {new!r} now" for field, (old, new) in differing.items())
            raise ValueError(
                f"sweep {name!r} exists in {folder} with other values; choose another --name, "
                f"or the same values to continue it:{lines}"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files but no {SWEEP_FILE}: it is not a sweep; choose another --name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(existing, sweep_to_json(sweep))
    except OSError as error:
        raise ValueError(f"storage {folder.parent} cannot be written: {error.strerror or error}") from None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep every other process out of the sweep for as long as the block runs, or until this process ends.

    Raises:
        ValueError: another process has it.
    """
    with (folder / _LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process runs the sweep in {folder}; wait for it, or end it") from None
        yield


def write_atomically(path: Path, text: str) -> None:
    """Write the whole file or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
