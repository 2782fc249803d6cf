"""A whole run in the calling process, without Ray: the same loop, folder, checkpoints and results.

For runs so small that a worker group would cost more than it brings, of which many go side by side: the arms of a
comparison. Images are decoded in this process too.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from diffvit.config import RunConfig
from diffvit.data.loader import BatchLoader, LocalStream, plan_run
from diffvit.data.order import EvalPlan, TrainPlan
from diffvit.data.sources import Dataset
from diffvit.training.checkpoint_store import CheckpointStore
from diffvit.training.compilation import require_compiler
from diffvit.training.logbook import Logbook
from diffvit.training.loop import RunStopped, Worker, fit
from diffvit.training.run_folder import open_run, summarise, write_results
from diffvit.training.run_lock import RunLock
from diffvit.training.tracking import Publish
from diffvit.training.utilisation import arithmetic


def train_alone(config: RunConfig, dataset: Dataset, publish: Publish | None = None) -> dict[str, Any]:
    """Train, or continue, a run with one worker in this process; its results, which are also in `results.json`.

    Args:
        config: with everything that the data decides filled in (`diffvit.training.launch.resolve`).
        dataset: that of `config.data`.
        publish: hears of progress.

    Raises:
        ValueError: the name is taken, the folder cannot be written, the run has fewer steps than its warm-up, or there
            is no compiler for scale.compile.
        RunStopped: the run cannot go on; `results.json` says why.
    """
    config = dataclasses.replace(config, scale=dataclasses.replace(config.scale, workers=1))
    require_compiler(config.scale)
    plans = plan_run(config, dataset)
    with RunLock(config.location):
        earlier = open_run(config)
        if earlier is not None and earlier["status"] == "finished":
            return earlier
        return _train(config, dataset, plans, publish or (lambda *_: None))


def _train(config: RunConfig, dataset: Dataset, plans: tuple[TrainPlan, EvalPlan], publish: Publish) -> dict[str, Any]:
    started = time.monotonic()
    plan, eval_plan = plans
    stream = LocalStream(BatchLoader(config, dataset.train, plan), BatchLoader(config, dataset.val, eval_plan))

    store = CheckpointStore(config.location, config.checkpoint)
    worker = Worker(
        device=torch.device(config.scale.device_type),
        report=lambda _: None,
        publish=publish,
        store=store,
    )
    results: dict[str, Any] = {"status": "failed", "reason": None}
    try:
        fit(config, plan, eval_plan, stream, worker)
        results["status"] = "finished"
    except RunStopped as stop:
        results |= {"status": "stopped", "reason": str(stop)}
        raise
    finally:
        if results["reason"]:
            Logbook(config.location).cut(results["reason"])
        results |= summarise(store.entries())
        results |= arithmetic(results, config.model)
        results |= {
            "interruptions": Logbook(config.location).interruptions,
            "seed": config.seed,
            "wall_seconds": round(time.monotonic() - started, 1),
        }
        write_results(config.location, results)
    return results
