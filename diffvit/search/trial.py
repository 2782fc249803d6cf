"""What happens in a trial: a real training run that tells Ray Tune how each epoch ended.

One worker trains in the trial's own process, which decodes its images too, so that a small trial pays for no worker
group; several go through Ray Train.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from diffvit.config import ModelConfig, RunConfig, from_json
from diffvit.data.datasets import Dataset
from diffvit.data.loader import BatchLoader, LocalStream, plan_run, validation_batches
from diffvit.manifest import checkpoints_in
from diffvit.models.vit import VisionTransformer
from diffvit.models.weights import load_weights
from diffvit.training.checkpoint_store import CheckpointStore
from diffvit.training.evaluation import evaluate
from diffvit.training.loop import RunDiverged, Worker, fit
from diffvit.training.notes import Notes
from diffvit.training.precision import autocast, set_float32_products

METRIC = "best_top1"
"""What trials are compared by. The best and not the last value, because Optuna keeps what a trial reported last."""

DIVERGED = "diverged"
"""In the last report of a trial that diverged: how. Its metric is 0, so that the sampler learns where not to look;
Optuna is told nothing of an error."""

_REPORTED = ("epoch", "top1", "top5", "loss", "train_loss", "train_seconds")
_TIMED_IMAGES = 20


class Reports:
    """Turns the metrics of a run into what Ray Tune is told: one report an epoch, the best top-1 so far in each."""

    def __init__(self, extra: dict[str, float]) -> None:
        self._extra = extra
        self._best = 0.0

    def of(self, metrics: dict[str, Any]) -> dict[str, Any]:
        self._best = max(self._best, metrics["top1"])
        return {name: metrics[name] for name in _REPORTED} | {METRIC: self._best, "at": time.time()} | self._extra


class ReportEpochs(TuneReportCallback):  # type: ignore[misc]  # Ray ships no types
    """Passes on what the workers of a group report."""

    def __init__(self, reports: Reports) -> None:
        super().__init__()
        self._reports = reports

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        del checkpoint  # Tune has no use for it
        super().after_report(run_context, [self._reports.of(metrics[0])], None)


@dataclass(frozen=True)
class Job:
    """One run as Ray Tune carries it to where it trains."""

    number: int
    """Of the configuration."""
    config: str
    """`RunConfig` as JSON."""
    keep: bool = False
    """Whether the last checkpoint stays in the run's folder."""
    latency_ms: float | None = None
    """Of its model, where the sweep asks for it."""

    def pack(self) -> dict[str, Any]:
        """As a Tune config; one string, because Tune takes structures apart."""
        return {"job": json.dumps(dataclasses.asdict(self))}

    @staticmethod
    def unpack(tune_config: dict[str, Any]) -> Job:
        return Job(**json.loads(tune_config["job"]))


def train_trial(tune_config: dict[str, Any], *, dataset: Dataset, threads: int) -> None:
    """The function that Ray Tune calls in every trial.

    Raises:
        RunStopped: the run cannot go on, though it did not diverge; Ray Tune takes the trial as failed.
    """
    job = Job.unpack(tune_config)
    config = from_json(job.config, "trial")
    torch.set_num_threads(threads)
    latency = {} if job.latency_ms is None else {"latency_ms": job.latency_ms}
    reports = Reports(latency)
    try:
        if config.scale.workers == 1:
            decoders = threads - 1 if config.scale.gpu else 0  # there the CPUs have nothing else to do
            _train_here(config, dataset, reports, keep=job.keep, decoders=decoders)
        else:
            _train_in_group(config, dataset, reports)
    except RunDiverged as stop:
        tune.report({METRIC: 0.0, DIVERGED: str(stop)} | latency)


def _train_in_group(config: RunConfig, dataset: Dataset, reports: Reports) -> None:
    from diffvit.training.launch import train_group  # imports Ray Train, which the other path need not wait for

    train_group(config, dataset, [ReportEpochs(reports)])


def _train_here(config: RunConfig, dataset: Dataset, reports: Reports, *, keep: bool, decoders: int) -> None:
    plan, eval_plan = plan_run(config, dataset)
    stream = LocalStream(
        BatchLoader(config, dataset.train, plan), BatchLoader(config, dataset.val, eval_plan), decoders=decoders
    )

    def report(metrics: dict[str, Any]) -> None:
        tune.report(reports.of(metrics))

    store = CheckpointStore(config.folder, config.checkpoint) if keep else None
    with closing(Notes(config.location)) as notes:
        worker = Worker(torch.device(config.scale.device_type), report, notes.publish, store=store)
        fit(config, plan, eval_plan, stream, worker)


def shape_of(model: ModelConfig) -> str:
    """What decides the time of an image among the models of a sweep, in words."""
    return f"{model.variant}, {model.num_heads} heads, {model.patch_size} px"


def latencies_ms(shapes: Sequence[RunConfig], threads: int) -> dict[str, float]:
    """Median time of one image through the model of each, by `shape_of`, in milliseconds, where and as trials train."""
    torch.set_num_threads(threads)
    return {shape_of(shape.model): _latency_ms(shape) for shape in shapes}


def _latency_ms(shape: RunConfig) -> float:
    config, device = shape.model, torch.device(shape.scale.device_type)
    set_float32_products(shape.scale, device)
    model = VisionTransformer(config).to(device).eval()
    image = torch.zeros(1, config.in_channels, config.image_size, config.image_size, device=device)
    seconds = []
    with torch.inference_mode(), autocast(shape, device):
        for _ in range(_TIMED_IMAGES + 3):
            started = time.perf_counter()
            model(image).sum().item()  # waits for the device
            seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds[3:])  # the first ones warm up


def score(config_json: str, dataset: Dataset, folder: str) -> dict[str, float]:
    """`top1`, `top5` and `loss` of the run's last checkpoint on the whole of `dataset.val`, each image once."""
    config = from_json(config_json, folder)
    checkpoints = checkpoints_in(Path(folder))
    if not checkpoints:
        raise FileNotFoundError(f"{folder} holds no checkpoint here; a sweep needs a storage that every node sees")
    device = torch.device(config.scale.device_type)
    set_float32_products(config.scale, device)
    model = VisionTransformer(config.model).to(device)
    load_weights(model, checkpoints[-1])
    found = evaluate(model, validation_batches(config, dataset), len(dataset.val), config, device)
    return {name: found[name] for name in ("top1", "top5", "loss")}
