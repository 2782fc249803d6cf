"""Where a run was cut, and what that cost: `interruptions.json`, written by the sitting that goes on.

alive.json          the last sign of life of rank 0: when, at which step
cut.json            why the run is being cut, from whoever knows; gone once it is written down
interruptions.json  one entry for each: when, why, steps_repeated, seconds_lost
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_SIGN_SECONDS = 1.0
_UNKNOWN = "ended without a word: killed, or its node was lost"


class Logbook:
    """The three files, in the folder of a run."""

    def __init__(self, folder: Path) -> None:
        self._alive, self._cut, self._file = (
            folder / name for name in ("alive.json", "cut.json", "interruptions.json")
        )
        self._signed_at = -_SIGN_SECONDS

    @property
    def interruptions(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = _read(self._file) or []
        return found

    def begin(self, step: int, train_seconds: float, workers: int) -> None:
        """A sitting starts after `step` steps; if an earlier one was cut, that is written down.

        `seconds_lost` is the time from its last sign of life until now, and that of training the repeated steps.
        """
        self._alive.parent.mkdir(parents=True, exist_ok=True)
        last = _read(self._alive)
        if last is not None:
            why = (_read(self._cut) or {}).get("why")
            if why is None and last["workers"] != workers:
                why = f"resized from {last['workers']} to {workers} workers"
            entry = {
                "when": datetime.fromtimestamp(last["time"], UTC).isoformat(timespec="seconds"),
                "why": why or _UNKNOWN,
                "steps_repeated": max(last["step"] - step, 0),
                "seconds_lost": round(
                    max(time.time() - last["time"], 0) + max(last["train_seconds"] - train_seconds, 0), 1
                ),
            }
            _write(self._file, [*self.interruptions, entry])
        self._cut.unlink(missing_ok=True)
        self._sign(step, train_seconds, workers)

    def alive(self, step: int, train_seconds: float, workers: int) -> None:
        """A sign of life, written down once a second at most."""
        if time.monotonic() - self._signed_at >= _SIGN_SECONDS:
            with suppress(OSError):  # a full disk is found by the checkpoints
                self._sign(step, train_seconds, workers)

    def cut(self, why: str) -> None:
        """Say why the run is being cut; the first to say so is right, because one loss makes others follow."""
        if not self._cut.exists():
            with suppress(OSError):
                _write(self._cut, {"why": why})

    def _sign(self, step: int, train_seconds: float, workers: int) -> None:
        self._signed_at = time.monotonic()
        _write(self._alive, {"time": time.time(), "step": step, "train_seconds": train_seconds, "workers": workers})


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)
