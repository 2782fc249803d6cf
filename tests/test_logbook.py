"""What is written down of a cut, by hand-made clocks."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffvit.training import logbook
from diffvit.training.logbook import Logbook


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1_000_000.0]
    monkeypatch.setattr(logbook.time, "time", lambda: now[0])
    monkeypatch.setattr(logbook.time, "monotonic", lambda: now[0])
    return now


def test_every_cut_is_written_down_once(tmp_path: Path, clock: list[float]) -> None:
    Logbook(tmp_path).begin(0, 0.0, 2)
    assert Logbook(tmp_path).interruptions == []
    sitting = Logbook(tmp_path)
    for step, seconds in ((10, 20.0), (20, 40.0), (23, 46.0)):
        clock[0] = 1_000_000.0 + seconds
        sitting.alive(step, seconds, 2)
    clock[0] += 0.5
    sitting.alive(24, 46.5, 2)  # too soon after the last: not written
    Logbook(tmp_path).cut("worker 1 was lost: killed")
    Logbook(tmp_path).cut("worker 0 was lost: connection reset")  # follows from the first
    clock[0] = 1_000_000.0 + 76.0
    Logbook(tmp_path).begin(20, 40.0, 2)
    first = {
        "when": "1970-01-12T13:47:26+00:00",
        "why": "worker 1 was lost: killed",
        "steps_repeated": 3,
        "seconds_lost": 36.0,  # 30 until it was going again, 6 for three steps
    }
    assert Logbook(tmp_path).interruptions == [first]
    clock[0] += 5
    Logbook(tmp_path).begin(20, 40.0, 3)
    second = {
        "when": "1970-01-12T13:47:56+00:00",
        "why": "resized from 2 to 3 workers",
        "steps_repeated": 0,
        "seconds_lost": 5.0,
    }
    assert Logbook(tmp_path).interruptions == [first, second]
    Logbook(tmp_path).begin(20, 40.0, 3)
    assert Logbook(tmp_path).interruptions[2]["why"] == "ended without a word: killed, or its node was lost"
