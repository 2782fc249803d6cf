"""Checkpoints written beside training: in what order, what is passed over, and what happens when the store is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffvit.config import CheckpointConfig
from diffvit.training import checkpoint_writer
from diffvit.training.checkpoint import Snapshot
from diffvit.training.checkpoint_store import CheckpointStore, Superseded
from diffvit.training.checkpoint_writer import CheckpointWriter


def snapshot(step: int, **metrics: float) -> Snapshot:
    return Snapshot(step, {"w": torch.full((3,), float(step))}, {}, {"metrics": {"epoch": step, **metrics}}, None)


class Gate(CheckpointStore):
    """Writes when `open` is set, and fails the first `failures` times."""

    def __init__(self, folder: Path, failures: int = 0) -> None:
        super().__init__(folder, CheckpointConfig(keep_last=99))
        self.open = threading.Event()
        self.entered = threading.Event()
        self.failures = failures

    def put(self, snapshot: Snapshot, before_publishing: Callable[[], None] = lambda: None) -> None:
        self.entered.set()
        assert self.open.wait(10)
        if self.failures:
            self.failures -= 1
            raise OSError("the store is away")
        super().put(snapshot, before_publishing)

    @property
    def steps(self) -> list[int]:
        return [entry.step for entry in self.entries()]


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(checkpoint_writer, "_FIRST_DELAY_SECONDS", 0.01)
    return []


def test_training_does_not_wait_and_what_may_be_the_best_is_written(tmp_path: Path, warnings: list[str]) -> None:
    store = Gate(tmp_path)
    writer = CheckpointWriter(store, 1, warnings.append)
    started = time.monotonic()
    writer.submit(snapshot(1))
    assert store.entered.wait(10)
    for step in (2, 3):  # 3 takes the place of 2
        writer.submit(snapshot(step))
    for epoch in (4, 5):  # ends of epochs stay, and get their metrics
        writer.submit(snapshot(epoch), stays=True)
    writer.describe(5, {"epoch": 5, "top1": 50.0})
    for step in (6, 7):
        writer.submit(snapshot(step))
    assert time.monotonic() - started < 5
    assert store.steps == []
    store.open.set()
    writer.close()
    assert [(entry.step, entry.metrics.get("top1")) for entry in store.entries()] == [
        (1, None), (4, None), (5, 50.0), (7, None)
    ]  # fmt: skip
    assert (writer.failure, warnings) == (None, [])


def test_what_is_pinned_is_written(tmp_path: Path, warnings: list[str]) -> None:
    store = Gate(tmp_path)
    writer = CheckpointWriter(store, 1, warnings.append)
    writer.submit(snapshot(1))
    assert store.entered.wait(10)
    writer.submit(snapshot(2), pinned=(2,))
    for step in (3, 4):  # the weights went bad: a rollback goes to 2
        writer.submit(snapshot(step), pinned=(2,))
    store.open.set()
    writer.close()
    assert store.steps == [1, 2, 4]


def test_a_store_that_comes_back(tmp_path: Path, warnings: list[str]) -> None:
    store = Gate(tmp_path, failures=3)
    store.open.set()
    writer = CheckpointWriter(store, 1, warnings.append)
    writer.submit(snapshot(7))
    writer.close()
    assert store.steps == [7]
    assert warnings == ["checkpoint_step_00000007 could not be written and is tried again: the store is away"] * 3
    assert writer.failure is None


def test_a_store_that_stays_away_is_given_up(tmp_path: Path, warnings: list[str]) -> None:
    store = Gate(tmp_path, failures=10**6)
    store.open.set()
    writer = CheckpointWriter(store, 0.3 / 60, warnings.append)
    writer.submit(snapshot(7))
    writer.wait()
    assert writer.failure == "no checkpoint could be written for 0.005 minutes: the store is away"
    assert len(warnings) >= 3
    assert not list(tmp_path.iterdir())
    writer.close()


def test_a_reader_never_sees_half_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    store = Gate(tmp_path)
    store.open.set()
    written = Snapshot.write
    seen: list[list[int]] = []

    def write(self: Snapshot, folder: Path) -> None:
        written(self, folder)
        seen.append(store.steps)

    monkeypatch.setattr(Snapshot, "write", write)
    store.put(snapshot(3))
    store.put(snapshot(3))  # again, as after a damaged one: the old one stays until the new one is whole
    assert seen == [[], [3]]

    def fail(self: Snapshot, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Snapshot, "write", fail)
    with pytest.raises(OSError, match="No space"):
        store.put(snapshot(4))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_step_00000003"]
    newest: Any = store.newest_whole(warnings.append)
    assert newest.step == 3


def test_a_run_that_is_taken_over_while_a_checkpoint_is_written(tmp_path: Path, warnings: list[str]) -> None:
    """It is not published: who took over has looked for the newest one already."""
    store, asked = Gate(tmp_path), []
    store.open.set()

    def require_ours() -> None:
        asked.append(list(tmp_path.glob(".partial*/model.safetensors")))
        if len(asked) == 4:
            raise Superseded("taken over")

    writer = CheckpointWriter(store, 1, warnings.append, require_ours)
    writer.submit(snapshot(1))
    writer.wait()
    writer.submit(snapshot(2))
    writer.wait()
    assert [len(written) for written in asked] == [0, 1, 0, 1]
    assert writer.failure == "taken over"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_step_00000001"]
    writer.close()


def test_a_full_disk_that_is_made_room_on(small_disk: Path, warnings: list[str]) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes(3 * 2**19))
    store = Gate(small_disk / "run")
    store.open.set()
    writer = CheckpointWriter(store, 1, warnings.append)
    weights = {"w": torch.zeros(2**18)}  # 1 MiB, of which half fits
    writer.submit(Snapshot(7, weights, {}, {"metrics": {"epoch": 1}}, None))
    while len(warnings) < 2:
        assert writer.failure is None
        time.sleep(0.01)
    assert [path.name for path in (small_disk / "run").iterdir()] == []
    filler.unlink()
    writer.close()
    assert store.steps == [7]
