"""What order, plan and resume cost for a million images, whatever the step.

Measured: the order of an epoch (time and peak memory), and the time from asking the stream for a step to its batch,
and to the first batch that Ray made (a rank makes the first ones itself), at the start, in the middle and near the end
of a ten-epoch run.

    python benchmarks/resume.py
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from operator import truediv

import numpy as np
import numpy.typing as npt
import tyro
from rich.console import Console
from rich.table import Table

from diffvit.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, RunConfig
from diffvit.data.loader import BatchLoader
from diffvit.data.order import EvalPlan, TrainPlan
from diffvit.data.sources import SAMPLE, open_dataset
from diffvit.data.stream import RayStream
from diffvit.training.cluster import connect


@dataclass(frozen=True)
class Options:
    """What to measure."""

    images: int = 1_000_000
    """Training images."""
    epochs: int = 10
    """Of the run that is cut."""
    batch_size: int = 1024
    """Global batch."""
    rounds: int = 5
    """Starts at each place."""


@dataclass(frozen=True)
class Repeated:
    """The embedded sample's 10,000 images over and over, as many as asked for."""

    count: int

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return np.resize(open_dataset(DataConfig(path=SAMPLE)).train.labels, self.count)

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        return str(index)

    def read_many(self, indices: npt.NDArray[np.int64]) -> Iterator[bytes | OSError]:
        return open_dataset(DataConfig(path=SAMPLE)).train.read_many(indices % 10_000)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console(width=110)
    tracemalloc.start()
    started = time.perf_counter()
    plan = TrainPlan(options.images, 0, options.epochs, options.batch_size)
    seen = sum(len(plan.samples(row)[1]) for row in range(plan.steps_per_epoch))
    seconds, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    console.print(f"order and plan of an epoch, {seen:,} samples: {seconds:.2f} s, {peak / 2**20:.0f} MiB at most")

    connect()
    config = RunConfig(
        model=ModelConfig(image_size=28, patch_size=7, in_channels=1),
        augment=AugmentConfig(crop="pad", padding=1),
        optim=OptimConfig(batch_size=options.batch_size),
    )
    split = Repeated(options.images)
    train = BatchLoader(config, split, plan)
    val = BatchLoader(config, split, EvalPlan(1000, 250))
    middle, late = plan.total_steps // 2, plan.total_steps - 100
    places = {"the first step": 0, f"the middle, step {middle:,}": middle, "100 steps before the last": late}
    first_batches(train, val, 0)  # starts the workers
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in places}
    for _ in range(options.rounds):
        for name, step in places.items():
            times[name].append(first_batches(train, val, step))
    table = Table("going on from", "s to the batch", "to a start at 0", "s to Ray's first", "to a start at 0")
    for name, taken in times.items():
        cells = []
        for which in (0, 1):
            mine, base = [seconds[which] for seconds in taken], [seconds[which] for seconds in times["the first step"]]
            cells += [statistics.median(mine), statistics.median(map(truediv, mine, base))]
        table.add_row(name, *(f"{cell:.2f}" for cell in cells))
    console.print(table)


def first_batches(train: BatchLoader, val: BatchLoader, step: int) -> tuple[float, float]:
    """Seconds from asking for `step` to its batch, and to the first batch that lies in Ray's object store."""
    started = time.perf_counter()
    batches = RayStream(train, val, 0, 1, lambda value: value).train(step)
    batch = next(batches)
    seconds = time.perf_counter() - started
    assert batch.row == step, "the batch of another step"
    next(batch for batch in batches if not batch.images.flags.writeable)
    until_ray = time.perf_counter() - started
    batches.close()
    return seconds, until_ray


if __name__ == "__main__":
    main()
