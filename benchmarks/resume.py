"""What order, plan and resume cost for a million images, whatever the step.

Measured: opening a prepared data set and the order of an epoch (time and peak memory), and the time from asking the
stream for a step to its batch, and to the first batch that Ray made (a rank makes the first ones itself), at the start,
in the middle and near the end of a ten-epoch run. Aims: under 2 s and 200 MB; at most 1.5 of a start at 0.

The data set has shards, an index of a million rows, each with a key of its own, and images that can all be read; but
all shards are links to one, of the embedded sample's 10,000 images, and lie in the page cache.

    python benchmarks/resume.py
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import re
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from operator import truediv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import tyro
from rich.console import Console
from rich.table import Table

from diffvit.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, RunConfig
from diffvit.data.datasets import SAMPLE, Dataset, open_dataset
from diffvit.data.loader import BatchLoader
from diffvit.data.order import EvalPlan, TrainPlan
from diffvit.data.shards import (
    FORMAT_VERSION,
    INDEX_SCHEMA,
    DatasetInfo,
    ShardInfo,
    SplitInfo,
    index_name,
    write_info,
    write_shard,
)
from diffvit.data.stream import RayStream
from diffvit.storage import Storage
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


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console(width=110)
    with tempfile.TemporaryDirectory(prefix="diffvit-resume-") as folder:
        # in another process, for what this one has freed would hide what opening takes
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as maker:
            maker.submit(make_dataset, folder, options.images).result()
        dataset, plan = open_and_plan(folder, options, console)
        connect()
        time_starts(dataset, plan, options, console)
        ray.shutdown()  # its tasks may still read ahead of the last stream


def open_and_plan(folder: str, options: Options, console: Console) -> tuple[Dataset, TrainPlan]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, started = memory_mib("VmRSS"), time.perf_counter()
    dataset = open_dataset(DataConfig(path=folder))
    opened = time.perf_counter() - started
    plan = TrainPlan(len(dataset.train), 0, options.epochs, options.batch_size)
    seen = sum(len(plan.samples(row)[1]) for row in range(plan.steps_per_epoch))
    seconds, peak = time.perf_counter() - started, memory_mib("VmHWM") - before
    console.print(
        f"opening {len(dataset.train):,} images in shards, and order and plan of an epoch of {seen:,}: {seconds:.2f} s "
        f"({seconds - opened:.2f} s without opening), {peak:.0f} MiB at most"
    )
    return dataset, plan


def time_starts(dataset: Dataset, plan: TrainPlan, options: Options, console: Console) -> None:
    config = RunConfig(
        model=ModelConfig(image_size=28, patch_size=7, in_channels=1),
        augment=AugmentConfig(crop="pad", padding=1),
        optim=OptimConfig(batch_size=options.batch_size),
    )
    train = BatchLoader(config, dataset.train, plan)
    val = BatchLoader(config, dataset.val, EvalPlan(len(dataset.val), 250))
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


def make_dataset(folder: str, images: int) -> None:
    """So many images in training, a thousand in validation."""
    storage, sample = Storage(folder), open_dataset(DataConfig(path=SAMPLE))
    splits = {name: make_split(storage, name, count, sample) for name, count in (("train", images), ("val", 1000))}
    size = (28, 28.0, 28)
    info = DatasetInfo(FORMAT_VERSION, SAMPLE, {}, list(sample.classes), splits, [0.5], [0.25], size, size, 0)
    write_info(storage, info)


def make_split(storage: Storage, name: str, images: int, sample: Dataset) -> SplitInfo:
    """The sample's training images over and over, in shards that are links to the first."""
    count = min(len(sample.train), images)
    labels = sample.train.labels[:count]
    content = [image for image in sample.train.read_many(np.arange(count)) if isinstance(image, bytes)]
    keys = [f"{name}/{number:09d}" for number in range(images)]
    first, offsets = write_shard(storage, f"{name}/00000.parquet", content, labels.tolist(), keys[:count])
    shards: list[ShardInfo] = []
    for number in range(-(-images // count)):
        held = min(count, images - number * count)
        shards.append(dataclasses.replace(first, name=f"{name}/{number:05d}.parquet", images=held))
        if number:
            Path(storage.path(shards[-1].name)).hardlink_to(storage.path(first.name))
    lengths = [len(image) for image in content]
    columns = [np.arange(images) // count, *(np.resize(column, images) for column in (offsets, lengths, labels)), keys]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, INDEX_SCHEMA, strict=True)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(arrays, schema=INDEX_SCHEMA), sink)
    storage.write(index_name(name), sink.getvalue())
    return SplitInfo(images, np.bincount(np.resize(labels, images)).tolist(), shards)


def memory_mib(field: str) -> float:
    """A figure of this process: VmRSS, or VmHWM, its largest."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


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
