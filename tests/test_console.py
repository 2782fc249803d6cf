"""What a run shows in the terminal."""

from __future__ import annotations

import queue
from typing import Any, cast

import pytest

from diffvit import console as module
from diffvit.config import RunConfig
from diffvit.console import Console
from diffvit.data.datasets import open_dataset
from diffvit.data.loader import plan_run

STEP = {"epoch": 2, "step": 4, "loss": 0.51239, "images_per_second": 1234.5, "eta_seconds": 3725.0}
EPOCH = {"epoch": 2, "step": 6, "train_loss": 0.5, "train_top1": 81.25, "loss": 0.25, "top1": 93.333, "top5": 100.0,
         "images_per_second": 1234.5, "data_wait_fraction": 0.034}  # fmt: skip


def test_lines_of_a_run(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_LINE_EVERY_SECONDS", 0.0)
    dataset = open_dataset(tiny_config.data)
    progress: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()  # as Ray's
    skipped = [f"image {number}: torn" for number in range(12)]
    for event in (
        ("step", STEP),
        ("epoch", EPOCH),
        ("warning", {"message": "a node is about to go"}),
        ("skipped", {"images": [*skipped, skipped[0]]}),
    ):
        progress.put(event)
    with Console(tiny_config, dataset, plan_run(tiny_config, dataset)[0], cast(Any, progress)):
        pass
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny: Diff-ViT V1, 16 wide, 2 blocks, 1 head, 16 px in patches of 4"
    assert lines[1] == "36 training and 15 validation images, 3 classes; 1 worker on CPU, 2 epochs of 3 steps"
    assert lines[4] == "epoch 2/2  step 4/6  loss 0.512  1,234 images/s  ETA 1h02m"
    assert lines[5].split() == [
        "2",
        "6",
        "0.500",
        "81.25",
        "%",
        "0.250",
        "93.33",
        "%",
        "100.00",
        "%",
        "1,234",
        "3",
        "%",
    ]
    assert lines[6] == "a node is about to go"
    assert lines[7:17] == [f"skipped {image}" for image in skipped[:10]]
    assert lines[17:] == [f"more are skipped; see {tiny_config.folder}/skipped.txt"]
    assert (tiny_config.folder / "skipped.txt").read_text().splitlines() == skipped
