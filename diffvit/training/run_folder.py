"""`<storage>/<name>/`: the folder of a run, what is checked before it is used, and the three JSON files of its own.

It lies on a disk or in an object store.

config.json    the run's config, written before the first step
data.json      by which its images are known again: how many of each split, and a digest of their keys and labels
results.json   status, best and last checkpoint, speed, versions; written when a sitting ends
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from diffvit.config import RunConfig, differing_fields, from_json, listed, to_json
from diffvit.data.fingerprint import DATA_NAME, Fingerprint, known_images, require_same
from diffvit.manifest import CHECKPOINT_FOLDER, checkpoints_in
from diffvit.models.vit import VisionTransformer
from diffvit.storage import UNFINISHED_SUFFIX, Storage, StorageError
from diffvit.training.audit import AUDIT_FOLDER
from diffvit.training.checkpoint_store import CheckpointStore, Entry
from diffvit.training.event_log import TENSORBOARD_FOLDER
from diffvit.training.logbook import LOGBOOK_FILES, Logbook
from diffvit.training.notes import MESSAGES_FILE, SKIPPED_FILE
from diffvit.training.provenance import provenance
from diffvit.training.run_lock import LOCK_NAME
from diffvit.training.utilisation import arithmetic

CONFIG_NAME = "config.json"
RESULTS_NAME = "results.json"
_SPARE_BYTES = 64 * 2**20
_TEMPORARY = re.compile(
    rf"\..+{re.escape(UNFINISHED_SUFFIX)}|\.{re.escape(LOCK_NAME)}\.[0-9a-f]{{32}}|\.write-test-\d+"
)
_TEMPORARY_SECONDS = 60.0
"""What was not written to for so long is nobody's."""


def open_run(config: RunConfig, images: Fingerprint) -> dict[str, Any] | None:
    """Make sure that the run can be written and is not another one of the same name.

    The `results.json` of a sitting that did not finish goes: while another one is under way it would be out of date.
    A run that ended before its first checkpoint has nothing to lose, and may begin again with another config.

    Args:
        config: of the run, as `resolve` completes it.
        images: its 'training' and 'validation' images (`fingerprint_of`); a run that goes on must have those it had,
            which may lie at another `data.path` than before.

    Returns:
        The results of an earlier sitting, or None.

    Raises:
        ValueError: the name is taken by a run with another config or other images (or by any run, with `resume` off),
            or the folder cannot be written or has too little space.
    """
    run = Storage(config.location)
    try:
        existing = run.read_or_none(CONFIG_NAME)
        results = _results(run) if existing is not None else None
        if existing is not None:
            _require_resume(config)
            if _has_checkpoints(run) or (results is not None and results.get("last") is not None):
                known = known_images(run)
                _require_same_config(existing, config, moved=known is not None)
                require_same(known, images, f"run {config.name!r}", config.data.path)
            elif _is_another(existing, config):
                _forget(run)
        elif any(LOCK_NAME not in name and not _TEMPORARY.fullmatch(name) for name in run.names()):
            where = run.uri.partition("?")[0]
            raise ValueError(f"{where} holds files but no {CONFIG_NAME}: it is not a run; choose another --name")
        if existing is not None and results is not None and results["status"] == "finished":
            _note_path(run, existing, config)
            return results
        if not config.is_remote:
            there = len(checkpoints_in(config.folder))
            # the last ones, the best, the good one and the one being written
            _require_writable(config.folder, _checkpoint_bytes(config), max(config.checkpoint.keep_last + 3 - there, 1))
        run.write(CONFIG_NAME, _content(config))
        run.write(DATA_NAME, images.to_json().encode())
        run.delete(RESULTS_NAME)
        if not config.is_remote:
            _sweep(config.folder)
    except StorageError as error:
        raise ValueError(f"storage cannot be used: {error}") from None
    return results


def begun(config: RunConfig) -> RunConfig | None:
    """The config of the run that goes on at `config.location`; None where there is none with a checkpoint.

    Raises:
        ValueError: it cannot be read.
    """
    run = Storage(config.location)
    content = run.read_or_none(CONFIG_NAME)
    if content is None or not _has_checkpoints(run):
        return None
    return from_json(content, f"{config.location.partition('?')[0]}/{CONFIG_NAME}")


def _has_checkpoints(run: Storage) -> bool:
    return any(CHECKPOINT_FOLDER.fullmatch(name) for name in run.names())


def not_the_same_folder(config: RunConfig) -> str | None:
    """Why this node is not to write to the run that `open_run` opened on another: it sees another folder, or none.

    There the run would begin at its first step again whenever its rank 0 comes to lie on another node.
    """
    if Storage(config.location).read_or_none(CONFIG_NAME) == _content(config):
        return None
    where = config.location.partition("?")[0]
    return (
        f"storage must be a folder that every node sees, or s3:// or gs://, got {config.storage.partition('?')[0]!r}: "
        f"{where}/{CONFIG_NAME} on node {socket.gethostname()} is not the one that this job has written"
    )


