"""Which checkpoints are kept, and what a reader sees of a store that is being written."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ObjectStore
from safetensors.torch import load_file

from diffvit import storage
from diffvit.config import CheckpointConfig
from diffvit.storage import Storage
from diffvit.training import checkpoint_writer
from diffvit.training.checkpoint import Snapshot
from diffvit.training.checkpoint_store import CheckpointStore, Entry, Superseded, kept_steps, newest_written
from diffvit.training.checkpoint_writer import CheckpointWriter


def entries(*top1_by_epoch: float, steps_between: int = 0) -> list[Entry]:
    """An evaluated checkpoint every 10 steps, each an epoch, and `steps_between` others after each."""
    found = []
    for number, top1 in enumerate(top1_by_epoch, start=1):
        found.append(Entry(10 * number, {"epoch": number, "top1": top1}))
        found += [Entry(10 * number + k, {"epoch": number + 1}) for k in range(1, steps_between + 1)]
    return found


@pytest.mark.parametrize(
    ("found", "keep_last", "every_epochs", "kept"),
    [
        ([], 2, None, set()),
        (entries(50.0), 3, None, {10}),
        (entries(50, 70, 60, 65), 1, None, {20, 40}),
        (entries(50, 70, 60, 65), 2, None, {20, 30, 40}),
        (entries(50, 70, 70, 65), 1, None, {20, 40}),  # of equals the first
        (entries(50, 70, 60, 65, steps_between=2), 2, None, {20, 41, 42}),
        (entries(50, 90, 60, 65, 61, 62, 63, steps_between=1), 1, 3, {20, 30, 60, 71}),
    ],
)
def test_the_last_the_best_and_every_so_many_epochs(
    found: list[Entry], keep_last: int, every_epochs: int | None, kept: set[int]
) -> None:
    assert kept_steps(found, keep_last, every_epochs) == kept


def snapshot(step: int, size: int = 1000) -> Snapshot:
    weights = {"w": torch.arange(size, dtype=torch.float32) + step}
    return Snapshot(step, weights, {"skipped": step}, {"metrics": {"epoch": 1}}, None)


def test_an_object_store(object_store: ObjectStore, tmp_path: Path) -> None:
    uri = object_store.uri(f"run-{tmp_path.name}")
    store = CheckpointStore(uri, CheckpointConfig(keep_last=2))
    warnings: list[str] = []
    assert store.newest_whole(warnings.append) is None
    assert newest_written(uri) is None
    for step in (3, 5, 8):
        store.put(snapshot(step))
        store.drop_others(step)

    def taken_over() -> None:
        assert (Storage(uri).size("checkpoint_step_00000009/model.safetensors") or 0) > 0
        raise Superseded("taken over")

    with pytest.raises(Superseded):
        store.put(snapshot(9), taken_over)
    Storage(uri).write("checkpoint_step_00000009/training.pt", b"on its way")
    assert newest_written(uri) == "checkpoint_step_00000008"
    store.sweep()
    assert [entry.step for entry in store.entries()] == [5, 8]
    with store.opened(8) as folder:
        assert torch.equal(load_file(folder / "model.safetensors")["w"], torch.arange(1000.0) + 8)
    name = "checkpoint_step_00000008/model.safetensors"
    Storage(uri).write(name, Storage(uri).read(name)[:-1])
    newest = store.newest_whole(warnings.append)
    assert newest is not None
    assert newest.step == 5
    assert "checkpoint_step_00000008 is passed over" in warnings[0]
    store.put(snapshot(8))  # the run has come to step 8 again
    newest = store.newest_whole(warnings.append)
    assert newest is not None
    assert newest.step == 8


@pytest.mark.slow
def test_training_goes_on_while_an_object_store_is_away(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(checkpoint_writer, "_FIRST_DELAY_SECONDS", 0.1)
    store = CheckpointStore(object_store.uri(f"away-{tmp_path.name}"), CheckpointConfig(keep_last=9))
    warnings: list[str] = []
    writer = CheckpointWriter(store, 1, warnings.append)
    writer.submit(snapshot(1))
    writer.wait()
    object_store.stop()
    writer.submit(snapshot(2))
    wait_until(lambda: len(warnings) >= 2)
    started = time.monotonic()
    for step in (3, 4, 5):
        writer.submit(snapshot(step))
    assert time.monotonic() - started < 5  # nobody waits
    object_store.start()
    writer.close()
    assert [entry.step for entry in store.entries()] == [1, 2, 5]
    assert writer.failure is None
    assert all("checkpoint_step_00000002 could not be written and is tried again" in warning for warning in warnings)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["disk", "object_store"])
def test_what_somebody_keeps_beside_the_checkpoints_is_left_alone(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    where = str(tmp_path / "run") if kind == "disk" else request.getfixturevalue(kind).uri(f"kept-{tmp_path.name}")
    store, files = CheckpointStore(where, CheckpointConfig(keep_last=1)), Storage(where)
    store.put(snapshot(3))
    copies = ["checkpoint_step_00000003_good/model.safetensors", "checkpoint_step_00000003.tar", "checkpoint_step_x/y"]
    for name in copies:
        files.write(name, b"mine")
    newest = store.newest_whole(pytest.fail)
    assert newest is not None
    assert newest.step == 3
    store.sweep()
    store.drop_others(3)
    assert all(files.read(name) == b"mine" for name in copies)
