"""Ray's stream against the local one: the same batches, bit for bit, for any number of workers, from any step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray
import torch
from conftest import ObjectStore, make_folder, with_fields
from ray._private.internal_api import get_memory_info_reply
from ray.data import ExecutionResources

from diffvit.config import PrepareConfig, RunConfig
from diffvit.data import loader as loader_module
from diffvit.data import stream as stream_module
from diffvit.data.batches import Batch, Stream
from diffvit.data.datasets import Split, open_dataset
from diffvit.data.loader import BatchLoader, LocalStream, plan_run
from diffvit.data.order import EvalPlan, TrainPlan
from diffvit.data.prepare import prepare
from diffvit.data.stream import RayStream
from diffvit.data.subset import Excerpt, Subset
from diffvit.storage import Storage
from diffvit.training.audit import Audit

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(autouse=True)
def one_batch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data sets here are so small that each rank would make all of their batches itself.

    Ranks are processes, and threads here: they would draw from the same generator if they made theirs at once.
    """
    monkeypatch.setattr(stream_module, "_OWN_IMAGES", 1)
    monkeypatch.setattr(loader_module, "_KEPT_BYTES", 0)
    load, lock = BatchLoader._load, threading.Lock()

    def one_at_a_time(*arguments: Any) -> Batch:
        with lock:
            return load(*arguments)

    monkeypatch.setattr(BatchLoader, "_load", one_at_a_time)


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
        try:
            return [copied(batch) for batch in ask(RayStream(train, val, rank, workers, partial(broadcast, rank)))]
        except BaseException:
            broadcast.barrier.abort()  # or the other ranks would wait for this one
            raise

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, range(workers)))


def copied(batch: Batch) -> Batch:
    return Batch(batch.row, batch.images.copy(), batch.labels.copy(), batch.skipped, batch.samples.copy())


def assert_same(ours: list[Batch], theirs: Iterator[Batch]) -> None:
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.row == yours.row
        assert mine.skipped == yours.skipped
        np.testing.assert_array_equal(mine.samples, yours.samples)
        np.testing.assert_array_equal(mine.labels, yours.labels)
        np.testing.assert_array_equal(mine.images, yours.images)


@pytest.mark.parametrize(("workers", "accumulation_steps", "first_step"), [(1, 1, 0), (2, 1, 4), (3, 2, 1), (4, 1, 3)])
def test_training_batches_match_the_local_stream(
    tiny_config: RunConfig, workers: int, accumulation_steps: int, first_step: int
) -> None:
    train, val = loaders(tiny_config, workers, accumulation_steps)
    by_rank = on_every_rank(tiny_config, workers, lambda stream: stream.train(first_step), accumulation_steps)
    for rank, batches in enumerate(by_rank):
        assert len(batches) == (6 - first_step) * accumulation_steps
        assert_same(batches, LocalStream(train, val, rank, workers).train(first_step))


def test_a_sample_looks_the_same_whatever_the_number_of_workers(tiny_config: RunConfig) -> None:
    """Crop and flip are the sample's and the epoch's, not the rank's."""
    seen: list[dict[tuple[int, int], Any]] = []
    for workers in (1, 2, 3, 4):
        train, val = loaders(tiny_config, workers)
        plan = train.plan
        assert isinstance(plan, TrainPlan)
        seen.append(
            {
                (plan.locate(batch.row)[0], int(sample)): image
                for rank in range(workers)
                for batch in LocalStream(train, val, rank, workers).train(3)
                for sample, image in zip(batch.samples, batch.images, strict=True)
            }
        )
    assert len(seen[0]) == 36
    for images in seen[1:]:
        assert images.keys() == seen[0].keys()
        assert all(np.array_equal(image, seen[0][place]) for place, image in images.items())


