"""`checkpoint.json`: what a checkpoint folder holds, with the sha256 of each of its files.

The manifest is written last, so a folder without one is not a checkpoint; it carries the model's config, so a
checkpoint can be rebuilt without the run that made it.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

MANIFEST_NAME = "checkpoint.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT_VERSION = 1
CHECKPOINT_FOLDER = re.compile(r"checkpoint_step_(\d+)")
"""Name of a checkpoint in its run's folder, with the step; not that of a copy which somebody keeps beside it."""


def checkpoints_in(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, by step; they may turn out to be damaged."""
    return sorted(path for path in run.glob("checkpoint_step_*") if CHECKPOINT_FOLDER.fullmatch(path.name))


def best_there(run: Path) -> Path | None:
    """The checkpoint in the run's folder that was best when it was evaluated, else the last; None where there is none.

    What `results.json` does not tell yet, or not any more once the run goes on.
    """
    found = []
    for checkpoint in checkpoints_in(run):
        with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):  # a damaged one is not the best
            content = json.loads((checkpoint / MANIFEST_NAME).read_text())
            found.append((content["step"], content["metrics"].get("top1"), checkpoint))
    evaluated = [(top1, -step, checkpoint) for step, top1, checkpoint in found if top1 is not None]
    if evaluated:
        return max(evaluated)[2]  # the first of equals, as `results.json` has it
    return max(found)[2] if found else None


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, fields: dict[str, Any]) -> None:
    """Write `checkpoint.json` over every other file in `folder`."""
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST_NAME}
    manifest = {"format_version": FORMAT_VERSION, **fields, "sha256": files}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, after every file it names was found whole.

    Raises:
        FileNotFoundError: there is no manifest, so this is not a finished checkpoint.
        ValueError: it cannot be read, is of another format version, or a file is missing or its sha256 differs.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a checkpoint: it has no {MANIFEST_NAME}")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        files = dict(manifest["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {folder} is damaged: {MANIFEST_NAME} cannot be read ({error!r})") from None
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {manifest.get('format_version')!r}; this diffvit reads {FORMAT_VERSION}"
        )
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"checkpoint {folder} is damaged: {name} is missing")
        actual = sha256_of(file)
        if actual != expected:
            raise ValueError(
                f"checkpoint {folder} is damaged: sha256 of {name} is {actual[:12]}…, "
                f"its {MANIFEST_NAME} says {expected[:12]}…; use another checkpoint"
            )
    return manifest
