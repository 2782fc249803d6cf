"""A rehearsal measures what it says, and leaves nothing behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import with_fields

from diffvit.cli import parse_pretrain_config
from diffvit.config import RehearsalOptions, RunConfig
from diffvit.data.batches import Batch
from diffvit.data.loader import BatchLoader, LocalStream, plan_run
from diffvit.data.synthetic import stand_in
from diffvit.rehearse import rehearse
from diffvit.training.checkpoint_store import CheckpointStore
from diffvit.training.loop import Worker
from diffvit.training.rehearsal import Measured, rehearse_steps

BATCH_SECONDS, EVALUATION_SECONDS = 0.03, 0.2


class SlowStream(LocalStream):
    """Each micro-batch takes its time, the first one longer, and so does each evaluation."""

    first_seconds = 0.5

    def train(self, first_step: int) -> Iterator[Batch]:
        time.sleep(self.first_seconds)
        for batch in super().train(first_step):
            time.sleep(BATCH_SECONDS)
            yield batch

    def evaluate(self) -> Iterator[Batch]:
        time.sleep(EVALUATION_SECONDS)
        yield from super().evaluate()


def measure(config: RunConfig, steps: int) -> Measured:
    dataset, _ = stand_in(config)
    config = with_fields(config, model={"num_classes": len(dataset.classes)})
    plan, eval_plan = plan_run(config, dataset)
    stream = SlowStream(BatchLoader(config, dataset.train, plan), BatchLoader(config, dataset.val, eval_plan))
    store = CheckpointStore(config.folder, config.checkpoint)
    worker = Worker(torch.device("cpu"), report=lambda _: None, publish=lambda *_: None, store=store)
    return rehearse_steps(config, plan, eval_plan, stream, worker, steps)


def test_parts_of_a_step(tiny_config: RunConfig) -> None:
    """Two micro-batches a step; the first batch and the first steps are not in it."""
    config = with_fields(tiny_config, scale={"micro_batch_size": 6})
    began = time.perf_counter()
    measured = measure(config, steps=5)
    assert time.perf_counter() - began >= measured.seconds
    assert (measured.workers, measured.device, measured.steps) == (1, "cpu", 3)
    assert 2 * BATCH_SECONDS <= measured.wait_seconds < 2 * BATCH_SECONDS + 0.1
    assert measured.wait_seconds < measured.step_seconds < measured.wait_seconds + 1.0
    assert measured.filling_seconds > SlowStream.first_seconds / 2
    assert measured.evaluation_images == 15
    assert EVALUATION_SECONDS <= measured.evaluation_seconds < EVALUATION_SECONDS + 1.0
    assert measured.communication_seconds == 0  # one worker
    assert measured.drawing_seconds > 0
    assert measured.snapshot_seconds > 0
    assert 50 * 2**20 < measured.peak_bytes < 20 * 2**30


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_on_the_cluster(tiny_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More classes than the folder has, which is not there; two workers, one of the run's two epochs."""
    config = with_fields(
        tiny_config, data={"path": str(tmp_path / "nothing")}, scale={"workers": 2}, model={"num_classes": 13}
    )
    measured, forecast = rehearse(config, RehearsalOptions(rehearse=True, rehearse_steps=4, price_per_hour=7.0))
    assert not Path(config.storage).exists()
    assert (measured.workers, measured.steps) == (2, 2)
    assert measured.communication_seconds >= 0
    assert forecast.training_seconds == pytest.approx(2 * 5000 * measured.step_seconds)  # Fashion-MNIST's 60,000 / 12
    assert forecast.total_seconds > forecast.training_seconds
    shown = capsys.readouterr().out
    assert "rehearsing 4 of the 10,000 steps of tiny" in shown
    assert "like Fashion-MNIST" in shown
    assert "at 7 an hour for each of 1 node\n" in shown


def test_options() -> None:
    config, options = parse_pretrain_config("", ["sample-vit", "--rehearse", "--price-per-hour", "2.5", "--seed", "3"])
    assert (config.name, config.seed) == ("sample-vit", 3)
    assert options == RehearsalOptions(rehearse=True, price_per_hour=2.5)
    assert parse_pretrain_config("", ["sample"])[1] == RehearsalOptions()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--price-per-hour", "2"], "needs --rehearse"),
        (["sample", "--rehearse", "--rehearse-steps", "1"], "rehearse_steps must be at least 2, got 1"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_pretrain_config("", arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
