"""A whole run in the calling process, without Ray: the same loop, folder, checkpoints and results.

For runs so small that a worker group would cost more than it brings, of which many go side by side: the arms of a
comparison. Images are decoded in this process too, or in a few of its own.
"""

from __future__ import annotations

import dataclasses
import time
from contextlib import closing
from typing import Any

import torch

from diffvit.config import RunConfig
from diffvit.data.datasets import Dataset
from diffvit.data.fingerprint import fingerprint_of
from diffvit.data.loader import BatchLoader, LocalStream, plan_run
from diffvit.data.order import EvalPlan, TrainPlan
from diffvit.training.checkpoint_store import CheckpointStore
from diffvit.training.compilation import require_compiler
from diffvit.training.loop import RunStopped, Worker, fit
from diffvit.training.notes import Notes
from diffvit.training.run_folder import close_run, open_run
from diffvit.training.run_lock import RunLock
from diffvit.training.tracking import Publish


def train_alone(
    config: RunConfig, dataset: Dataset, publish: Publish | None = None, *, decoders: int = 0
) -> dict[str, Any]:
    """Train, or continue, a run with one worker in this process; its results, which are also in `results.json`.

    Args:
        config: with everything that the data decides filled in (`diffvit.training.resolve.resolve`).
        dataset: that of `config.data`.
        publish: hears of progress; None: what is to be kept of it goes into the run's folder (`Notes`).
        decoders: processes that decode training images for this one; 0: it does so itself.

    Raises:
        ValueError: the name is taken, the folder cannot be written, the run has fewer steps than its warm-up, or there
            is no compiler for scale.compile.
        RunStopped: the run cannot go on; `results.json` says why.
    """
    config = dataclasses.replace(config, scale=dataclasses.replace(config.scale, workers=1))
    require_compiler(config.scale)
    plans = plan_run(config, dataset)
    with RunLock(config.location):
        earlier = open_run(config, fingerprint_of(dataset))
        if earlier is not None and earlier["status"] == "finished":
            return earlier
        if publish is not None:
            return _train(config, dataset, plans, publish, decoders)
        with closing(Notes(config.location)) as notes:
            return _train(config, dataset, plans, notes.publish, decoders)


def _train(
    config: RunConfig, dataset: Dataset, plans: tuple[TrainPlan, EvalPlan], publish: Publish, decoders: int
) -> dict[str, Any]:
    started = time.monotonic()
    plan, eval_plan = plans
    stream = LocalStream(
        BatchLoader(config, dataset.train, plan), BatchLoader(config, dataset.val, eval_plan), decoders=decoders
    )
    worker = Worker(
        device=torch.device(config.scale.device_type),
        report=lambda _: None,
        publish=publish,
        store=CheckpointStore(config.location, config.checkpoint),
    )
    status, reason = "failed", None
    try:
        fit(config, plan, eval_plan, stream, worker)
        status = "finished"
    except RunStopped as stop:
        status, reason = "stopped", str(stop)
        raise
    except KeyboardInterrupt:
        status, reason = "interrupted", "interrupted by the user"
        raise
    finally:
        results = close_run(config, status, reason, started)
    return results
