"""Follows Ray Tune while it runs trials, and keeps the sweep's records, curves and table up to date."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune

from diffvit.config import from_json
from diffvit.search.records import Journal, Record, Role
from diffvit.search.space import Space
from diffvit.search.trial import DIVERGED, Job

_LONGEST_REASON = 500
_RAISED = re.compile(r"[\w.]+(Error|Exception|Stopped|Interrupt|Exit)\b")
_KEPT = ("epoch", "top1", "top5", "loss", "train_loss", "train_seconds", "at")


class Progress(tune.Callback):  # type: ignore[misc]  # Ray ships no types
    """Turns what Tune says of its trials into records; `changed` hears of each of them."""

    def __init__(self, journal: Journal, space: Space, role: Role, changed: Callable[[Record], None]) -> None:
        self._journal, self._space, self._role, self._changed = journal, space, role, changed
        self._running: dict[str, Record] = {}
        self._started: dict[str, float] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune pickles its callbacks into a file that nothing here reads; this one holds open files and a terminal."""
        return tune.Callback, ()

    def on_trial_start(self, trial: Any, **_: Any) -> None:
        self._started.setdefault(trial.trial_id, time.time())
        self._update(trial)

    def on_trial_result(self, trial: Any, result: dict[str, Any], **_: Any) -> None:
        record = self._record(trial)
        if DIVERGED in result:
            self._update(trial, status="failed", reason=result[DIVERGED][:_LONGEST_REASON])
            return
        entry = {name: result[name] for name in _KEPT}
        self._update(trial, history=(*record.history, entry), latency_ms=result.get("latency_ms"))

    def on_trial_complete(self, trial: Any, **_: Any) -> None:
        record = self._record(trial)
        if record.status == "running":
            whole = record.epochs >= from_json(record.config, record.name).optim.epochs
            self._update(trial, status="finished" if whole else "stopped")
        del self._running[trial.trial_id]

    def on_trial_error(self, trial: Any, **_: Any) -> None:
        """A trial has ended already if the error is one of `on_trial_complete`, such as a disk that is full."""
        if self._record(trial).status == "running":
            self._update(trial, status="failed", reason=reason_of(Path(trial.error_file).read_text()))
        del self._running[trial.trial_id]

    def _record(self, trial: Any) -> Record:
        if trial.trial_id not in self._running:
            job = Job.unpack(trial.config)
            config = from_json(job.config, "trial")
            self._running[trial.trial_id] = Record(
                job.number, self._role, config.seed, self._space.values(config), job.config
            )
        return self._running[trial.trial_id]

    def _update(self, trial: Any, **changes: Any) -> None:
        started = self._started.get(trial.trial_id, time.time())
        record = dataclasses.replace(self._record(trial), seconds=time.time() - started, **changes)
        self._running[trial.trial_id] = record
        self._journal.save(record)
        self._changed(record)


def reason_of(error: str) -> str:
    """The sentence that matters in what Ray says of a failed trial: the exception, or how the process ended."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", error)  # Ray colours its tracebacks
    lines = [line.strip() for line in plain.splitlines() if line.strip() and not line.startswith("Failure #")]
    raised = [line for line in lines if _RAISED.match(line)]
    if raised and any(line.startswith(("ray::", "Traceback")) for line in lines):
        return re.sub(r"^(\w+\.)+", "", raised[-1])[:_LONGEST_REASON]  # without its module
    return " ".join(lines)[:_LONGEST_REASON] or "no reason was given"
