"""A rehearsal measures what it says, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import with_fields

from diffvit.cli import parse_pretrain_config
from diffvit.config import RehearsalOptions, RunConfig
from diffvit.data.batches import Batch
from diffvit.data.loader import BatchLoader, LocalStream, plan_run
from diffvit.data.synthetic import rehearsal_data
from diffvit.rehearse import _delete, rehearse
from diffvit.training import loop, rehearsal, saver, tracking
from diffvit.training.checkpoint_store import CheckpointStore
from diffvit.training.loop import Worker
from diffvit.training.rehearsal import Measured, rehearse_steps


class Clock:
    """Time that passes only where a test lets it."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    time = perf_counter


class SlowStream(LocalStream):
    """Sets up for 10 seconds; a micro-batch takes 0.25, the first evaluation 8 seconds, the others 3."""

    clock: Clock
    evaluations = 0

    def train(self, first_step: int) -> Iterator[Batch]:
        self.clock.now += 10
        for batch in super().train(first_step):
            self.clock.now += 0.25
            yield batch

    def evaluate(self) -> Iterator[Batch]:
        self.clock.now += 3 if self.evaluations else 8
        self.evaluations += 1
        yield from super().evaluate()

    def preview(self, count: int) -> Batch:
        self.clock.now += 2
        return super().preview(count)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A step computes for 1 second, a snapshot takes half of one."""
    clock = Clock()

    def slower(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            clock.now += seconds
            return result

        return call

    monkeypatch.setattr(rehearsal, "time", clock)
    monkeypatch.setattr(tracking, "time", clock)
    monkeypatch.setattr(loop, "take_step", slower(loop.take_step, 1.0))
    for module in (saver, rehearsal):
        monkeypatch.setattr(module, "take_snapshot", slower(module.take_snapshot, 0.5))
    return clock


@pytest.mark.draws
def test_parts_of_a_step(tiny_config: RunConfig, clock: Clock) -> None:
    """Two micro-batches a step; 5 steps, of which 2 warm up."""
    config = with_fields(tiny_config, scale={"micro_batch_size": 6})
    dataset, _ = rehearsal_data(config)
    config = with_fields(config, model={"num_classes": len(dataset.classes)})
    plan, eval_plan = plan_run(config, dataset)
    stream = SlowStream(BatchLoader(config, dataset.train, plan), BatchLoader(config, dataset.val, eval_plan))
    stream.clock = clock
    store = CheckpointStore(config.folder, config.checkpoint)
    worker = Worker(torch.device("cpu"), report=lambda _: None, publish=lambda *_: None, store=store)
    measured = rehearse_steps(config, plan, eval_plan, stream, worker, steps=5)
    assert 50 * 2**20 < measured.peak_bytes < 20 * 2**30
    assert dataclasses.replace(measured, peak_bytes=0, writing_seconds=0.0) == Measured(  # a thread's, by this clock
        workers=1,
        device="cpu",
        precision="fp32",
        steps=3,
        step_seconds=1.5,
        wait_seconds=0.5,
        communication_seconds=0.0,  # one worker
        filling_seconds=10.0 + 5.0,  # setting up, and what the first evaluation took longer
        evaluation_images=15,
        evaluation_seconds=3.0,
        drawing_seconds=2.0,
        snapshot_seconds=0.5,
        writing_seconds=0.0,
        peak_bytes=0,
        seconds=10 + 5 * 1.5 + 8 + 2 + 0.5 + 0.5 + 3,
    )
    assert store.newest_whole(print) is not None


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_on_the_cluster(tiny_config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = with_fields(tiny_config, scale={"workers": 2})
    measured, forecast = rehearse(config, RehearsalOptions(rehearse=True, rehearse_steps=4, price_per_hour=7.0))
    assert not Path(config.storage).exists()
    assert (measured.workers, measured.steps) == (2, 2)
    assert measured.communication_seconds >= 0
    assert forecast.training_seconds == pytest.approx(2 * 3 * measured.step_seconds)
    assert forecast.total_seconds > forecast.training_seconds
    shown = capsys.readouterr().out
    assert "rehearsing 4 of the 6 steps of tiny" in shown
    assert f"images: 36 and 15 of {config.data.path}" in shown
    assert "at 7 an hour for each of 1 node\n" in shown


@pytest.mark.slow
def test_a_folder_that_a_dying_worker_makes_anew_goes_too(tmp_path: Path) -> None:
    folder = tmp_path / "rehearsal"
    folder.mkdir()
    late = threading.Timer(0.5, lambda: (folder / "tensorboard").mkdir(parents=True))
    late.start()
    _delete(folder, looks=10)
    late.join()
    assert not folder.exists()


def test_options() -> None:
    config, options = parse_pretrain_config("", ["sample-vit", "--rehearse", "--price-per-hour", "2.5", "--seed", "3"])
    assert (config.name, config.seed) == ("sample-vit", 3)
    assert options == RehearsalOptions(rehearse=True, price_per_hour=2.5)
    assert parse_pretrain_config("", ["sample"])[1] == RehearsalOptions()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--price-per-hour", "2"], "is for --rehearse, which is missing"),
        (
            ["sample", "--rehearse", "--rehearse-steps", "1"],
            "at least 2, and needs --rehearse; got 1",
        ),
        (["sample", "--rehearse-steps", "5"], "needs --rehearse; got 5"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_pretrain_config("", arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
