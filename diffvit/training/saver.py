"""When a run is saved, which of its checkpoints is good, and the way back to it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from enum import IntFlag
from typing import Any

from diffvit.config import ModelConfig, RunConfig
from diffvit.storage import StorageError
from diffvit.training.checkpoint import TrainState, checkpoint_name, roll_back, take_snapshot
from diffvit.training.checkpoint_writer import CheckpointWriter
from diffvit.training.logbook import Logbook
from diffvit.training.sharding import is_sharded
from diffvit.training.worker import RunDiverged, RunStopped, Worker

_POLL_SECONDS = 2.0
"""Between two looks for a node that is about to go, each of which is a barrier."""
_SLOW_STEP_SECONDS = 0.5
"""From here on ranks agree at every step, so that a node's notice of seconds is not spent on ten of them."""
_PREEMPTED_SAVE_MINUTES = 5 / 60
"""Between checkpoints once a node is about to go."""
_LAST_WRITE_SECONDS = 10.0
"""How long a run that ends with an error still writes the checkpoint in hand."""


Writes = tuple[Callable[[], None], ...]


class Ask(IntFlag):
    """What rank 0, which has the clock and the disk, asks of all ranks when they agree on their metrics."""

    SAVE = 1
    POLL = 2
    STOP = 4
    OFTEN = 8
    """To be asked at every step, because steps are slow."""


def newest_step(worker: Worker, model: ModelConfig, up_to: int | None = None) -> int | None:
    """Step of the newest whole checkpoint of `model`; rank 0 looks, and all take its word."""
    step, problem, store = None, None, worker.store
    if worker.rank == 0 and store is not None:
        try:
            entry = store.newest_whole(worker.warn, up_to, model)
            step = entry and entry.step
        except ValueError as error:
            problem = str(error)
    agreed: tuple[int | None, str | None] = worker.agree((step, problem))
    step, problem = agreed
    if problem is not None:
        raise RunStopped(problem)
    return step


class Saver:
    """One sitting's checkpoints. Every method but `asks` is called by every rank at the same step."""

    def __init__(self, config: RunConfig, state: TrainState, worker: Worker, logbook: Logbook) -> None:
        self._config, self._state, self._worker, self._logbook = config, state, worker, logbook
        self._writer = None
        if worker.rank == 0 and worker.store is not None:
            self._logbook.begin(state.step, state.train_seconds, worker.workers)
            worker.store.sweep()
            self._writer = CheckpointWriter(
                worker.store, config.checkpoint.retry_minutes, worker.warn, logbook.require_ours
            )
        self._preempted = False
        self._polled_at = time.monotonic()
        self._every_minutes = config.checkpoint.every_minutes or math.inf

    def asks(self, minutes_since_save: float, step_seconds: float) -> Ask:
        """What rank 0 asks for now, when a step takes `step_seconds`; and a sign of its life."""
        self._logbook.alive(self._state.step, self._state.train_seconds, self._worker.workers)
        ask = Ask(0)
        if minutes_since_save >= self._every_minutes:
            ask |= Ask.SAVE
        if time.monotonic() - self._polled_at >= _POLL_SECONDS:
            ask |= Ask.POLL
        if self._writer is not None and self._writer.failure:
            ask |= Ask.STOP
        if step_seconds >= _SLOW_STEP_SECONDS:
            ask |= Ask.OFTEN
        return ask

    def answer(self, ask: Ask) -> bool:
        """Do on every rank what rank 0 asks for; whether to save now.

        Raises:
            RunStopped: checkpoints can no longer be written.
        """
        if Ask.STOP in ask:
            raise RunStopped(self._writer.failure if self._writer and self._writer.failure else "see rank 0")
        notice = False
        if Ask.POLL in ask:
            self._polled_at = time.monotonic()
            if not self._preempted and self._worker.preempted():
                notice = self._preempted = True
                self._every_minutes = min(self._every_minutes, _PREEMPTED_SAVE_MINUTES)
                if self._worker.rank == 0:
                    self._logbook.cut("preempted: a node was about to go", wait=False)
                    self._worker.warn(f"a node is about to go: saving at step {self._state.step}")
        return notice or Ask.SAVE in ask

    def save(
        self, metrics: dict[str, Any], curves: Writes = (), audit: Writes = (), *, healthy: bool, ends_epoch: bool
    ) -> None:
        """Hand a copy of the state to the writer, which writes `curves` and `audit` before it. These are rank 0's.

        A `healthy` one may be what a sick run goes back to; one that `ends_epoch` is still to be evaluated.
        """
        if healthy:
            self._state.note_healthy(tried=False)
        keeps = self._writer is not None
        if keeps or is_sharded(self._state.model):
            snapshot = take_snapshot(self._state, self._config, metrics, keeps=keeps)
        if self._writer is not None:
            self._writer.submit(snapshot, self._pinned, (*curves, *audit), stays=ends_epoch)
        elif self._worker.rank == 0:  # a run that keeps no checkpoints
            _try_each(curves)
            for write in audit:
                write()

    def describe(self, metrics: dict[str, Any], curves: Writes = ()) -> None:
        """Give the checkpoint of this step, the end of an epoch, the metrics of its evaluation; after the `curves`."""
        self._state.note_evaluated()
        if self._writer is not None:
            self._writer.describe(self._state.step, metrics, self._pinned, curves)
        elif self._worker.rank == 0:
            _try_each(curves)

    @property
    def _pinned(self) -> tuple[int, ...]:
        return tuple(step for step in (self._state.good_step, self._state.untried_step) if step is not None)

    def roll_back(self, why: str) -> int:
        """Take the weights of the last good checkpoint, and go on from here with them; the step they are of.

        Raises:
            RunDiverged: there is none, or that was done `optim.max_rollbacks` times; it says `why`.
        """
        good_step = self._state.good_step
        if self._writer is not None:
            self._writer.wait()
        store = self._worker.store
        step = None if good_step is None else newest_step(self._worker, self._config.model, good_step)
        if store is None or step is None or self._state.rollbacks >= self._config.optim.max_rollbacks:
            good = "none is known to be good yet" if good_step is None else f"the last is {checkpoint_name(good_step)}"
            raise RunDiverged(
                f"{why}; {self._state.rollbacks} times the run went back to a good checkpoint; {good}. "
                "A lower optim.lr, a longer optim.warmup_epochs or a smaller optim.clip_norm are the usual remedies"
            )
        with store.opened(step) as folder:
            roll_back(folder, self._state)
        self._worker.agree(None)  # a barrier: the next save may delete what another rank still reads
        if self._worker.rank == 0:
            self._worker.warn(
                f"{why}; back to the weights of {checkpoint_name(step)}, on with the samples after step "
                f"{self._state.step}"
            )
        return step

    def finish(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            RunStopped: it cannot be written.
        """
        if self._writer is not None:
            self._writer.wait()
            if self._writer.failure:
                raise RunStopped(self._writer.failure)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close(_LAST_WRITE_SECONDS)


def _try_each(writes: Writes) -> None:
    """What the disk or the store does not take now is written with the next."""
    for write in writes:
        with suppress(OSError, StorageError):
            write()
