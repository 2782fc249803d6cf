"""The prediction by hand, and its rule for the bottleneck."""

from __future__ import annotations

import dataclasses

import pytest
from conftest import with_fields

from diffvit.config import RunConfig
from diffvit.data.order import TrainPlan
from diffvit.rehearse import table
from diffvit.training.forecast import Forecast, bottleneck, caveat, predict
from diffvit.training.rehearsal import Measured

MEASURED = Measured(
    workers=2, device="cpu", precision="fp32", steps=40,
    step_seconds=0.5, wait_seconds=0.04, communication_seconds=0.03, filling_seconds=7.0,
    evaluation_images=500, evaluation_seconds=3.0, drawing_seconds=1.5, snapshot_seconds=0.25,
    writing_seconds=2.0, peak_bytes=3 * 2**29, seconds=60.0,
)  # fmt: skip
PLAN = TrainPlan(num_samples=130, seed=0, epochs=11, batch_size=12, workers=2)  # 10 steps an epoch


@pytest.mark.parametrize(
    ("checkpoint", "checkpoints"),
    [  # of 110 steps, and 11 epochs of 5 seconds
        ({}, 11),
        ({"every_steps": 15}, 11 + 7),
        ({"every_minutes": 0.1}, 11),
        ({"every_minutes": 0.04}, 11 * 3),
        ({"every_minutes": 0.04, "every_steps": 15}, 18 * 2),
    ],
)
def test_whole_run_by_hand(tiny_config: RunConfig, checkpoint: dict[str, object], checkpoints: int) -> None:
    forecast = predict(with_fields(tiny_config, checkpoint=checkpoint), PLAN, 2000, MEASURED, startup_seconds=13.0)
    assert forecast == Forecast(
        startup_seconds=20.0,
        training_seconds=55.0,
        evaluation_seconds=11 * 3.0 * 4,
        saving_seconds=checkpoints * 0.25 + 6 * 1.5,  # maps after epochs 2, 4, 6, 8, 10 and the last
    )
    assert forecast.total_seconds == 20 + 55 + 132 + checkpoints * 0.25 + 9


def test_cost_is_for_every_node() -> None:
    assert Forecast(3600.0, 1800.0, 900.0, 900.0).cost(nodes=3, price_per_hour=0.5) == 3.0


@pytest.mark.parametrize(
    ("wait", "communication", "name"),
    [(0.04, 0.03, "compute"), (0.06, 0.03, "data"), (0.04, 0.2, "communication"), (0.3, 0.1, "data")],
)
def test_bottleneck_is_what_takes_more_than_a_tenth(wait: float, communication: float, name: str) -> None:
    measured = dataclasses.replace(MEASURED, wait_seconds=wait, communication_seconds=communication)
    assert bottleneck(measured)[0] == name


def test_table_adds_up(tiny_config: RunConfig) -> None:
    config = with_fields(tiny_config, model={"num_classes": 3})
    forecast = predict(config, PLAN, 2000, MEASURED, startup_seconds=13.0)
    lines = dict(table(config, PLAN, MEASURED, forecast, nodes=2, price=9.0))
    assert lines["speed"].startswith("24.0 images/s")
    assert lines["step"] == "500 ms, mean of 40"
    assert [lines[f"  {part}"].split(",")[0] for part in ("data wait", "communication", "compute")] == [
        "40 ms", "30 ms", "430 ms",
    ]  # fmt: skip
    assert lines["memory of a worker"].startswith("1.50 GiB")
    assert lines["whole run"].startswith("3m39s for 11 epochs")  # 218.75 s
    assert "timed for 20 s only" in lines["whole run"]
    assert not caveat(dataclasses.replace(MEASURED, steps=60))  # 30 s
    assert lines["cost"].startswith("1.09 at 9 an hour for each of 2 nodes")
    assert "cost" not in dict(table(config, PLAN, MEASURED, forecast, nodes=2, price=None))
