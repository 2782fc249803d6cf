"""`<storage>/<name>/`: the folder of a run, what is checked before it is used, and the two JSON files of its own.

It lies on a disk or in an object store.

config.json    the run's config, written before the first step
results.json   status, best and last checkpoint, speed, versions; written when a sitting ends
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from diffvit.config import RunConfig, differing_fields, from_json, to_json
from diffvit.models.vit import VisionTransformer
from diffvit.storage import Storage, StorageError
from diffvit.training.checkpoint_store import CheckpointStore, Entry
from diffvit.training.logbook import Logbook
from diffvit.training.run_lock import LOCK_NAME
from diffvit.training.utilisation import arithmetic

CONFIG_NAME = "config.json"
RESULTS_NAME = "results.json"
_LIBRARIES = ("torch", "torchvision", "ray", "numpy", "pyarrow", "pillow")
_SPARE_BYTES = 64 * 2**20


def open_run(config: RunConfig) -> dict[str, Any] | None:
    """Make sure that the run can be written and is not another one of the same name.

    Returns:
        The results of an earlier sitting, or None.

    Raises:
        ValueError: the name is taken by a run with another config (or by any run, with `resume` off), or the folder
            cannot be written or has too little space.
    """
    run = Storage(config.location)
    try:
        existing = _read(run, CONFIG_NAME)
        if existing is not None:
            _require_same_run(existing, config)
        elif any(LOCK_NAME not in name for name in run.names()):
            where = run.uri.partition("?")[0]
            raise ValueError(f"{where} holds files but no {CONFIG_NAME}: it is not a run; choose another --name")
        if not config.is_remote:
            _require_writable(config.folder, _checkpoint_bytes(config), config.checkpoint.keep_last + 2)
        run.write(CONFIG_NAME, to_json(config).encode())
        results = _read(run, RESULTS_NAME)
    except StorageError as error:
        raise ValueError(f"storage cannot be used: {error}") from None
    return None if results is None else json.loads(results)


def close_run(config: RunConfig, status: str, reason: str | None, started: float) -> dict[str, Any]:
    """Write down how a sitting ended that began at `started` (of `time.monotonic`); the content of `results.json`."""
    logbook = Logbook(config.location)
    if reason:
        logbook.cut(reason.splitlines()[0])
    results: dict[str, Any] = {"status": status, "reason": reason}
    results |= summarise(CheckpointStore(config.location, config.checkpoint).entries())
    results |= arithmetic(results, config.model)
    results |= {
        "interruptions": logbook.interruptions,
        "seed": config.seed,
        "wall_seconds": round(time.monotonic() - started, 1),
    }
    write_results(config.location, results)
    return results


def write_results(location: str | Path, results: dict[str, Any]) -> None:
    """Write `results.json`; the command, versions and commit that made them are added."""
    content = json.dumps({**results, **_provenance()}, indent=2) + "\n"
    Storage(str(location)).write(RESULTS_NAME, content.encode())


def _read(run: Storage, name: str) -> bytes | None:
    try:
        return run.read(name)
    except (FileNotFoundError, NotADirectoryError):
        return None


def summarise(checkpoints: Sequence[Entry]) -> dict[str, Any]:
    """The best and the last checkpoint, and the speed of the last epoch."""
    if not checkpoints:
        return {"best": None, "last": None}
    entries = [{**entry.metrics, "checkpoint": entry.name} for entry in checkpoints]
    last = max(entries, key=lambda entry: entry["step"])
    evaluated = [entry for entry in entries if "top1" in entry]
    best = max(evaluated, key=lambda entry: entry["top1"], default=None)
    names = ("epoch", "step", "top1", "top5", "loss", "checkpoint")
    whole_run = (
        "images_per_second",
        "data_wait_fraction",
        "train_seconds",
        "skipped_images",
        "world_sizes",
        "device",
        "poisoned_steps",
        "rollbacks",
    )
    return {
        "best": best and {name: best[name] for name in names},
        "last": {name: last.get(name) for name in names},
        **{name: last[name] for name in whole_run if name in last},
    }


def _require_same_run(existing: bytes, config: RunConfig) -> None:
    where = config.location.partition("?")[0]
    if not config.resume:
        raise ValueError(f"run {config.name!r} exists in {where}; choose another --name or leave --resume on")
    differing = differing_fields(from_json(existing, f"{where}/{CONFIG_NAME}"), config)
    if differing:
        lines = "".join(f"\n  {name}: {old!r} there, {new!r} now" for name, (old, new) in differing.items())
        raise ValueError(
            f"run {config.name!r} exists in {where} with another config; choose another --name, "
            f"or the same values to continue it:{lines}"
        )


def _require_writable(folder: Path, checkpoint_bytes: int, checkpoints: int) -> None:
    """Try for real: permission bits say nothing of a full or read-only file system."""
    probe = folder / f".write-test-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(f"storage {folder.parent} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    needed = checkpoints * checkpoint_bytes + _SPARE_BYTES  # the last ones, the best and the one being written
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"storage {folder.parent} has {free / 2**20:.0f} MiB free, "
            f"this model's checkpoints need {needed / 2**20:.0f} MiB"
        )


def _checkpoint_bytes(config: RunConfig) -> int:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in VisionTransformer(config.model).parameters())
    copies = 3 if not config.optim.ema_decay else 4  # weights and AdamW's two moments; with EMA both sets of weights
    return 4 * copies * parameters


def _provenance() -> dict[str, Any]:
    return {
        "git_commit": _git_commit(),
        "versions": {name: metadata.version(name) for name in _LIBRARIES},
    }


def _git_commit() -> str | None:
    """Of the source tree this runs from, with '+changes' where it differs; None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
