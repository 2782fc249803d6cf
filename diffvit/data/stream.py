"""Batches on every rank, made by Ray Data tasks anywhere in the cluster and delivered in the order of the plan.

One row and one block of the Ray data set are a *chunk*: consecutive micro-batches of one rank. Rank 0 builds the data
set from the step where the run starts (Ray Train's own `datasets=` can neither start in the middle nor follow a new
number of workers), splits it and hands the other ranks their part. With `preserve_order` and one row a block, Ray's
output splitter deals blocks to the ranks in turn, so chunk i reaches rank i mod W; `_receive` checks that every
micro-batch came, once, in its place.

What keeps the CPUs busy: Ray Data's scheduling loop sees about 0.15 s late that a task has ended, so a task holds four
seconds of decoding, however small the micro-batches are: two chunks, each handed on when it is made. (More tasks than
CPUs would fill the gaps, and lose more: each is a process that imports torch, and together they need half as much CPU
time again.) Where some nodes have GPUs and others have none, tasks go to those without first, so that CPUs beside the
GPUs decode only what the others cannot. Chunks and tasks grow at the start of a data set, so that its first batches
come soon, and shrink at its end, so that all CPUs finish together. While Ray starts (two seconds), each rank makes its
first micro-batches itself, and later those that do not come (a disk that hangs, a node that crawls), until Ray has
caught up. A rank whose share of the evaluation images fits its memory makes them itself too, once.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, wait
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext, DataIterator, Datasource, ExecutionOptions, ExecutionResources, ReadTask
from ray.data.block import BlockMetadata

from diffvit.data.batches import Batch
from diffvit.data.no_growth import NoGrowth
from diffvit.data.order import EvalPlan, Indices, TrainPlan
from diffvit.data.tasks import fetch

if TYPE_CHECKING:  # the process that deals the chunks out imports this module, and need not load torch
    from diffvit.data.loader import BatchLoader

_LEAST_CHUNK_BYTES, _CHUNK_BYTES = 16 * 2**20, 128 * 2**20
_CHUNK_IMAGES = 1024
"""A chunk grows to as many micro-batches as stay under both (at least one), or less where the store is small."""

_TASK_CHUNKS = 2
"""And a task to so many chunks."""

_READY_TASKS = 3
"""Tasks' chunks for each CPU that there must be room for, or not all CPUs could decode."""

_SEGMENT_CHUNKS = 4096
"""Chunks planned in one Ray data set: bounds the memory of the plan, whatever the length of the run."""

_OWN_IMAGES = 512
"""Each rank makes about as many itself at the start of a data set: a second of work for one CPU."""

_READY_BYTES = 512 * 2**20
"""Decoded images that may lie in the object store for each rank, those that it holds included."""

_PATIENCE_SECONDS, _PATIENT_GAPS, _LONGEST_PATIENCE_SECONDS = 60.0, 3, 600.0
"""How long a rank waits for a chunk before it makes the next micro-batches itself; where chunks are slow to come, so
many times what the last one has taken, up to a bound."""

Coming = tuple[pa.Table | None, float]
"""A chunk, None at the end, and the seconds that it took to come."""

Broadcast = Callable[[Any], Any]
"""Called by every rank; gives each of them what rank 0 passed."""


