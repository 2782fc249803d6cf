"""Batches on every rank, made by Ray Data tasks anywhere in the cluster and delivered in the order of the plan.

One row, one block and one task of the Ray data set are a *chunk*: consecutive micro-batches of one rank. Rank 0
builds the data set from the step where the run starts (Ray Train's own `datasets=` can neither start in the middle
nor follow a new number of workers), splits it and hands the other ranks their part. With `preserve_order` and one row
a block, Ray's output splitter deals blocks to the ranks in turn, so chunk i reaches rank i mod W; `_receive` checks
that every micro-batch came, once, in its place.

Why chunks: Ray Data's scheduling loop takes up finished blocks about ten times a second, so a block should hold a
second of decoding, however small the micro-batches are. The first ones are small and each twice the one before, so
that training need not wait a second for its first batch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.data
from ray.data import DataContext, DataIterator, ExecutionOptions, ExecutionResources

from diffvit.data.batches import Batch
from diffvit.data.order import EvalPlan, Indices, TrainPlan
from diffvit.data.tasks import fetch

if TYPE_CHECKING:  # the process that deals the chunks out imports this module, and need not load torch
    from diffvit.data.loader import BatchLoader

_CHUNK_BYTES = 64 * 2**20
_CHUNK_IMAGES = 1024
"""A chunk grows to as many micro-batches as stay under both (at least one)."""

_SEGMENT_CHUNKS = 4096
"""Chunks planned in one Ray data set: bounds the memory of the plan, whatever the length of the run."""

_READY_BYTES = 512 * 2**20
"""Decoded images that may lie in the object store for each rank, those that it holds included."""

Broadcast = Callable[[Any], Any]
"""Called by every rank; gives each of them what rank 0 passed."""


class RayStream:
    """`diffvit.data.batches.Stream` for one rank of a Ray Train run."""

    def __init__(self, train: BatchLoader, val: BatchLoader, rank: int, workers: int, broadcast: Broadcast) -> None:
        self._train, self._val, self._rank, self._workers, self._broadcast = train, val, rank, workers, broadcast
        self._val_iterator: DataIterator | None = None

    def train(self, first_step: int) -> Generator[Batch]:
        plan = self._train.plan
        assert isinstance(plan, TrainPlan)
        end = plan.total_steps * plan.rows_per_step
        segment = _SEGMENT_CHUNKS * _rows_per_chunk(self._train) * plan.accumulation_steps
        segment -= segment % plan.rows_per_step
        for first in range(first_step * plan.rows_per_step, end, max(segment, plan.rows_per_step)):
            rows = range(first, min(first + segment, end))
            yield from self._receive(self._shared_iterator(self._train, rows), rows)

    def evaluate(self) -> Iterator[Batch]:
        plan = self._val.plan
        assert isinstance(plan, EvalPlan)
        rows = range(plan.num_rows)
        if self._val_iterator is None:
            self._val_iterator = self._shared_iterator(self._val, rows)
        yield from self._receive(self._val_iterator, rows)

    def preview(self, count: int) -> Batch:
        return self._val.preview(count)

    def keys(self, samples: Indices) -> list[str]:
        return [self._train.split.key(sample) for sample in samples.tolist()]

    def _shared_iterator(self, loader: BatchLoader, rows: range) -> DataIterator:
        splits = _split_chunks(loader, rows, self._workers) if self._rank == 0 else None
        # by reference, because Ray Train's broadcast is for less than a kilobyte; in a tuple, or Ray would resolve it
        (reference,) = self._broadcast((ray.put(splits),) if splits else None)
        iterator: DataIterator = ray.get(reference)[self._rank]
        return iterator

    def _receive(self, iterator: DataIterator, rows: range) -> Iterator[Batch]:
        expected = iter(rows[self._rank :: self._workers])
        for chunk in iterator.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):  # whole blocks
            for batch in _unpack(chunk):
                wanted = next(expected, None)
                if batch.row != wanted:
                    raise RuntimeError(f"Ray Data gave rank {self._rank} micro-batch {batch.row} instead of {wanted}")
                yield batch
        wanted = next(expected, None)
        if wanted is not None:
            raise RuntimeError(f"Ray Data ended before giving rank {self._rank} micro-batch {wanted}")


def _rows_per_chunk(loader: BatchLoader) -> int:
    images = min(_CHUNK_BYTES // (loader.channels * loader.image_size**2), _CHUNK_IMAGES)
    return max(images // loader.plan.row_size, 1)


def _split_chunks(loader: BatchLoader, rows: range, workers: int) -> list[DataIterator]:
    """Micro-batches `rows` of the loader's plan, made in Ray tasks; iterator r gives rows[r::workers]."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    ready = _ready_bytes(workers, int(ray.cluster_resources().get("CPU", 0)))
    context.execution_options = ExecutionOptions(
        preserve_order=True, resource_limits=ExecutionResources(object_store_memory=ready)
    )
    reference = ray.put(loader)
    ends = _chunk_ends(len(rows[::workers]), _rows_per_chunk(loader))

    def load_chunk(row: dict[str, Any]) -> dict[str, Any]:
        os.setpriority(os.PRIO_PROCESS, 0, 19)  # below training, which Ray runs at 15, where they share CPUs
        number, rank = divmod(int(row["id"]), workers)
        mine = rows[rank::workers][ends[number] : ends[number + 1]]
        return _pack(fetch(reference), mine)

    chunks = (len(ends) - 1) * workers
    dataset = ray.data.range(chunks, override_num_blocks=chunks).map(load_chunk)
    splits: list[DataIterator] = dataset.streaming_split(workers, equal=False)
    return splits


def _ready_bytes(workers: int, cpus: int) -> int:
    """Decoded images that may wait in the cluster; at least two chunks a CPU, or not all CPUs could decode."""
    return max(_READY_BYTES * workers, 2 * _CHUNK_BYTES * cpus)


def _chunk_ends(rows: int, size: int) -> list[int]:
    """0 and where each chunk ends, of `rows` micro-batches of a rank: 1, 2, 4, … up to `size` in a chunk."""
    ends, step = [0], 1
    while ends[-1] < rows:
        ends.append(min(ends[-1] + step, rows))
        step = min(2 * step, size)
    return ends


def _pack(loader: BatchLoader, rows: range) -> dict[str, Any]:
    """The micro-batches as one row of columns, which Arrow holds without a copy."""
    batches = [loader(row) for row in rows]
    empty = np.zeros((0, loader.channels, loader.image_size, loader.image_size), np.uint8)
    return {
        "images": np.concatenate([empty, *(batch.images for batch in batches)]),
        "batches": json.dumps(
            [(batch.row, batch.labels.tolist(), batch.skipped, batch.samples.tolist()) for batch in batches]
        ),
    }


def _unpack(chunk: dict[str, Any]) -> Iterator[Batch]:
    (images,), (batches,) = chunk["images"], chunk["batches"]
    start = 0
    for row, labels, skipped, samples in json.loads(batches):
        yield Batch(row, images[start : start + len(labels)], np.array(labels), tuple(skipped), np.array(samples))
        start += len(labels)
