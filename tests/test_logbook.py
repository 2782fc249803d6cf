"""What is written down of a cut, by hand-made clocks."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ObjectStore

from diffvit.storage import Storage, StorageError
from diffvit.training import logbook
from diffvit.training.checkpoint_store import Superseded
from diffvit.training.logbook import Logbook


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1_000_000.0]
    monkeypatch.setattr(logbook, "time", SimpleNamespace(time=lambda: now[0], monotonic=lambda: now[0]))
    return now


@pytest.mark.parametrize("kind", ["disk", "store"])
def test_every_cut_is_written_down_once(
    request: pytest.FixtureRequest, tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(logbook, "_REMOTE_SIGN_SECONDS", 1.0)
    store: ObjectStore | None = request.getfixturevalue("object_store") if kind == "store" else None
    place = store.uri(f"log-{tmp_path.name}") if store else str(tmp_path)
    Logbook(place).begin(0, 0.0, 2)
    assert Logbook(place).interruptions == []
    sitting = Logbook(place)
    for step, seconds in ((10, 20.0), (20, 40.0), (23, 46.0)):
        clock[0] = 1_000_000.0 + seconds
        sitting.alive(step, seconds, 2)
        if sitting._signing:
            sitting._signing.join()
    clock[0] += 0.5
    sitting.alive(24, 46.5, 2)  # too soon after the last: not written
    Logbook(place).cut("worker 1 was lost: killed")
    Logbook(place).cut("worker 0 was lost: connection reset")  # follows from the first
    clock[0] = 1_000_000.0 + 76.0
    Logbook(place).begin(20, 40.0, 2)
    first = {
        "when": "1970-01-12T13:47:26+00:00",
        "why": "worker 1 was lost: killed",
        "steps_repeated": 3,
        "seconds_lost": 36.0,  # 30 until it was going again, 6 for three steps
    }
    assert Logbook(place).interruptions == [first]
    clock[0] += 5
    Logbook(place).begin(20, 40.0, 3)
    second = {
        "when": "1970-01-12T13:47:56+00:00",
        "why": "resized from 2 to 3 workers",
        "steps_repeated": 0,
        "seconds_lost": 5.0,
    }
    assert Logbook(place).interruptions == [first, second]
    Logbook(place).begin(20, 40.0, 3)
    assert Logbook(place).interruptions[2]["why"] == "ended without a word: killed, or its node was lost"


@pytest.mark.slow
def test_nobody_waits_for_a_store_that_is_away(object_store: ObjectStore, tmp_path: Path) -> None:
    book = Logbook(object_store.uri(f"log-{tmp_path.name}"))
    book.begin(0, 0.0, 1)
    book._signed_at -= 10
    object_store.stop()
    try:
        started = time.perf_counter()
        book.alive(7, 3.0, 1)
        assert time.perf_counter() - started < 1
        book.cut("lost with the store")
        assert time.perf_counter() - started < 10
        assert book._signing is not None
        book._signing.join()
    finally:
        object_store.start()
    book._signed_at -= 10
    book.alive(8, 4.0, 1)
    book._signing.join()
    Logbook(object_store.uri(f"log-{tmp_path.name}")).begin(5, 4.0, 1)
    assert book.interruptions[0]["steps_repeated"] == 3
    assert book.interruptions[0]["why"].startswith("ended without a word")


def test_a_claim_that_failed_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = Logbook(tmp_path), Logbook(tmp_path)
    before.claim()

    def away(*_: Any, **__: Any) -> None:
        raise StorageError("the store is away")

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "write", away)
        after.claim()
    before.require_ours()
    after.begin(0, 0.0, 1)
    after.require_ours()
    with pytest.raises(Superseded):
        before.require_ours()


def test_nobody_writes_to_a_run_that_ended(tmp_path: Path) -> None:
    rank_0 = Logbook(tmp_path)
    rank_0.claim()
    rank_0.require_ours()
    Logbook(tmp_path).end()
    with pytest.raises(Superseded, match="another group of workers goes on"):
        rank_0.require_ours()
