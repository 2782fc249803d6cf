"""`<storage>/<name>/`: the folder of a sweep, and what is checked before it is used.

sweep.json     recipe, search and space, written before the first trial
data.json      by which its images are known again (`diffvit.data.fingerprint`)
study.db       Optuna's study and every record (`diffvit.search.records`)
trials/        one folder a trial: config.json, tensorboard/
finalists/     one folder a finalist and seed, with its last checkpoint
trials.csv, best.json, results.json, report.html
"""

from __future__ import annotations

from pathlib import Path

from diffvit.config import listed
from diffvit.data.fingerprint import DATA_NAME, Fingerprint, require_same_images
from diffvit.search.config import SweepConfig, differing_sweep_fields, sweep_from_json, sweep_to_json
from diffvit.storage import UNFINISHED_SUFFIX, Storage, StorageError
from diffvit.training.run_lock import LOCK_NAME

SWEEP_FILE = "sweep.json"


def open_sweep(sweep: SweepConfig, images: Fingerprint) -> None:
    """Make sure that the sweep, whose lock this process holds, is not another one of the same name.

    Args:
        sweep: with everything that the data decides filled in.
        images: of its data set (`fingerprint_of`), a part of which judges the trials.

    Raises:
        ValueError: the name is taken by a sweep with another recipe, space, way of judging or other images (or by any,
            with `resume` off), by something that is no sweep, or the folder cannot be written.
    """
    folder, name = sweep.run.folder, sweep.run.name
    existing = folder / SWEEP_FILE
    if existing.exists():
        if not sweep.run.resume:
            raise ValueError(f"sweep {name!r} exists in {folder}; choose another --name or leave --resume on")
        differing = differing_sweep_fields(sweep_from_json(existing.read_bytes(), str(existing)), sweep)
        if differing:
            raise ValueError(
                f"sweep {name!r} exists in {folder} with other values; choose another --name, "
                f"or the same values to continue it:{listed(differing)}"
            )
        require_same_images(Storage(str(folder)), images, sweep.run.data.path)
    elif folder.exists() and any(
        LOCK_NAME not in path.name and not path.name.endswith(UNFINISHED_SUFFIX) for path in folder.iterdir()
    ):
        raise ValueError(f"{folder} holds files but no {SWEEP_FILE}: it is not a sweep; choose another --name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(existing, sweep_to_json(sweep))
        write_atomically(folder / DATA_NAME, images.to_json())
    except (OSError, StorageError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ValueError(f"storage {folder.parent} cannot be written: {reason}") from None


def write_atomically(path: Path, text: str) -> None:
    """Write the whole file or nothing."""
    Storage(str(path.parent)).write(path.name, text.encode())