def test_what_was_consumed_is_not_read_again(tiny_config: RunConfig, tmp_path: Path) -> None:
    """A run that goes on after step 4 of 6 reads the images of two steps."""
    train, val = loaders(tiny_config, 1)
    reads = tmp_path / "reads"
    reads.mkdir()

    def note(indices: Any) -> None:
        (reads / f"{time.monotonic_ns()}-{os.getpid()}").write_text(" ".join(map(str, indices.tolist())))

    noted = BatchLoader(tiny_config, watched(train.split, note), train.plan)
    batches = list(RayStream(noted, val, 0, 1, lambda value: value).train(4))
    read = sorted(int(index) for file in reads.iterdir() for index in file.read_text().split())
    assert len(read) == 2 * 12
    assert read == sorted(sample for batch in batches for sample in batch.samples.tolist())


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_evaluation_sees_each_sample_once_and_again(tiny_config: RunConfig, workers: int) -> None:
    config = with_fields(tiny_config, optim={"batch_size": 30})  # so that 5 divides it; 15 images in rows of 4
    labels = open_dataset(config.data).val.labels.tolist()
    twice = on_every_rank(config, workers, lambda stream: chain(stream.evaluate(), stream.evaluate()))
    seen = sorted((batch.row, batch.labels.tolist()) for batches in twice for batch in batches)
    assert [label for _, row_labels in seen[::2] for label in row_labels] == labels
    assert seen[::2] == seen[1::2]


