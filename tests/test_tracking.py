"""What a run says of its own time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from conftest import with_fields

from diffvit.config import RunConfig
from diffvit.data.datasets import open_dataset
from diffvit.data.loader import plan_run
from diffvit.training import tracking
from diffvit.training.tracking import Tracker


def tracker_of(config: RunConfig, **state: Any) -> Tracker:
    plan = plan_run(config, open_dataset(config.data))[0]
    known = {"step": 0, "train_seconds": 0.0, "model": torch.nn.Linear(1, 1), "epoch_sums": {}, **state}
    return Tracker(config, plan, cast(Any, SimpleNamespace(**known)), lambda *_: None, enabled=False)


def test_the_rest_takes_as_long_a_step_as_this_sitting_took(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that goes on at step 2 of 6, after two more: another two take what these took."""
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: 100.0)
    tracker = tracker_of(tiny_config, step=2, train_seconds=7.0)
    tracker._state.step = 4
    assert tracker._eta_seconds(130.0) == 30.0


def test_the_first_step_is_taken_when_all_its_micro_batches_are(tiny_config: RunConfig) -> None:
    tracker = tracker_of(with_fields(tiny_config, scale={"micro_batch_size": 6}))  # two a step
    batches = tracker.timed(cast(Any, iter("abc")))
    for expected in (False, False, True):
        next(batches)
        assert (tracker._first_step_at is not None) is expected
