"""The whole loop in one process, on real image files, with the local stream as the data plane."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import with_fields
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffvit.config import RunConfig
from diffvit.data.loader import BatchLoader, LocalStream
from diffvit.data.order import EvalPlan, TrainPlan, epoch_permutation
from diffvit.data.sources import open_dataset
from diffvit.training import loop
from diffvit.training.loop import RunStopped, Worker, fit


class Run:
    """Runs `fit` as rank 0 of 1 and keeps what it reports; `stop_after` ends it as a crash would."""

    def __init__(self, config: RunConfig, folder: Path, *, start: Path | None = None, stop_after: int | None = None):
        dataset = open_dataset(config.data)
        config = with_fields(config, model={"num_classes": len(dataset.classes)})
        self.folder, self.stop_after = folder, stop_after
        self.reports: list[dict[str, Any]] = []
        self.published: list[tuple[str, dict[str, Any]]] = []
        plan = TrainPlan(
            len(dataset.train), config.seed, config.optim.epochs, config.optim.batch_size, 1, config.accumulation_steps
        )
        eval_plan = EvalPlan(len(dataset.val), 4)
        stream = LocalStream(BatchLoader(config, dataset.train, plan), BatchLoader(config, dataset.val, eval_plan))
        worker = Worker(torch.device("cpu"), self.report, lambda *event: self.published.append(event), checkpoint=start)
        fit(config, plan, eval_plan, stream, worker)

    def report(self, metrics: dict[str, Any], folder: Path | None) -> None:
        assert folder is not None
        self.reports.append(metrics)
        shutil.copytree(folder, self.folder / f"step-{metrics['step']}")
        if metrics["step"] == self.stop_after:
            raise KeyboardInterrupt


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def scalars(config: RunConfig, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(config.folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_learns_and_reports_each_epoch(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = with_fields(tiny_config, optim={"epochs": 12})
    run = Run(config, tmp_path)
    last = run.reports[-1]
    assert [r["epoch"] for r in run.reports] == list(range(1, 13))
    assert last["step"] == 12 * 3
    assert last["top1"] > 80
    assert last["loss"] < run.reports[0]["loss"]
    assert last["top5"] == 100  # three classes
    assert 0 <= last["data_wait_fraction"] <= 1
    assert last["images_per_second"] > 0


def test_tensorboard_has_every_curve(tiny_config: RunConfig, tmp_path: Path) -> None:
    run = Run(tiny_config, tmp_path)
    assert scalars(tiny_config, "val/top1") == [(3, run.reports[0]["top1"]), (6, pytest.approx(run.reports[1]["top1"]))]
    for name in ("train/loss", "train/top1", "train/lr", "speed/images_per_second", "speed/data_wait_fraction",
                 "val/loss", "val/top5", "lambda/layer_00", "lambda/layer_01"):  # fmt: skip
        assert [step for step, _ in scalars(tiny_config, name)] == [3, 6], name
    events = EventAccumulator(str(tiny_config.folder / "tensorboard")).Reload()
    assert events.Images("attention/last_block")[-1].step == 6


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("cut", [2, 3, 4])
def test_cut_anywhere_and_continued_ends_with_the_same_bits(
    tiny_config: RunConfig, tmp_path: Path, cut: int, ema_decay: float
) -> None:
    config = with_fields(
        tiny_config, model={"drop_path": 0.3}, optim={"ema_decay": ema_decay}, checkpoint={"every_steps": 2}
    )
    whole = tmp_path / "whole"
    Run(config, whole)
    with pytest.raises(KeyboardInterrupt):
        Run(config, tmp_path / "cut", stop_after=cut)
    resumed = Run(config, tmp_path / "resumed", start=tmp_path / "cut" / f"step-{cut}")
    assert resumed.reports[-1]["step"] == 6
    assert resumed.reports[-1]["world_sizes"] == [1, 1]
    ours, theirs = weights(tmp_path / "resumed/step-6"), weights(whole / "step-6")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert ours.keys() == theirs.keys()


def test_accumulation_gives_the_same_step(tiny_config: RunConfig, tmp_path: Path) -> None:
    one_epoch = with_fields(tiny_config, optim={"epochs": 1})
    Run(one_epoch, tmp_path / "whole")
    Run(with_fields(one_epoch, scale={"micro_batch_size": 4}), tmp_path / "pieces")
    ours, theirs = weights(tmp_path / "pieces/step-3"), weights(tmp_path / "whole/step-3")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)


def test_continued_curves_have_no_second_version(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = with_fields(tiny_config, checkpoint={"every_steps": 1})
    with pytest.raises(KeyboardInterrupt):
        Run(config, tmp_path / "cut", stop_after=4)
    Run(config, tmp_path / "resumed", start=tmp_path / "cut/step-3")  # step 4 is taken again
    assert [step for step, _ in scalars(config, "train/loss")] == [1, 2, 3, 4, 5, 6]


def test_divergence_names_the_step_and_the_last_good_checkpoint(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = with_fields(tiny_config, optim={"lr": 1e30, "warmup_epochs": 0.0, "clip_norm": 0.0, "epochs": 4})
    with pytest.raises(RunStopped, match=r"not finite at step [23]; the last good checkpoint does not exist"):
        Run(config, tmp_path)
    config = with_fields(config, checkpoint={"every_steps": 1})
    with pytest.raises(
        RunStopped, match=r"not finite at step [23]; the last good checkpoint is checkpoint_step_0000000"
    ):
        Run(config, tmp_path)


def test_bad_images_are_skipped_counted_and_named(tiny_config: RunConfig, folder: Path, tmp_path: Path) -> None:
    (folder / "train/red/003.png").write_bytes(b"not an image")
    (folder / "val/blue/001.png").write_bytes((folder / "val/blue/002.png").read_bytes()[:100])
    run = Run(tiny_config, tmp_path)
    named = {image for kind, fields in run.published if kind == "skipped" for image in fields["images"]}
    assert {image.split(":")[0] for image in named} == {"train/red/003.png", "val/blue/001.png"}
    assert run.reports[-1]["skipped_images"] == 2 + 1  # the training image in each of two epochs


def test_too_many_bad_images_end_the_run(tiny_config: RunConfig, folder: Path, tmp_path: Path) -> None:
    for number in range(4):
        (folder / f"train/red/{number:03d}.png").write_bytes(b"")
    config = with_fields(tiny_config, data={"max_skipped_fraction": 0.1})
    with pytest.raises(RunStopped, match="4 of the 36 training images cannot be used, more than the 3"):
        Run(config, tmp_path)


def test_damaged_checkpoint_is_refused(tiny_config: RunConfig, tmp_path: Path) -> None:
    Run(tiny_config, tmp_path)
    file = tmp_path / "step-3/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(RunStopped, match=r"sha256 of model.safetensors"):
        Run(tiny_config, tmp_path / "resumed", start=tmp_path / "step-3")


def test_checkpoint_describes_itself(tiny_config: RunConfig, tmp_path: Path) -> None:
    run = Run(with_fields(tiny_config, checkpoint={"every_steps": 2}), tmp_path)
    manifest = json.loads((tmp_path / "step-6/checkpoint.json").read_text())
    assert manifest["step"] == 6
    assert manifest["seed"] == 0
    assert manifest["model"]["num_classes"] == 3
    assert manifest["metrics"]["top1"] == run.reports[-1]["top1"]
    assert sorted(manifest["sha256"]) == ["model.safetensors", "training.pt"]
    assert [r["step"] for r in run.reports] == [2, 3, 4, 6]


def audited(config: RunConfig) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(config.folder / "audit").to_pylist()
    return sorted(rows, key=lambda row: (row["epoch"], row["position"]))


def test_audit_names_every_sample_of_the_order(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = with_fields(tiny_config, data={"audit": True}, scale={"micro_batch_size": 4})
    Run(config, tmp_path)
    train = open_dataset(config.data).train
    rows = audited(config)
    for epoch in (1, 2):
        order = epoch_permutation(36, config.seed, epoch - 1)
        mine = [row for row in rows if row["epoch"] == epoch]
        assert [row["key"] for row in mine] == [train.key(sample) for sample in order]
        assert [row["step"] for row in mine] == [3 * (epoch - 1) + p // 12 + 1 for p in range(36)]
        assert [row["position"] for row in mine] == list(range(36))
    assert {row["rank"] for row in rows} == {0}


def test_audit_of_a_cut_run_is_that_of_the_uncut_one(tiny_config: RunConfig, tmp_path: Path) -> None:
    uncut = with_fields(tiny_config, data={"audit": True}, checkpoint={"every_steps": 2})
    Run(uncut, tmp_path / "uncut")
    cut = dataclasses.replace(uncut, name="cut")
    with pytest.raises(KeyboardInterrupt):
        Run(cut, tmp_path / "cut", stop_after=4)
    # the last checkpoint is lost, so the run goes on from the one before, and what was audited after it goes
    Run(cut, tmp_path / "resumed", start=tmp_path / "cut/step-2")
    assert audited(cut) == audited(uncut)


def test_checkpoints_by_the_clock(tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY_STEPS", 1)
    run = Run(with_fields(tiny_config, checkpoint={"every_minutes": 1e-6}), tmp_path)
    assert [report["step"] for report in run.reports] == [1, 2, 3, 4, 5, 6]
    run = Run(
        dataclasses.replace(with_fields(tiny_config, checkpoint={"every_minutes": 60.0}), name="b"), tmp_path / "b"
    )
    assert [report["step"] for report in run.reports] == [3, 6]


def test_mixing_trains(tiny_config: RunConfig, tmp_path: Path) -> None:
    plain = Run(tiny_config, tmp_path / "plain").reports[-1]
    config = dataclasses.replace(with_fields(tiny_config, augment={"mixup": 0.8, "cutmix": 1.0}), name="mixed")
    mixed = Run(config, tmp_path / "mixed").reports[-1]
    assert mixed["train_loss"] != plain["train_loss"]
    again = dataclasses.replace(with_fields(config, scale={"micro_batch_size": 4}), name="again")
    assert Run(again, tmp_path / "again").reports[-1]["train_loss"] == pytest.approx(mixed["train_loss"], rel=1e-4)