def _content(config: RunConfig) -> bytes:
    """That of `config.json`, from which the run can be continued however it was begun."""
    return to_json(dataclasses.replace(config, resume=True)).encode()


def _sweep(folder: Path) -> None:
    """Delete the files beside their place that processes left which were killed while they wrote them."""
    now = (folder / CONFIG_NAME).stat().st_mtime  # written just now, and by the clock of the disk
    for path in (*folder.glob(".*"), *folder.glob("*/.*")):
        if _TEMPORARY.fullmatch(path.name) and now - path.stat().st_mtime > _TEMPORARY_SECONDS:
            path.unlink(missing_ok=True)


def close_run(config: RunConfig, status: str, reason: str | None, started: float) -> dict[str, Any]:
    """Write down how a sitting ended that began at `started` (of `time.monotonic`); the content of `results.json`.

    Where it did not end well, storage that is away is neither waited for nor an error: what ended it is told instead.

    Raises:
        OSError, StorageError: the run is finished, and that cannot be written.
    """
    logbook, finished = Logbook(config.location), status == "finished"
    results: dict[str, Any] = {"status": status, "reason": reason}
    patience = config.checkpoint if finished else dataclasses.replace(config.checkpoint, retry_minutes=0.0)
    try:
        if reason:
            logbook.cut(reason.splitlines()[0])
        results |= summarise(CheckpointStore(config.location, patience).entries())
        results |= _start(results.pop("first_step_at", None), started)
        results |= arithmetic(results, config)
        results |= {
            "interruptions": logbook.interruptions,
            "seed": config.seed,
            "wall_seconds": round(time.monotonic() - started, 1),
        }
        write_results(config.location, results, None if finished else 0.0)
    except (OSError, StorageError):
        if finished:
            raise
    return results


def _start(first_step_at: float | None, started: float) -> dict[str, float]:
    """How long the sitting took until it had taken its first step; nothing where it saved none that it took."""
    seconds = 0.0 if first_step_at is None else first_step_at - time.time() + time.monotonic() - started
    return {"seconds_to_first_step": round(seconds, 1)} if seconds > 0 else {}


def write_results(location: str | Path, results: dict[str, Any], retry_seconds: float | None = None) -> None:
    """Write `results.json`; the versions and the commit that made them are added."""
    content = json.dumps({**results, **provenance()}, indent=2) + "\n"
    Storage(str(location), retry_seconds).write(RESULTS_NAME, content.encode())


def _results(run: Storage) -> dict[str, Any] | None:
    """None too where they cannot be read: of a run that goes on they are written anew."""
    with suppress(ValueError):
        results = json.loads(run.read_or_none(RESULTS_NAME) or b"")
        if isinstance(results, dict) and "status" in results:
            return results
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
        "precisions",
        "poisoned_steps",
        "rollbacks",
        "peak_bytes",
        "first_step_at",
    )
    return {
        "best": best and {name: best[name] for name in names},
        "last": {name: last.get(name) for name in names},
        **{name: last[name] for name in whole_run if name in last},
    }


def _note_path(run: Storage, existing: bytes, config: RunConfig) -> None:
    """Where its images lie now is all that changes of a run that is finished."""
    written = from_json(existing, CONFIG_NAME)
    if written.data.path != config.data.path:
        data = dataclasses.replace(written.data, path=config.data.path)
        run.write(CONFIG_NAME, to_json(dataclasses.replace(written, data=data)).encode())


def _require_resume(config: RunConfig) -> None:
    if not config.resume:
        where = config.location.partition("?")[0]
        raise ValueError(f"run {config.name!r} exists in {where}; choose another --name or leave --resume on")


def _require_same_config(existing: bytes, config: RunConfig, *, moved: bool) -> None:
    """`moved`: the images may lie elsewhere, because they are known again by themselves."""
    where = config.location.partition("?")[0]
    differing = differing_fields(from_json(existing, f"{where}/{CONFIG_NAME}"), config)
    if moved:
        differing.pop("data.path", None)
    if differing:
        raise ValueError(
            f"run {config.name!r} exists in {where} with another config; choose another --name, "
            f"or the same values to continue it:{listed(differing)}"
        )


def _is_another(existing: bytes, config: RunConfig) -> bool:
    try:
        return bool(differing_fields(from_json(existing, CONFIG_NAME), config))
    except ValueError:
        return True


def _forget(run: Storage) -> None:
    """Delete what a run that gave its name up left behind, or the next one would tell its end as its own."""
    for name in (*LOGBOOK_FILES, SKIPPED_FILE, MESSAGES_FILE):
        run.delete(name)
    for name in (TENSORBOARD_FOLDER, AUDIT_FOLDER):
        run.delete_folder(name)


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
    needed = checkpoints * checkpoint_bytes + _SPARE_BYTES
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