@pytest.mark.parametrize(("accumulation_steps", "shared"), [(1, [3, 0]), (2, [3, 3, 1])])
def test_segments_and_chunks_do_not_show(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, accumulation_steps: int, shared: list[int]
) -> None:
    """A plan cut into several data sets of two chunks of two rows, from step 1 of 6; one row of each is the rank's."""
    monkeypatch.setattr(stream_module, "_CHUNK_IMAGES", 24 // accumulation_steps)
    monkeypatch.setattr(stream_module, "_SEGMENT_CHUNKS", 2)
    train, val = loaders(tiny_config, 1, accumulation_steps)
    made: list[int] = []
    split = stream_module._split_chunks

    def spy(loader: BatchLoader, rows: range, workers: int) -> Any:
        made.append(len(rows))
        return split(loader, rows, workers)

    monkeypatch.setattr(stream_module, "_split_chunks", spy)
    batches = list(RayStream(train, val, 0, 1, lambda value: value).train(1))
    assert_same(batches, LocalStream(train, val).train(1))
    assert made == [rows for rows in shared if rows]


def test_a_small_plan_needs_no_ray(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank makes its batches itself; nothing is split, and nobody asks for the others."""
    monkeypatch.setattr(stream_module, "_OWN_IMAGES", 36)
    train, val = loaders(tiny_config, 2)
    for rank in range(2):
        stream = RayStream(train, val, rank, 2, lambda value: pytest.fail(f"asked the other ranks for {value}"))
        assert_same(list(stream.train(0)), LocalStream(train, val, rank, 2).train(0))
        assert_same(list(stream.evaluate()), LocalStream(train, val, rank, 2).evaluate())


def test_few_evaluation_images_are_made_once_by_the_ranks(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many in memory as the rank with the most has; one byte less, and Ray makes them."""
    config = with_fields(tiny_config, optim={"batch_size": 30})
    train, val = loaders(config, 2)  # 15 images in rows of 4, so two of each rank
    expected = [list(LocalStream(train, val, rank, 2).evaluate()) for rank in range(2)]
    size = 2 * 4 * val.channels * val.image_size**2
    made: list[int] = []
    monkeypatch.setattr(stream_module, "_split_chunks", lambda *_: pytest.fail("Ray was asked"))
    monkeypatch.setattr(loader_module, "_KEPT_BYTES", size)
    load = BatchLoader._load
    monkeypatch.setattr(BatchLoader, "_load", lambda self, row, *rest: made.append(row) or load(self, row, *rest))
    for rank in range(2):
        stream = RayStream(train, val, rank, 2, lambda value: pytest.fail(f"asked the other ranks for {value}"))
        for _ in range(2):
            assert_same(list(stream.evaluate()), iter(expected[rank]))
    assert made == [0, 2, 1, 3]
    monkeypatch.setattr(loader_module, "_KEPT_BYTES", size - 1)
    assert not val.own_evaluation(0, 2).is_small
    assert not val.own_evaluation(1, 2).is_small


@pytest.mark.parametrize("kind", [Subset, Excerpt])
def test_an_excerpt_is_kept_only_where_the_whole_would_be(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, kind: type[Subset]
) -> None:
    """A rehearsal evaluates a few images of a split that is decoded anew each time."""
    dataset = open_dataset(tiny_config.data)
    few = BatchLoader(tiny_config, kind(dataset.val, np.arange(8)), EvalPlan(8, 4))
    monkeypatch.setattr(loader_module, "_KEPT_BYTES", 12 * few.channels * few.image_size**2)
    assert few.own_evaluation(0, 1).is_small is (kind is Subset)
    assert sum(len(batch.samples) for batch in few.own_evaluation(0, 1).batches()) == 8


def test_making_a_batch_draws_no_random_numbers_of_the_caller(tiny_config: RunConfig) -> None:
    """A rank makes some of its batches itself, in the middle of a step that drops paths."""
    train, _ = loaders(tiny_config, 1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(0)
    assert torch.equal(torch.rand(3), expected)


def test_chunks_grow_shrink_and_cover() -> None:
    assert stream_module._ramped(20, 6) == [0, 1, 3, 7, 13, 17, 19, 20]
    assert stream_module._ramped(3, 1) == [0, 1, 2, 3]
    assert stream_module._ramped(1, 9) == [0, 1]


def test_bad_images_keep_their_place(tiny_config: RunConfig) -> None:
    file = open_dataset(tiny_config.data).train
    Path(file.root, file.key(7)).write_bytes(b"")
    (batches,) = on_every_rank(tiny_config, 1, lambda stream: stream.train(0))
    skipped = [line.split(":")[0] for batch in batches for line in batch.skipped]
    assert skipped == [file.key(7)] * 2  # once an epoch
    assert sum((batch.labels == -100).sum() for batch in batches) == 2
    assert {len(batch.labels) for batch in batches} == {12}


def test_cut_anywhere_the_audit_is_that_of_an_uncut_run(tiny_config: RunConfig, tmp_path: Path) -> None:
    """Sittings of 1 to 4 workers end at random steps, each going on from the last saved one."""
    images = make_folder(tmp_path / "more", images_per_class=40, val_per_class=5)
    tiny_config = with_fields(tiny_config, data={"path": str(images)})
    total, saves_every = 20, 3
    local = loaders(tiny_config, 1)
    uncut = audit_of(tmp_path / "uncut", [(LocalStream(*local), local[0].plan)], 0, total, saves_every)
    rng = np.random.default_rng(9)
    step, sittings = 0, list[tuple[int, int]]()
    while step < total:
        workers, lost = int(rng.integers(1, 5)), min(int(rng.integers(step + 1, step + 7)), total)
        train, val = loaders(tiny_config, workers)
        broadcast = Broadcast(workers)
        ranks = [(RayStream(train, val, r, workers, partial(broadcast, r)), train.plan) for r in range(workers)]
        rows = audit_of(tmp_path / "cut", ranks, step, lost, saves_every)
        step = total if lost == total else lost - lost % saves_every
        sittings.append((workers, lost - step))
    assert {workers for workers, _ in sittings} == {1, 2, 3, 4}
    assert sum(repeated for _, repeated in sittings) >= 3
    columns = ["epoch", "step", "position", "key"]  # the ranks differ, of course
    assert rows.select(columns).equals(uncut.select(columns))
    for epoch in (1, 2):
        keys = rows.filter(pc.equal(rows["epoch"], epoch))["key"].to_pylist()
        assert len(keys) == len(set(keys)) == 120


def audit_of(
    folder: Path, ranks: list[tuple[Stream, TrainPlan]], first_step: int, end: int, saves_every: int
) -> pa.Table:
    """What the ranks' audits say after they trained to step `end` and were lost there."""
    audits = [Audit(str(folder), plan, stream, rank, first_step) for rank, (stream, plan) in enumerate(ranks)]

    def write(rank: int, step: int) -> None:
        taken = [b""] * rank + [audits[rank].take()]
        for name, content in audits[rank].parts(step, taken).items():
            Storage(str(folder)).write(name, content)

    plan = ranks[0][1]

    def sit(rank: int) -> None:
        batches = audits[rank].watch(ranks[rank][0].train(first_step))
        for step in range(first_step + 1, end + 1):
            next(batches)
            if step % saves_every == 0 or step == plan.total_steps:
                write(rank, step)
        batches.close()

    with ThreadPoolExecutor(len(ranks)) as pool:
        list(pool.map(sit, range(len(ranks))))
    files = list((folder / "audit").glob("*.parquet"))
    return pq.read_table(files).sort_by([("epoch", "ascending"), ("position", "ascending")]) if files else pa.table({})


def at_first_read(split: Split, marker: Path, what: Callable[[Path], None]) -> Split:
    """`split`, whose first reader, in whatever process, meets `what` with the path of `marker`."""

    def before(_: Any) -> None:
        with suppress(FileExistsError):
            marker.open("x").close()
            what(marker)

    return watched(split, before)


def watched(split: Split, before: Callable[[Any], None]) -> Split:
    """`split`, whose readers, in whatever process, call `before` with what they are about to read."""

    class Watched:  # in here, because Ray's workers cannot import this module
        labels = split.labels

        def __len__(self) -> int:
            return len(split)

        def key(self, index: int) -> str:
            return split.key(index)

        def read_many(self, indices: Any) -> Iterator[bytes | OSError]:
            before(indices)
            return split.read_many(indices)

    return Watched()


def test_a_lost_reader_changes_nothing(tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of a task is killed while it reads; Ray runs the task again."""
    monkeypatch.setattr(stream_module, "_OWN_IMAGES", 0)  # this process reads nothing

    def be_killed(_: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    train, val = loaders(tiny_config, 1)
    reference = list(LocalStream(train, val).train(0))
    lethal = BatchLoader(tiny_config, at_first_read(train.split, tmp_path / "killed", be_killed), train.plan)
    stream = RayStream(lethal, val, 0, 1, lambda value: value)
    assert_same([copied(batch) for batch in stream.train(0)], iter(reference))
    assert (tmp_path / "killed").exists()


def join_chunk_threads() -> None:
    """Let what was asked for come."""
    for thread in threading.enumerate():
        if thread.name == "chunks":
            thread.join(30)
            assert not thread.is_alive()


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_reader_that_hangs_is_overtaken(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    """What its task was to bring, and all that Ray delivers after it, the rank makes; what comes late is let go."""
    config = with_fields(tiny_config, optim={"batch_size": 1})
    monkeypatch.setattr(stream_module, "_PATIENCE_SECONDS", 2.0)
    monkeypatch.setattr(stream_module, "_CHUNK_IMAGES", 4)
    released = tmp_path / "released"

    def hang(marker: Path) -> None:
        while not marker.with_name("released").exists():
            time.sleep(0.05)

    train, val = loaders(config, 1)
    reference = list(LocalStream(train, val).train(0))
    hanging = BatchLoader(config, at_first_read(train.split, tmp_path / "hangs", hang), train.plan)
    (tmp_path / "hangs").touch()  # the rank's own first batch is none of it
    load, made = BatchLoader._load, []
    monkeypatch.setattr(BatchLoader, "_load", lambda self, row, *rest: made.append(row) or load(self, row, *rest))
    warnings: list[str] = []
    batches = RayStream(hanging, val, 0, 1, lambda value: value, warnings.append).train(0)
    received = [copied(next(batches))]
    (tmp_path / "hangs").unlink()
    try:
        while not (tmp_path / "hangs").exists():  # a task of Ray's has met it
            time.sleep(0.05)
        for batch in batches:
            received.append(copied(batch))
            if warnings and comes_back and not released.exists():
                released.touch()
                join_chunk_threads()
                monkeypatch.setattr(stream_module, "_PATIENCE_SECONDS", 60.0)  # for the next, on a busy machine
        assert released.exists() == comes_back
    finally:
        released.touch()
        join_chunk_threads()
    assert_same(received, iter(reference))
    assert "no images have come for 2 s" in warnings[0]
    assert len(made) == len(set(made))
    assert comes_back == (len(made) < 72 - 4)


def test_a_second_hang_is_overtaken_as_soon_as_the_first(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank is patient with chunks that are slow to come, and not for ever after one that hung."""
    monkeypatch.setattr(stream_module, "_PATIENCE_SECONDS", 0.2)
    train, val = loaders(with_fields(tiny_config, optim={"batch_size": 1}), 1)
    warnings: list[str] = []

    def make_slowly(row: int) -> Batch:
        time.sleep(0.5)
        return train(row)

    def come() -> Iterator[pa.Table]:
        for number, seconds in enumerate((1.0, 0.0, 0.0, 1.0, 0.0)):
            time.sleep(seconds)
            yield stream_module._pack(train, range(4 * number, 4 * number + 4))

    chunks = come()
    stream = RayStream(train, val, 0, 1, lambda value: value, warnings.append)
    loader = cast(BatchLoader, make_slowly)
    received = list(stream._receive(loader, range(20), chunks, stream_module._next_of(chunks)))
    assert [batch.row for batch in received] == list(range(20))
    assert len(warnings) == 2


def test_an_evaluation_that_hangs_does_not_touch_the_next(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks go on alone, and both evaluate again while the reader still hangs."""
    config = with_fields(tiny_config, optim={"batch_size": 30})
    monkeypatch.setattr(stream_module, "_PATIENCE_SECONDS", 3.0)
    monkeypatch.setattr(stream_module, "_OWN_IMAGES", 0)
    train, val = loaders(config, 2)
    expected = [list(LocalStream(train, val, rank, 2).evaluate()) for rank in range(2)]
    rank_process = os.getpid()

    def hang(marker: Path) -> None:
        while os.getpid() != rank_process and not marker.with_name("released").exists():
            time.sleep(0.05)

    hanging = BatchLoader(config, at_first_read(val.split, tmp_path / "hangs", hang), val.plan)
    broadcast = Broadcast(2)
    warnings: list[str] = []

    def evaluate(stream: RayStream) -> list[list[Batch]]:
        return [[copied(batch) for batch in stream.evaluate()] for _ in range(2)]

    streams = [RayStream(train, hanging, rank, 2, partial(broadcast, rank), warnings.append) for rank in range(2)]
    try:
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(evaluate, streams)
        assert not (tmp_path / "released").exists()
    finally:
        (tmp_path / "released").touch()
        join_chunk_threads()
    for rank, twice in enumerate((first, second)):
        for batches in twice:
            assert_same(batches, iter(expected[rank]))
    assert warnings


def test_shards_in_a_bucket_with_an_outage(tiny_config: RunConfig, object_store: ObjectStore, tmp_path: Path) -> None:
    """The batches are those of a local copy, though the store goes away in the middle and Ray's readers find it so.

    These begin to read when it is gone, and it comes back a second after one has tried.
    """
    images = make_folder(tmp_path / "more", images_per_class=40, val_per_class=2)
    uri = object_store.uri(f"stream-{tmp_path.name}")
    streams = []
    for out in (str(tmp_path / "copy"), uri):
        prepare(PrepareConfig(source=str(images), out=out, shard_mib=0.01), lambda *_: None)
        config = with_fields(tiny_config, data={"path": out})
        streams.append(loaders(config, 1))
    expected = LocalStream(*streams[0]).train(0)
    train, val = streams[1]
    rank_process, gone = os.getpid(), tmp_path / "gone"

    def wait_until_gone(_: Any) -> None:
        while os.getpid() != rank_process and not gone.exists():
            time.sleep(0.05)

    held = BatchLoader(config, watched(train.split, wait_until_gone), train.plan)
    batches = RayStream(held, val, 0, 1, lambda value: value).train(0)
    received = [copied(next(batches))]
    with ThreadPoolExecutor(1) as rank:
        with object_store.away() as asked:
            gone.touch()
            rest = rank.submit(lambda: [copied(batch) for batch in batches])
            assert asked.wait(60)
            time.sleep(1)
        received += rest.result()
    assert len(received) == 20
    assert_same(received, expected)


def test_nothing_grows_from_epoch_to_epoch(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what lies in the object store nor the memory of rank and readers, over three epochs of one stream.

    A fourth keeps Ray reading ahead until the third has ended; with it, all that was in the store is gone.
    """
    monkeypatch.setattr(stream_module, "_CHUNK_IMAGES", 32)
    monkeypatch.setattr(stream_module, "_ready_bytes", lambda *_: 32 * 2**20)  # less than an epoch
    monkeypatch.setattr(stream_module, "ExecutionResources", partial(ExecutionResources, cpu=1))  # one reader at a time
    images = make_folder(tmp_path / "more", images_per_class=80, val_per_class=2)
    config = with_fields(
        tiny_config, model={"image_size": 224}, data={"path": str(images)}, optim={"epochs": 4, "batch_size": 16}
    )
    dataset = open_dataset(config.data)
    plan, epoch_bytes = plan_run(config, dataset)[0], 240 * 3 * 224**2
    readers = tmp_path / "readers"
    readers.mkdir()

    def note(_: Any) -> None:
        (readers / str(os.getpid())).touch()

    train = BatchLoader(config, watched(dataset.train, note), plan)
    val = BatchLoader(config, dataset.val, EvalPlan(len(dataset.val), 4))
    before, peaks, memory = settled_store(), [0] * plan.epochs, list[dict[str, int]]()
    for batch in RayStream(train, val, 0, 1, lambda value: value).train(0):
        epoch, step = divmod(batch.row, plan.steps_per_epoch)
        ends = step + 1 == plan.steps_per_epoch
        peaks[epoch] = max(peaks[epoch], (settled_store() if ends else store()).object_store_bytes_used)
        if ends:
            memory.append({path.name: own_bytes(path.name) for path in readers.iterdir()})
    del batch
    after = settled_store()
    assert after.cumulative_created_bytes - before.cumulative_created_bytes > 3 * epoch_bytes
    assert peaks[2] < peaks[0] + epoch_bytes // 2
    assert after.object_store_bytes_used < before.object_store_bytes_used + 2**20
    grown = {pid: memory[2][pid] - first for pid, first in memory[0].items() if memory[2][pid]}
    assert str(os.getpid()) in grown
    assert len(grown) > 1
    assert max(grown.values()) < epoch_bytes // 2


def store() -> Any:
    """What Ray's nodes say of their object stores."""
    return get_memory_info_reply(ray._private.state.state).store_stats


def settled_store() -> Any:
    """Once nothing has come or gone for a second."""
    last, now = None, store()
    while now != last:
        time.sleep(1)
        last, now = now, store()
    return now


def own_bytes(pid: str) -> int:
    """Memory of a process, without what it maps of the object store; 0 where it has ended."""
    with suppress(OSError):
        status = Path("/proc", pid, "status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])
    return 0


def test_closing_early_leaves_no_stream_behind(tiny_config: RunConfig) -> None:
    train, val = loaders(tiny_config, 1)
    stream = RayStream(train, val, 0, 1, lambda value: value)
    batches = stream.train(0)
    assert next(batches).row == 0
    batches.close()
    assert [batch.row for batch in stream.train(3)] == [3, 4, 5]  # of which it makes only the first itself


@pytest.mark.parametrize(("workers", "cpus", "mib"), [(1, 2, 1536), (8, 2, 4096), (1, 12, 9216), (2, 8, 6144)])
def test_no_rank_and_no_cpu_waits_for_room(workers: int, cpus: int, mib: int) -> None:
    """Ray Data counts what ranks hold too: one limit for all let four ranks have one decoding task at a time."""
    assert stream_module._ready_bytes(workers, cpus) == mib * 2**20


@pytest.mark.parametrize(
    ("store_gib", "cpus", "mib"), [(64, 16, 128), (12, 16, 64), (2, 8, 21), (2, 64, 16), (0.5, 0, 42), (0, 2, 16)]
)
def test_chunks_are_small_enough_for_every_cpu_to_make_some(store_gib: float, cpus: int, mib: int) -> None:
    """Two chunks a task and three tasks a CPU, in half of the store: with 2 GiB of it two CPUs of eight had work."""
    assert stream_module._chunk_bytes(int(store_gib * 2**30), cpus) // 2**20 == mib
