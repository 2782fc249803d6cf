"""What the one coordinator of a run's stream can deal out, measured on one machine with decoding that costs nothing.

The stream is the real one (`diffvit.data.stream`): its data set, its chunks and Ray Data's SplitCoordinator. Only the
loader is not: it returns ready arrays. The consumers are threads that drop what they get.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import ray

from diffvit.data import stream
from diffvit.data.batches import Batch
from diffvit.data.loader import BatchLoader
from diffvit.data.order import TrainPlan

CHANNELS, IMAGE_SIZE = 3, 224
COORDINATOR = "ray::SplitCoordinator"
_CHUNKS = 1024
_WARM_UP_CHUNKS = 16
_JOIN_SECONDS = 5.0


@dataclass(frozen=True)
class Dealt:
    """What `consumers` took together in `seconds`, the first chunks not counted."""

    consumers: int
    images_per_chunk: int
    loading_seconds: float
    """That a task spends asleep for each chunk."""
    chunks: int
    seconds: float
    coordinator_cpu_seconds: float
    """Of the coordinator's process in `seconds`; NaN where there is no /proc."""
    tasks_at_once: float
    """Loading tasks that ran side by side, on average; 0 where loading takes no time."""

    @property
    def chunks_per_second(self) -> float:
        return self.chunks / self.seconds

    @property
    def coordinator_seconds_per_chunk(self) -> float:
        """Of CPU."""
        return self.coordinator_cpu_seconds / max(self.chunks, 1)


@dataclass(frozen=True)
class ReadyLoader:
    """Stands in for `BatchLoader`: black images, `seconds` after they were asked for.

    A micro-batch's first and last label tell when it was begun and ended, in microseconds of the clock.
    """

    plan: TrainPlan
    seconds: float = 0.0
    channels: int = CHANNELS
    image_size: int = IMAGE_SIZE

    def __call__(self, row: int, into: npt.NDArray[np.uint8]) -> Batch:
        began = time.time_ns() // 1000
        into[:] = 0
        labels = np.zeros(self.plan.row_size, np.int64)
        time.sleep(self.seconds)
        labels[0], labels[-1] = began, time.time_ns() // 1000
        return Batch(row, into, labels)


def deal(consumers: int, images_per_chunk: int, seconds: float, loading_seconds: float = 0.0) -> Dealt:
    """Take chunks of so many images (2 or more) for so many seconds. Ray must be running."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a task cannot import what lies beside a script
    batch_size = consumers * images_per_chunk
    steps = _CHUNKS // consumers
    plan = TrainPlan(steps * batch_size, 0, 1, batch_size, consumers)
    loader = cast(BatchLoader, ReadyLoader(plan, loading_seconds))
    came, spans, stop = list[float](), list[tuple[float, float]](), threading.Event()

    def consume(split: Any) -> None:
        for chunk in split.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            came.append(time.time())
            spans.extend((batch.labels[0] / 1e6, batch.labels[-1] / 1e6) for batch in stream._unpack(chunk))
            if stop.is_set():
                return

    with patch.object(stream, "_CHUNK_IMAGES", images_per_chunk):  # a micro-batch is then a chunk: none grow
        splits = stream._split_chunks(loader, range(steps * consumers), consumers)
    threads = [threading.Thread(target=consume, args=(split,), daemon=True) for split in splits]
    for thread in threads:
        thread.start()
    while len(came) < _WARM_UP_CHUNKS:
        if not any(thread.is_alive() for thread in threads):
            raise RuntimeError("the stream ended before it was warm")
        time.sleep(0.01)
    began, cpu = time.time(), cpu_seconds(COORDINATOR)
    time.sleep(seconds)
    ended, cpu = time.time(), cpu_seconds(COORDINATOR) - cpu
    time.sleep(loading_seconds)  # so that what was loading at the end has come
    stop.set()
    for thread in threads:
        thread.join(_JOIN_SECONDS)
    return Dealt(
        consumers=consumers,
        images_per_chunk=images_per_chunk,
        loading_seconds=loading_seconds,
        chunks=sum(began < moment <= ended for moment in came),
        seconds=ended - began,
        coordinator_cpu_seconds=cpu,
        tasks_at_once=mean_at_once(spans, began, ended),
    )


def mean_at_once(spans: Sequence[tuple[float, float]], began: float, ended: float) -> float:
    """How many of the (begin, end) hold a moment between `began` and `ended`, on average."""
    return sum(max(min(end, ended) - max(begin, began), 0.0) for begin, end in spans) / (ended - began)


def cpu_seconds(title: str) -> float:
    """User and system time, so far, of descendants whose command's name has that in it; NaN where there is no /proc."""
    titles, parents, used = dict[int, str](), dict[int, int](), dict[int, float]()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            titles[int(folder.name)] = (folder / "cmdline").read_text().partition("\0")[0]
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents[int(folder.name)] = int(fields[1])
        used[int(folder.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def is_ours(process: int) -> bool:
        while process in parents and process != os.getpid():
            process = parents[process]
        return process == os.getpid()

    found = [seconds for process, seconds in used.items() if title in titles[process] and is_ours(process)]
    return sum(found) if found else float("nan")
