"""One of the processes of a run, as whoever started it describes it to the loop; and how a run ends for good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from diffvit.training.checkpoint_store import CheckpointStore
from diffvit.training.tracking import Publish


class RunStopped(RuntimeError):
    """The run cannot go on, and trying again from the last checkpoint would end the same way."""


class RunDiverged(RunStopped):
    """The loss would not stay finite: these values of the optimiser are at fault."""


@dataclass(frozen=True)
class Worker:
    """One of the W processes of a run."""

    device: torch.device
    report: Callable[[dict[str, Any]], None]
    """Collective: hands the metrics of an epoch to whoever started the run."""
    publish: Publish
    """Tells the console; may be lost without harm."""
    rank: int = 0
    workers: int = 1
    store: CheckpointStore | None = None
    """Where the run's checkpoints are, to go on from and to add to; None: the run keeps none."""
    agree: Callable[[Any], Any] = lambda value: value
    """Collective: what rank 0 passed, on every rank."""
    preempted: Callable[[], bool] = lambda: False
    """Collective: whether a node of the run is about to go."""

    def warn(self, message: str) -> None:
        self.publish("warning", {"message": message})
