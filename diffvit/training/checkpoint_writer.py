"""Writes checkpoints beside training: the loop hands over a copy of its state and goes on with the next step.

One checkpoint is written at a time. Of those that wait a newer one takes the place of the one before, unless that is of
the end of an epoch, and so may be the best, or is pinned. A store that is away, or full, is tried again with back-off
while training goes on; only when nothing could be written for `checkpoint.retry_minutes` is that the run's problem.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffvit.training.checkpoint import Snapshot, checkpoint_name
from diffvit.training.checkpoint_store import CheckpointStore, Superseded, Warn

_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.5, 30.0


@dataclass(frozen=True)
class _Waiting:
    step: int
    write: Callable[[], None]
    pinned: Collection[int]
    before: tuple[Callable[[], None], ...]
    stays: bool


class CheckpointWriter:
    """A thread that writes to `store`, as long as `require_ours` raises no `Superseded`."""

    def __init__(
        self, store: CheckpointStore, retry_minutes: float, warn: Warn, require_ours: Callable[[], None] = lambda: None
    ) -> None:
        self._store, self._retry_seconds, self._warn = store, 60 * retry_minutes, warn
        self._require_ours = require_ours
        self._changed = threading.Condition()
        self._waiting: list[_Waiting] = []
        self._busy = self._closing = False
        self._given_up = threading.Event()
        self.failure: str | None = None
        """Why the run must end; None as long as checkpoints can be written, or may be again."""
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    def submit(
        self,
        snapshot: Snapshot,
        pinned: Collection[int] = (),
        before: tuple[Callable[[], None], ...] = (),
        *,
        stays: bool = False,
    ) -> None:
        """Write `snapshot` soon.

        Args:
            snapshot: the checkpoint.
            pinned: steps that outlast what is deleted afterwards.
            before: what must have been written when a reader sees the checkpoint; may be called more than once.
            stays: whether it is written even if there is a newer one by then.
        """
        with self._changed:
            while self._waiting and not self._waiting[-1].stays and self._waiting[-1].step not in pinned:
                before = (*self._waiting.pop().before, *before)
            write = partial(self._store.put, snapshot, self._require_ours)
            self._waiting.append(_Waiting(snapshot.step, write, pinned, before, stays))
            self._changed.notify_all()

    def describe(
        self,
        step: int,
        metrics: dict[str, Any],
        pinned: Collection[int] = (),
        before: tuple[Callable[[], None], ...] = (),
    ) -> None:
        """Give a checkpoint, handed over with `stays`, other metrics; arguments as in `submit`."""
        with self._changed:
            write = partial(self._store.describe, step, metrics)
            self._waiting.append(_Waiting(step, write, pinned, before, stays=True))
            self._changed.notify_all()

    def wait(self, seconds: float | None = None) -> None:
        """Return when everything handed over is written or given up, or after `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._busy, seconds)

    def close(self, seconds: float | None = None) -> None:
        """Write what was handed over, for `seconds` at most, then end the thread."""
        self.wait(seconds)
        self._given_up.set()
        with self._changed:
            self._closing, self._waiting = True, []
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                waiting = self._waiting.pop(0)
                self._busy = True
            try:
                self._write(waiting)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _write(self, waiting: _Waiting) -> None:
        deadline, delay = time.monotonic() + self._retry_seconds, _FIRST_DELAY_SECONDS
        while True:
            try:
                self._require_ours()
                for write in waiting.before:
                    write()
                waiting.write()
                self._store.drop_others(waiting.step, waiting.pinned)
            except Superseded as error:
                self.failure = self.failure or str(error)
                return
            except Exception as error:  # a full disk comes as OSError, RuntimeError or SafetensorError
                if self._given_up.is_set() or time.monotonic() + delay > deadline:
                    minutes = f"{self._retry_seconds / 60:g} minutes"
                    self.failure = self.failure or f"no checkpoint could be written for {minutes}: {error}"
                    return
                self._warn(f"{checkpoint_name(waiting.step)} could not be written and is tried again: {error}")
            else:
                return
            self._given_up.wait(delay)
            delay = min(2 * delay, _LONGEST_DELAY_SECONDS)
