"""A run rehearsed on the cluster that it is to have: a few steps on its images, and what the whole will take."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import rich.console

from diffvit.config import RehearsalOptions, RunConfig
from diffvit.console import format_duration, format_flops
from diffvit.data.datasets import Dataset
from diffvit.data.loader import plan_run
from diffvit.data.order import TrainPlan
from diffvit.data.subset import Excerpt
from diffvit.data.synthetic import rehearsal_data
from diffvit.models.flops import training_flops
from diffvit.storage import Storage
from diffvit.training.cluster import enter_cluster
from diffvit.training.compilation import require_compiler
from diffvit.training.forecast import Forecast, bottleneck, caveat, predict
from diffvit.training.group import join_group
from diffvit.training.launch import work_on_group
from diffvit.training.rehearsal import Measured, rehearse_steps
from diffvit.training.resolve import require_weights, resolve
from diffvit.training.utilisation import utilisation

_STEPS = 50
_DELETE_TRIES, _LOOKS_AFTER_AN_END = 30, 10


def rehearse(config: RunConfig, options: RehearsalOptions) -> tuple[Measured, Forecast]:
    """Take a few steps of the run that `config` describes, and print what they say of all of it.

    Its folder is not touched; what is written lies beside it, where its checkpoints will lie, and is deleted.

    Raises:
        ValueError: data, storage or cluster do not fit the config, or its model is sharded.
        ray.train.TrainingFailedError: the workers were lost.
    """
    started = time.monotonic()
    if config.scale.sharding != "none":
        raise ValueError(
            "a rehearsal times the averaging of gradients by leaving it out, which a sharded model does not allow; "
            f"rehearse without scale.sharding = {config.scale.sharding!r}, or run for an epoch and see"
        )
    require_compiler(config.scale)
    dataset, description = rehearsal_data(config)
    config = resolve(config, dataset)
    plan, _ = plan_run(config, dataset, config.worker_counts[-1])
    require_weights(config)
    steps = min(options.rehearse_steps or _STEPS, plan.total_steps)
    shown = min(len(dataset.val), steps * plan.batch_size)  # no more than a rehearsal's worth is evaluated
    console = rich.console.Console(highlight=False, soft_wrap=True)
    console.print(f"rehearsing {steps} of the {plan.total_steps:,} steps of {config.name}", markup=False)
    console.print(f"images: {description}", markup=False)
    enter_cluster(config, print)
    with _beside(config) as temporary:
        work = partial(_rehearse_worker, steps=steps)
        measured: Measured = work_on_group(temporary, _with_fewer(dataset, shown), work)
    startup = time.monotonic() - started - measured.seconds
    forecast = predict(config, plan, len(dataset.val), measured, startup)
    nodes = sum(node["Alive"] for node in ray.nodes())
    for name, value in table(config, plan, measured, forecast, nodes, options.price_per_hour):
        console.print(f"  {name:<20} {value}")
    return measured, forecast


def _rehearse_worker(job: dict[str, Any], steps: int) -> Measured:
    group = join_group(job)
    return rehearse_steps(group.config, group.train_plan, group.eval_plan, group.stream, group.worker, steps)


@contextmanager
def _beside(config: RunConfig) -> Iterator[RunConfig]:
    """The same run in a folder of its own in the same storage, which is then deleted; a lost worker ends it."""
    scale = dataclasses.replace(config.scale, max_failures=0, max_preemptions=0)  # nothing to go on from
    checkpoint = dataclasses.replace(config.checkpoint, every_steps=None, every_minutes=None)  # one, which is timed
    config = dataclasses.replace(config, scale=scale, checkpoint=checkpoint)
    if config.is_remote:
        name = f"rehearsal-{uuid.uuid4().hex}"
        try:
            yield dataclasses.replace(config, name=name)
        finally:
            Storage(config.storage).delete_folder(name)
        return
    storage = Path(config.storage)
    existed = storage.exists()
    try:
        storage.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".rehearsal-", dir=storage))
    except OSError as error:
        raise ValueError(f"storage {storage} cannot be written: {error.strerror or error}") from None
    looks = _LOOKS_AFTER_AN_END
    try:
        yield dataclasses.replace(config, storage=str(folder))
        looks = 1
    finally:
        _delete(folder, looks)
        if not existed:
            with suppress(OSError):  # somebody else has put something there
                storage.rmdir()


def _delete(folder: Path, looks: int) -> None:
    """Also where workers that are being ended still write into it; it must then be gone at so many `looks` in a row."""
    gone = 0
    for _ in range(_DELETE_TRIES):
        gone = 0 if folder.exists() else gone + 1
        if gone == looks:
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.2)


def _with_fewer(dataset: Dataset, val_images: int) -> Dataset:
    return dataclasses.replace(dataset, val=Excerpt(dataset.val, np.arange(val_images)))


def table(
    config: RunConfig, plan: TrainPlan, measured: Measured, forecast: Forecast, nodes: int, price: float | None
) -> list[tuple[str, str]]:
    """What a rehearsal says, line by line."""
    speed = plan.batch_size / measured.step_seconds
    rate = speed * training_flops(config.model, config.init.train)
    used = utilisation(rate, measured.device, measured.workers)
    share = f", {100 * used:.1f} % of the bf16 peak" if used else ""
    compute = measured.step_seconds - measured.wait_seconds - measured.communication_seconds
    workers = f"{measured.workers} worker{'s' * (measured.workers > 1)} on {measured.device}, in {measured.precision}"
    averaged = _part(measured.communication_seconds, measured) if measured.workers > 1 else "none, one worker"
    what, why = bottleneck(measured)
    rows = [
        ("speed", f"{speed:,.1f} images/s, {format_flops(rate)}{share}; {workers}"),
        ("step", f"{1000 * measured.step_seconds:,.0f} ms, mean of {measured.steps}"),
        ("  data wait", _part(measured.wait_seconds, measured)),
        ("  communication", averaged),
        ("  compute", f"{_part(max(compute, 0.0), measured)}, the rest"),
        ("bottleneck", f"{what}: {why}"),
        ("memory of a worker", f"{measured.peak_bytes / 2**30:.2f} GiB at most"),
        ("checkpoint", f"{measured.writing_seconds:.1f} s to write, beside training"),
        (
            "whole run",
            f"{format_duration(forecast.total_seconds)} for {plan.epochs} epochs, without interruptions"
            f"{caveat(measured)}",
        ),
        ("  start-up", format_duration(forecast.startup_seconds)),
        ("  training", format_duration(forecast.training_seconds)),
        ("  evaluation", format_duration(forecast.evaluation_seconds)),
        ("  saving, drawing", format_duration(forecast.saving_seconds)),
    ]
    if price is not None:
        cost = forecast.cost(nodes, price)
        rows.append(("cost", f"{cost:,.2f} at {price:g} an hour for each of {nodes} node{'s' * (nodes > 1)}"))
    return rows


def _part(seconds: float, measured: Measured) -> str:
    return f"{1000 * seconds:,.0f} ms, {100 * seconds / measured.step_seconds:.0f} %"