class RayStream:
    """`diffvit.data.batches.Stream` for one rank of a Ray Train run; `warn` is told of chunks that do not come."""

    def __init__(
        self,
        train: BatchLoader,
        val: BatchLoader,
        rank: int,
        workers: int,
        broadcast: Broadcast,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._train, self._val, self._rank, self._workers = train, val, rank, workers
        self._broadcast, self._warn = broadcast, warn
        self._own_evaluation = val.own_evaluation(rank, workers)

    def train(self, first_step: int) -> Generator[Batch]:
        plan = self._train.plan
        assert isinstance(plan, TrainPlan)
        end = plan.total_steps * plan.rows_per_step
        segment = _SEGMENT_CHUNKS * _rows_per_chunk(self._train, _CHUNK_BYTES)  # the same on every rank
        segment = max(segment - segment % plan.rows_per_step, plan.rows_per_step)
        for first in range(first_step * plan.rows_per_step, end, segment):
            own, shared = self._divide(self._train, range(first, min(first + segment, end)))
            yield from self._serve(self._train, own, shared, self._share_out(self._train, shared))

    def evaluate(self) -> Iterator[Batch]:
        if self._own_evaluation.is_small:  # to start Ray Data again takes seconds, each time
            yield from self._own_evaluation.batches()
            return
        plan = self._val.plan
        assert isinstance(plan, EvalPlan)
        own, shared = self._divide(self._val, range(plan.num_rows))
        yield from self._serve(self._val, own, shared, self._share_out(self._val, shared))

    def preview(self, count: int) -> Batch:
        return self._val.preview(count)

    def keys(self, samples: Indices) -> list[str]:
        return [self._train.split.key(sample) for sample in samples.tolist()]

    def _divide(self, loader: BatchLoader, rows: range) -> tuple[range, range]:
        """The micro-batches that the ranks make themselves, and those that Ray makes."""
        own = -(-_OWN_IMAGES // loader.plan.row_size) * self._workers
        return rows[:own], rows[own:]

    def _share_out(self, loader: BatchLoader, rows: range) -> DataIterator | None:
        if not rows:
            return None
        splits = _split_chunks(loader, rows, self._workers) if self._rank == 0 else None
        # by reference, because Ray Train's broadcast is for less than a kilobyte; in a tuple, or Ray would resolve it
        (reference,) = self._broadcast((ray.put(splits),) if splits else None)
        iterator: DataIterator = ray.get(reference)[self._rank]
        return iterator

    def _serve(self, loader: BatchLoader, own: range, shared: range, iterator: DataIterator | None) -> Iterator[Batch]:
        mine = map(loader, own[self._rank :: self._workers])
        if iterator is None:
            yield from mine
            return
        chunks = _chunks_of(iterator)
        first = _next_of(chunks)  # Ray starts with the first that is asked for
        yield from mine
        yield from self._receive(loader, shared, chunks, first)

    def _receive(
        self, loader: BatchLoader, rows: range, chunks: Iterator[pa.Table], coming: Future[Coming]
    ) -> Iterator[Batch]:
        """What the rank gets of `rows`: what Ray made or, while a chunk is not `coming`, what it makes itself."""
        expected = iter(rows[self._rank :: self._workers])
        wanted = next(expected, None)
        overtaken: set[int] = set()
        patience = _PATIENCE_SECONDS
        while wanted is not None:
            wait([coming], 0 if overtaken else patience)
            if not coming.done():
                if not overtaken:
                    self._warn(
                        f"no images have come for {patience:.0f} s (micro-batch {wanted}): rank {self._rank} makes "
                        "them itself until they do"
                    )
                overtaken.add(wanted)
                yield loader(wanted)
                wanted = next(expected, None)
                continue
            chunk, seconds = coming.result()
            patience = min(max(_PATIENCE_SECONDS, _PATIENT_GAPS * seconds), _LONGEST_PATIENCE_SECONDS)
            if chunk is None:
                raise RuntimeError(f"Ray Data ended before giving rank {self._rank} micro-batch {wanted}")
            for batch in _unpack(chunk):
                if batch.row in overtaken:
                    overtaken.remove(batch.row)
                    continue
                if batch.row != wanted:
                    raise RuntimeError(f"Ray Data gave rank {self._rank} micro-batch {batch.row} instead of {wanted}")
                yield batch
                wanted = next(expected, None)
            coming = _next_of(chunks)


def _chunks_of(iterator: DataIterator) -> Iterator[pa.Table]:
    yield from iterator.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)  # whole blocks


def _next_of(chunks: Iterator[pa.Table]) -> Future[Coming]:
    """What `chunks` gives next, by a thread that a process which ends does not wait for."""
    coming, asked = Future[Coming](), time.monotonic()

    def work() -> None:
        try:
            chunk = next(chunks, None)
            coming.set_result((chunk, time.monotonic() - asked))
        except BaseException as error:
            coming.set_exception(error)

    threading.Thread(target=work, name="chunks", daemon=True).start()
    return coming


def _rows_per_chunk(loader: BatchLoader, chunk_bytes: int) -> int:
    images = min(chunk_bytes // (loader.channels * loader.image_size**2), _CHUNK_IMAGES)
    return max(images // loader.plan.row_size, 1)


def _chunk_bytes(store_bytes: int, cpus: int) -> int:
    """Ray Data never fills more than half of the object stores, and there all CPUs are to have room."""
    room = store_bytes // 2 // (_READY_TASKS * _TASK_CHUNKS * max(cpus, 1))
    return min(max(room, _LEAST_CHUNK_BYTES), _CHUNK_BYTES)


def _split_chunks(loader: BatchLoader, rows: range, workers: int) -> list[DataIterator]:
    """Micro-batches `rows` of the loader's plan, made in Ray tasks; iterator r gives rows[r::workers]."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [NoGrowth]
    context.target_max_block_size = 1  # byte: what a task yields is a block at once, and not put together with the next
    cpus, store_bytes = (int(ray.cluster_resources().get(name, 0)) for name in ("CPU", "object_store_memory"))
    ready = _ready_bytes(workers, cpus)
    context.execution_options = ExecutionOptions(
        preserve_order=True, resource_limits=ExecutionResources(object_store_memory=ready)
    )
    ends = _ramped(len(rows[::workers]), _rows_per_chunk(loader, _chunk_bytes(store_bytes, cpus)))
    chunks = [rows[rank::workers][a:b] for a, b in pairwise(ends) for rank in range(workers)]
    tasks = [chunks[a:b] for a, b in pairwise(_ramped(len(chunks), _TASK_CHUNKS))]
    dataset = ray.data.read_datasource(
        _Chunks(ray.put(loader), tasks), override_num_blocks=len(tasks), **_first_without_gpu(ray.nodes())
    )
    splits: list[DataIterator] = dataset.streaming_split(workers, equal=False)
    return splits


class _Chunks(Datasource):  # type: ignore[misc]  # to mypy all of Ray Data is Any
    """Read tasks, each of which makes its chunks one after the other."""

    def __init__(self, loader: ray.ObjectRef[BatchLoader], tasks: list[list[range]]) -> None:
        self._loader, self._tasks = loader, tasks

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        return [
            ReadTask(
                partial(_load_chunks, self._loader, chunks),
                BlockMetadata(num_rows=len(chunks), size_bytes=None, input_files=None, exec_stats=None),
            )
            for chunks in self._tasks
        ]


def _load_chunks(loader: ray.ObjectRef[BatchLoader], chunks: list[range]) -> Iterable[pa.Table]:
    os.setpriority(os.PRIO_PROCESS, 0, 19)  # below training, which Ray runs at 15, where they share CPUs
    fetched: BatchLoader = fetch(loader)
    for rows in chunks:
        yield _pack(fetched, rows)


def _first_without_gpu(nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """Options of a task that goes to a node without a GPU while one of `nodes` has room, and else to any node.

    Nodes that come later, or are gone by then, count among the others.
    """
    alive = [node for node in nodes if node["Alive"] and node["Resources"].get("CPU")]
    ids = [node["NodeID"] for node in alive if not node["Resources"].get("GPU")]
    if not 0 < len(ids) < len(alive):
        return {}
    return {
        "label_selector": {"ray.io/node-id": f"in({','.join(ids)})"},
        "fallback_strategy": [{"label_selector": {}}],
    }


def _ready_bytes(workers: int, cpus: int) -> int:
    """Decoded images that may wait in the cluster. Ray Data lets what is being made take three quarters of it."""
    return max(_READY_BYTES * workers, _READY_TASKS * _TASK_CHUNKS * _CHUNK_BYTES * cpus)


def _ramped(count: int, size: int) -> list[int]:
    """0 and where each part of `count` things ends, in parts of 1, 2, 4, … up to `size`, … 2, 1."""
    ends, step = [0], 1
    while ends[-1] < count:
        half_of_the_rest = (count - ends[-1] + 1) // 2
        ends.append(ends[-1] + min(step, size, half_of_the_rest))
        step *= 2
    return ends


def _pack(loader: BatchLoader, rows: range) -> pa.Table:
    """The micro-batches as one row of two columns: all their images as one value, and JSON of the rest."""
    size = loader.plan.row_size
    images = np.empty((len(rows) * size, loader.channels, loader.image_size, loader.image_size), np.uint8)
    batches = [loader(row, images[place * size : (place + 1) * size]) for place, row in enumerate(rows)]
    rest = [(b.row, b.images.shape, b.labels.tolist(), b.skipped, b.samples.tolist()) for b in batches]
    images = images[: sum(len(batch.labels) for batch in batches)]  # the last micro-batch may be short
    column = pa.LargeListArray.from_arrays([0, images.size], images.ravel())  # without a copy
    return pa.table({"images": column, "batches": [json.dumps(rest)]})


def _unpack(chunk: pa.Table) -> Iterator[Batch]:
    images, start = chunk["images"].chunk(0).flatten().to_numpy(), 0
    for row, shape, labels, skipped, samples in json.loads(chunk["batches"][0].as_py()):
        end = start + math.prod(shape)
        yield Batch(row, images[start:end].reshape(shape), np.array(labels), tuple(skipped), np.array(samples))
        start = end
