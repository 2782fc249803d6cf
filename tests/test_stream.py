"""Ray's stream against the local one: the same batches, bit for bit, for any number of workers, from any step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import with_fields

from diffvit.config import RunConfig
from diffvit.data import stream as stream_module
from diffvit.data.batches import Batch
from diffvit.data.loader import BatchLoader, LocalStream
from diffvit.data.order import EvalPlan, TrainPlan
from diffvit.data.sources import open_dataset
from diffvit.data.stream import RayStream

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


Ask = Callable[[RayStream], Iterator[Batch]]


def loaders(config: RunConfig, workers: int, accumulation_steps: int = 1) -> tuple[BatchLoader, BatchLoader]:
    dataset = open_dataset(config.data)
    plan = TrainPlan(len(dataset.train), 0, 2, config.optim.batch_size, workers, accumulation_steps)
    return BatchLoader(config, dataset.train, plan), BatchLoader(config, dataset.val, EvalPlan(len(dataset.val), 4))


class Broadcast:
    """Ray Train's broadcast between ranks that are threads."""

    def __init__(self, workers: int) -> None:
        self.barrier, self.value = threading.Barrier(workers), None

    def __call__(self, rank: int, value: Any) -> Any:
        if rank == 0:
            self.value = value
        self.barrier.wait()
        value = self.value
        self.barrier.wait()
        return value


def on_every_rank(config: RunConfig, workers: int, ask: Ask, accumulation_steps: int = 1) -> list[list[Batch]]:
    """What `ask` gets from the stream of each rank, the ranks side by side."""
    train, val = loaders(config, workers, accumulation_steps)
    broadcast = Broadcast(workers)

    def run(rank: int) -> list[Batch]:
        return [copied(batch) for batch in ask(RayStream(train, val, rank, workers, partial(broadcast, rank)))]

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, range(workers)))


def copied(batch: Batch) -> Batch:
    return Batch(batch.row, batch.images.copy(), batch.labels.copy(), batch.skipped)


def assert_same(ours: list[Batch], theirs: Iterator[Batch]) -> None:
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.row == yours.row
        assert mine.skipped == yours.skipped
        np.testing.assert_array_equal(mine.labels, yours.labels)
        np.testing.assert_array_equal(mine.images, yours.images)


@pytest.mark.parametrize(("workers", "accumulation_steps", "first_step"), [(1, 1, 0), (2, 1, 4), (3, 2, 1), (4, 1, 5)])
def test_training_batches_match_the_local_stream(
    tiny_config: RunConfig, workers: int, accumulation_steps: int, first_step: int
) -> None:
    train, val = loaders(tiny_config, workers, accumulation_steps)
    by_rank = on_every_rank(tiny_config, workers, lambda stream: stream.train(first_step), accumulation_steps)
    for rank, batches in enumerate(by_rank):
        assert len(batches) == (6 - first_step) * accumulation_steps
        assert_same(batches, LocalStream(train, val, rank, workers).train(first_step))


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_evaluation_sees_each_sample_once_and_again(tiny_config: RunConfig, workers: int) -> None:
    config = with_fields(tiny_config, optim={"batch_size": 30})  # so that 5 divides it; 15 images in rows of 4
    labels = open_dataset(config.data).val.labels.tolist()
    twice = on_every_rank(config, workers, lambda stream: chain(stream.evaluate(), stream.evaluate()))
    seen = sorted((batch.row, batch.labels.tolist()) for batches in twice for batch in batches)
    assert [label for _, row_labels in seen[::2] for label in row_labels] == labels
    assert seen[::2] == seen[1::2]


def test_segments_and_chunks_do_not_show(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan cut into several data sets, of chunks of several rows, one of them short."""
    monkeypatch.setattr(stream_module, "_CHUNK_IMAGES", 24)
    monkeypatch.setattr(stream_module, "_SEGMENT_CHUNKS", 2)
    train, val = loaders(tiny_config, 1)
    batches = list(RayStream(train, val, 0, 1, lambda value: value).train(1))
    assert_same(batches, LocalStream(train, val).train(1))


def test_bad_images_keep_their_place(tiny_config: RunConfig) -> None:
    file = open_dataset(tiny_config.data).train
    Path(file.root, file.key(7)).write_bytes(b"")
    (batches,) = on_every_rank(tiny_config, 1, lambda stream: stream.train(0))
    skipped = [line.split(":")[0] for batch in batches for line in batch.skipped]
    assert skipped == [file.key(7)] * 2  # once an epoch
    assert sum((batch.labels == -100).sum() for batch in batches) == 2
    assert {len(batch.labels) for batch in batches} == {12}


def test_closing_early_leaves_no_stream_behind(tiny_config: RunConfig) -> None:
    train, val = loaders(tiny_config, 1)
    stream = RayStream(train, val, 0, 1, lambda value: value)
    batches = stream.train(0)
    assert next(batches).row == 0
    batches.close()
    assert next(stream.train(3)).row == 3
