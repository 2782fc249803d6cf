"""Where a run was cut, and what that cost: `interruptions.json`, written by the sitting that goes on.

alive.json          the last sign of life of rank 0: when, at which step; in an object store a few seconds old
cut.json            why the run is being cut, from whoever knows; gone once it is written down
sitting.json        the id of the sitting that may write to the run: the last that claimed it
interruptions.json  one entry for each: when, why, steps_repeated, seconds_lost
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diffvit.storage import Storage, StorageError
from diffvit.training.checkpoint_store import Superseded

_SIGN_SECONDS = 1.0
_REMOTE_SIGN_SECONDS = 5.0
_ALIVE, _CUT, _SITTING, _INTERRUPTIONS = "alive.json", "cut.json", "sitting.json", "interruptions.json"
LOGBOOK_FILES = (_ALIVE, _CUT, _SITTING, _INTERRUPTIONS)
_UNKNOWN = "ended without a word: killed, or its node was lost"


class Logbook:
    """The four files, in the folder of a run."""

    def __init__(self, folder: str | Path) -> None:
        self._storage = Storage(str(folder))
        self._hasty = Storage(str(folder), retry_seconds=0)
        self._every_seconds = _REMOTE_SIGN_SECONDS if self._storage.is_remote else _SIGN_SECONDS
        self._signed_at = -self._every_seconds
        self._signing: threading.Thread | None = None
        self._sitting: str | None = None

    @property
    def interruptions(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._read(_INTERRUPTIONS) or []
        return found

    def claim(self) -> None:
        """From here on no other sitting publishes a checkpoint. For who then looks which is the newest: one that an
        earlier sitting still added would be gone on from later, without the audit that this one deletes.
        """
        sitting = uuid.uuid4().hex
        with suppress(OSError, StorageError):  # checkpoints find a full disk too, and wait for room
            _write(self._storage, _SITTING, {"id": sitting})
            self._sitting = sitting

    def begin(self, step: int, train_seconds: float, workers: int) -> None:
        """A sitting starts after `step` steps; if an earlier one was cut, that is written down.

        `seconds_lost` is the time from its last sign of life until now, and that of training the repeated steps.
        """
        if self._sitting is None:  # the store was away
            self.claim()
        last = self._read(_ALIVE)
        with suppress(OSError, StorageError):
            if last is not None:
                self._write_interruption(last, step, train_seconds, workers)
            self._storage.delete(_CUT)
            _write(self._storage, _ALIVE, self._sign(step, train_seconds, workers))

    def _write_interruption(self, last: dict[str, Any], step: int, train_seconds: float, workers: int) -> None:
        why = (self._read(_CUT) or {}).get("why")
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
        _write(self._storage, _INTERRUPTIONS, [*self.interruptions, entry])

    def end(self) -> None:
        """No sitting writes to the run any more, not even a group of workers that has not yet heard that it is over."""
        _write(self._storage, _SITTING, {"id": uuid.uuid4().hex})

    def require_ours(self) -> None:
        """Check, before something is written, that no other sitting has begun: the run's lock has the driver only, and
        a rank 0 that was cut off may come back while another one has taken its place.

        Raises:
            Superseded: one has.
            StorageError: an object store is away.
        """
        if self._sitting is None:
            return
        with suppress(FileNotFoundError, ValueError):
            if json.loads(self._hasty.read(_SITTING))["id"] != self._sitting:
                raise Superseded("another group of workers goes on with this run: this one was taken for lost")

    def alive(self, step: int, train_seconds: float, workers: int) -> None:
        """A sign of life, written down once a second at most; training does not wait for an object store."""
        if time.monotonic() - self._signed_at < self._every_seconds:
            return
        sign = self._sign(step, train_seconds, workers)
        if not self._storage.is_remote:
            self._try_to_write(_ALIVE, sign)
        elif self._signing is None or not self._signing.is_alive():
            self._signing = threading.Thread(target=self._try_to_write, args=(_ALIVE, sign), daemon=True)
            self._signing.start()

    def cut(self, why: str, *, wait: bool = True) -> None:
        """Say why the run is being cut; the first to say so is right, because one loss makes others follow.

        With `wait` off training goes on while an object store is asked.
        """
        if self._storage.is_remote and not wait:
            threading.Thread(target=self.cut, args=(why,), daemon=True).start()
            return
        with suppress(OSError, StorageError):
            if self._hasty.size(_CUT) is None:
                _write(self._hasty, _CUT, {"why": why})

    def _sign(self, step: int, train_seconds: float, workers: int) -> dict[str, Any]:
        self._signed_at = time.monotonic()
        return {"time": time.time(), "step": step, "train_seconds": train_seconds, "workers": workers}

    def _try_to_write(self, name: str, content: Any) -> None:
        with suppress(OSError, StorageError):  # a store that is away or full is found by the checkpoints
            _write(self._hasty, name, content)

    def _read(self, name: str) -> Any:
        with suppress(ValueError):
            return json.loads(self._storage.read_or_none(name) or b"")
        return None


def _write(storage: Storage, name: str, content: Any) -> None:
    storage.write(name, (json.dumps(content, indent=2) + "\n").encode(), durable=False)
