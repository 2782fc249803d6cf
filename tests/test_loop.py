"""The whole loop in one process, on real image files, with the local stream as the data plane."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import with_fields
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffvit.config import ModelConfig, RunConfig
from diffvit.data.batches import Batch
from diffvit.data.datasets import open_dataset
from diffvit.data.loader import BatchLoader, LocalStream, plan_run
from diffvit.data.order import EvalPlan, TrainPlan, epoch_permutation
from diffvit.models.vit import VisionTransformer
from diffvit.training import checkpoint as checkpoint_module
from diffvit.training import checkpoint_writer, loop, saver
from diffvit.training import step as step_module
from diffvit.training.checkpoint import Snapshot
from diffvit.training.checkpoint_store import CheckpointStore, Entry, Superseded, Warn
from diffvit.training.checkpoint_writer import CheckpointWriter
from diffvit.training.event_log import EventLog
from diffvit.training.logbook import Logbook
from diffvit.training.loop import RunStopped, Worker, fit


@pytest.fixture(autouse=True)
def _every_checkpoint_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """These steps take less time than a checkpoint, which a later one would replace before it is written."""
    submit = CheckpointWriter.submit

    def submit_and_wait(writer: CheckpointWriter, snapshot: Snapshot, *others: Any, **options: Any) -> None:
        submit(writer, snapshot, *others, **options)
        writer.wait()

    monkeypatch.setattr(CheckpointWriter, "submit", submit_and_wait)


class Run:
    """Runs `fit` as rank 0 of 1, with the last `keep_last` checkpoints in `folder`; `stop_after` is as a crash there.

    `source` makes the images look otherwise to the loop: it maps a batch to the one that is seen.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        *,
        stop_after: int | None = None,
        keep_last: int = 99,
        source: Callable[[Batch], Batch] = lambda batch: batch,
        preempted: Callable[[], bool] = lambda: False,
    ) -> None:
        dataset = open_dataset(config.data)
        config = with_fields(
            config, model={"num_classes": len(dataset.classes)}, checkpoint={"keep_last": keep_last or 1}
        )
        self.stop_after = stop_after
        self.epochs: list[dict[str, Any]] = []
        self.published: list[tuple[str, dict[str, Any]]] = []
        self.store = CheckpointStore(folder, config.checkpoint)
        plan = TrainPlan(
            len(dataset.train),
            config.seed,
            config.optim.epochs,
            config.optim.batch_size,
            1,
            config.accumulation_steps_of(1),
            config.augment.repeats,
        )
        eval_plan = EvalPlan(len(dataset.val), 4)
        stream = LocalStream(BatchLoader(config, dataset.train, plan), BatchLoader(config, dataset.val, eval_plan))
        train = stream.train
        stream.train = lambda first_step: map(source, self.watched(train(first_step), plan))  # type: ignore[method-assign]
        worker = Worker(
            torch.device("cpu"),
            self.epochs.append,
            lambda *event: self.published.append(event),
            store=self.store if keep_last else None,
            preempted=preempted,
        )
        fit(config, plan, eval_plan, stream, worker)

    def watched(self, batches: Iterator[Batch], plan: TrainPlan) -> Iterator[Batch]:
        for batch in batches:
            if plan.locate(batch.row)[0] == self.stop_after:
                raise KeyboardInterrupt
            yield batch

    @property
    def steps(self) -> list[int]:
        return [entry.step for entry in self.store.entries()]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [entry.metrics for entry in self.store.entries()]

    @property
    def warnings(self) -> list[str]:
        return [fields["message"] for kind, fields in self.published if kind == "warning"]


def checkpoint(folder: Path, step: int) -> Path:
    return folder / f"checkpoint_step_{step:08d}"


def cut(config: RunConfig, folder: Path, after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        Run(config, folder, stop_after=after)


def damage(file: Path) -> None:
    """Change one bit."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def scalars(config: RunConfig, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(config.folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_the_learning_rates_of_adamw_and_of_muon_are_told_apart(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = with_fields(tiny_config, optim={"optimizer": "muon", "lr": 1e-3, "muon_lr": 0.05})
    Run(config, tmp_path)
    adamw, muon = (scalars(config, f"train/{name}") for name in ("lr", "muon_lr"))
    assert [rate / 1e-3 for _, rate in adamw] == pytest.approx([rate / 0.05 for _, rate in muon])


def test_learns_and_reports_each_epoch(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = with_fields(tiny_config, optim={"epochs": 12})
    run = Run(config, tmp_path)
    last = run.metrics[-1]
    assert [r["epoch"] for r in run.metrics] == list(range(1, 13))
    assert last["step"] == 12 * 3
    assert last["top1"] > 80
    assert last["loss"] < run.metrics[0]["loss"]
    assert last["top5"] == 100  # three classes
    assert 0 <= last["data_wait_fraction"] <= 1
    assert last["images_per_second"] > 0


@pytest.mark.draws
def test_tensorboard_has_every_curve(tiny_config: RunConfig, tmp_path: Path) -> None:
    run = Run(tiny_config, tmp_path)
    assert scalars(tiny_config, "val/top1") == [(3, run.metrics[0]["top1"]), (6, pytest.approx(run.metrics[1]["top1"]))]
    for name in ("train/loss", "train/top1", "train/lr", "speed/images_per_second", "speed/data_wait_fraction",
                 "val/loss", "val/top5", "lambda/layer_00", "lambda/layer_01"):  # fmt: skip
        assert [step for step, _ in scalars(tiny_config, name)] == [3, 6], name
    events = EventAccumulator(str(tiny_config.folder / "tensorboard")).Reload()
    assert events.Images("attention/last_block")[-1].step == 6


def test_tensorboard_has_the_gates_of_v2(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = with_fields(tiny_config, model={"variant": "diff_v2"})
    Run(config, tmp_path)
    for layer in (0, 1):
        gates = scalars(config, f"gate/layer_{layer:02d}")
        assert [step for step, _ in gates] == [3, 6]
        assert all(0 < gate < 1 for _, gate in gates)


@pytest.mark.draws
@pytest.mark.parametrize("ema_decay", [0.0, pytest.param(0.9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("after", [2, 3, *(pytest.param(after, marks=pytest.mark.slow) for after in (4, 5))])
def test_cut_anywhere_and_continued_ends_with_the_same_bits(
    tiny_config: RunConfig, tmp_path: Path, after: int, ema_decay: float
) -> None:
    config = with_fields(
        tiny_config, model={"drop_path": 0.3}, optim={"ema_decay": ema_decay}, checkpoint={"every_steps": 2}
    )
    whole = tmp_path / "whole"
    Run(config, whole)
    cut(config, tmp_path / "cut", after)
    resumed = Run(config, tmp_path / "cut")
    assert resumed.metrics[-1]["step"] == 6
    assert resumed.metrics[-1]["world_sizes"] == [1, 1]
    ours, theirs = weights(checkpoint(tmp_path / "cut", 6)), weights(checkpoint(whole, 6))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert ours.keys() == theirs.keys()


def test_accumulation_gives_the_same_step(tiny_config: RunConfig, tmp_path: Path) -> None:
    one_epoch = with_fields(tiny_config, model={"drop_path": 0.3}, optim={"epochs": 1})
    Run(one_epoch, tmp_path / "whole")
    Run(with_fields(one_epoch, scale={"micro_batch_size": 4}), tmp_path / "pieces")
    ours, theirs = weights(checkpoint(tmp_path / "pieces", 3)), weights(checkpoint(tmp_path / "whole", 3))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)


def test_continued_curves_have_no_second_version(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = with_fields(tiny_config, checkpoint={"every_steps": 1})
    cut(config, tmp_path, 4)
    shutil.rmtree(checkpoint(tmp_path, 4))  # step 4 is taken again
    Run(config, tmp_path)
    assert [step for step, _ in scalars(config, "train/loss")] == [1, 2, 3, 4, 5, 6]


def test_curves_of_a_run_cut_before_its_first_checkpoint(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY_STEPS", 1)
    cut(tiny_config, tmp_path, 2)
    Run(tiny_config, tmp_path)
    assert [step for step, _ in scalars(tiny_config, "train/loss")] == [1, 2, 3, 4, 5, 6]


def poison(*steps: int) -> Callable[[Batch], Batch]:
    """Images of these steps (from 1) whose loss is not a number: the model's weights meet infinity at one pixel."""

    def change(batch: Batch) -> Batch:
        return dataclasses.replace(batch, row=-1) if batch.row + 1 in steps else batch

    return change


@pytest.fixture
def poisonable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches marked by `poison` reach the model as infinities."""
    plain = step_module.to_device

    def to_device(batch: Batch, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = plain(batch, *rest)
        return (torch.full_like(images, float("inf")), labels) if batch.row < 0 else (images, labels)

    monkeypatch.setattr(step_module, "to_device", to_device)


@pytest.mark.usefixtures("poisonable")
def test_a_poisoned_batch_changes_nothing(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = with_fields(tiny_config, checkpoint={"every_steps": 1})
    run = Run(config, tmp_path, source=poison(3))
    before, after = (torch.load(checkpoint(tmp_path, n) / "training.pt", weights_only=True) for n in (2, 3))
    for name, tensor in weights(checkpoint(tmp_path, 2)).items():
        assert torch.equal(tensor, weights(checkpoint(tmp_path, 3))[name]), name
        assert not torch.equal(tensor, weights(checkpoint(tmp_path, 4))[name]), name
    for number, moments in before["optimizer"]["state"].items():
        assert all(torch.equal(value, after["optimizer"]["state"][number][key]) for key, value in moments.items())
    assert after["schedule"]["last_epoch"] == 3  # the learning rate goes on
    assert [metrics["poisoned_steps"] for metrics in run.metrics] == [0, 0, 1, 1, 1, 1]
    assert all(math.isfinite(metrics["train_loss"]) for metrics in run.metrics)


@pytest.fixture
def soon_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is good after one step with its weights, in runs as short as these."""
    monkeypatch.setattr(checkpoint_module, "CALM_STEPS", 1)


@pytest.mark.slow
@pytest.mark.usefixtures("poisonable", "soon_good")
def test_too_many_poisoned_steps_take_the_weights_back_and_the_order_on(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = with_fields(
        tiny_config,
        checkpoint={"every_steps": 1},
        optim={"epochs": 4, "max_skipped_steps": 2, "ema_decay": 0.5},
        data={"audit": True},
    )
    run = Run(config, tmp_path, source=poison(5, 7, 8))
    # three with fewer than ten good ones between them; of the checkpoint of step 4 nobody knows yet whether it is good
    assert run.warnings == [
        "the loss or its gradient is not finite at step 8, after 3 such steps with never 10 good ones between them, "
        "more than the optim.max_skipped_steps = 2 that are left out; back to the weights of "
        "checkpoint_step_00000003, on with the samples after step 8"
    ]
    states = {n: torch.load(checkpoint(tmp_path, n) / "training.pt", weights_only=True) for n in (3, 6, 8)}
    for name, tensor in states[3]["model"].items():
        assert torch.equal(tensor, states[8]["model"][name]), name
        assert not torch.equal(tensor, states[6]["model"][name]), name
    assert states[8]["schedule"]["last_epoch"] == 8
    assert (states[8]["good_step"], states[8]["untried_step"]) == (3, 8)  # nobody goes back to step 4 any more
    lr = loop.build_schedule(loop.build_optimizer(VisionTransformer(config.model), config.optim), config.optim, 3)
    assert states[8]["schedule"]["_last_lr"] == [lr.base_lrs[0] * lr.lr_lambdas[0](8)] * 2
    assert (run.metrics[-1]["poisoned_steps"], run.metrics[-1]["rollbacks"]) == (3, 1)
    # what the weights have seen: every step but 4 to 8
    assert {row["step"] for row in audited(config)} == {1, 2, 3, 9, 10, 11, 12}


@pytest.mark.slow
@pytest.mark.usefixtures("poisonable", "soon_good")
@pytest.mark.parametrize("after", [5, 6, 7, 8])
def test_a_sick_run_that_is_cut_goes_back_as_the_uncut_one(tiny_config: RunConfig, tmp_path: Path, after: int) -> None:
    config = with_fields(
        tiny_config,
        checkpoint={"every_steps": 1},
        optim={"epochs": 4, "max_skipped_steps": 2, "ema_decay": 0.5},
        data={"audit": True},
    )
    uncut = Run(dataclasses.replace(config, name="uncut"), tmp_path / "uncut", source=poison(5, 7, 8))
    with pytest.raises(KeyboardInterrupt):
        Run(config, tmp_path / "cut", source=poison(5, 7, 8), stop_after=after)
    resumed = Run(config, tmp_path / "cut", source=poison(5, 7, 8))
    assert resumed.metrics[-1]["rollbacks"] == uncut.metrics[-1]["rollbacks"] == 1
    ours, theirs = weights(checkpoint(tmp_path / "cut", 12)), weights(checkpoint(tmp_path / "uncut", 12))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert audited(config) == audited(dataclasses.replace(config, name="uncut"))


@pytest.mark.usefixtures("poisonable", "soon_good")
def test_rollbacks_are_bounded(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = with_fields(
        tiny_config, checkpoint={"every_steps": 1}, optim={"epochs": 4, "max_skipped_steps": 0, "max_rollbacks": 1}
    )
    with pytest.raises(
        RunStopped,
        match=r"not finite at step 6, after 1 such steps .*; 1 times .*; the last is checkpoint_step_00000004",
    ):
        Run(config, tmp_path, source=poison(3, 6))


def test_diverged_weights_end_the_run_with_a_report(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = with_fields(tiny_config, optim={"lr": 1e30, "warmup_epochs": 0.0, "clip_norm": 0.0, "epochs": 4})
    with pytest.raises(RunStopped, match=r"after epoch 1: the weights have diverged; 0 times .*; none is known to be"):
        Run(config, tmp_path)


@pytest.mark.parametrize(("rollbacks", "cut_there"), [(0, False), (1, False), (1, True)])
def test_weights_that_diverge_at_the_end_of_an_epoch_are_taken_back(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rollbacks: int, cut_there: bool
) -> None:
    """No step has been seen to go wrong; also where the run is cut before it finds out."""
    config = with_fields(tiny_config, optim={"epochs": 3, "max_rollbacks": rollbacks}, data={"audit": True})
    found, evaluate = [], loop.evaluate

    def diverged(*given: Any) -> dict[str, float]:
        found.append(1)
        if len(found) == 2 and cut_there:
            raise KeyboardInterrupt
        return evaluate(*given) | ({"loss": math.nan} if len(found) == 2 + cut_there else {})

    monkeypatch.setattr(loop, "evaluate", diverged)
    if cut_there:
        with pytest.raises(KeyboardInterrupt):
            Run(config, tmp_path)
    if not rollbacks:
        with pytest.raises(RunStopped, match=r"after epoch 2: .* diverged; 0 times .*; the last is .*_00000003\."):
            Run(config, tmp_path)
        return
    run = Run(config, tmp_path)
    assert run.warnings == [
        "the validation loss is not finite after epoch 2: the weights have diverged; back to the weights of "
        "checkpoint_step_00000003, on with the samples after step 6"
    ]
    three, six, nine = (weights(checkpoint(tmp_path, step)) for step in (3, 6, 9))
    assert all(torch.equal(three[name], six[name]) for name in three)
    assert not all(torch.equal(three[name], nine[name]) for name in three)
    assert [metrics["rollbacks"] for metrics in run.metrics] == [0, 1, 1]
    assert all(math.isfinite(metrics["loss"]) for metrics in run.metrics)
    assert {row["step"] for row in audited(config)} == {1, 2, 3, 7, 8, 9}


@pytest.mark.usefixtures("poisonable")
def test_poisoned_steps_alone_have_no_loss(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY_STEPS", 1)
    run = Run(tiny_config, tmp_path, source=poison(2))
    assert [step for step, _ in scalars(tiny_config, "train/loss")] == [1, 3, 4, 5, 6]
    told = [fields["loss"] for kind, fields in run.published if kind == "step"]
    assert [math.isnan(loss) for loss in told] == [False, True, False, False, False, False]


def test_what_may_come_to_be_good_is_known_again(tiny_config: RunConfig, tmp_path: Path) -> None:
    """Of a run with an average, whose evaluation says nothing of the weights behind it."""
    config = with_fields(tiny_config, checkpoint={"every_steps": 2}, optim={"ema_decay": 0.5})
    run = Run(config, tmp_path / "uncut", keep_last=1)
    assert 2 in run.steps  # and kept until then
    assert 4 not in run.steps
    cut(dataclasses.replace(config, name="again"), tmp_path / "cut", 4)
    Run(dataclasses.replace(config, name="again"), tmp_path / "cut")
    for folder in ("uncut", "cut"):
        state = torch.load(checkpoint(tmp_path / folder, 6) / "training.pt", weights_only=True)
        assert (state["good_step"], state["untried_step"]) == (None, 2)


def test_micro_batches_change_nothing_at_the_bound_of_lambda(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the sign of a part of the gradient may be another than that of the whole."""
    found, held, hold = [], [], step_module.hold_lambdas
    monkeypatch.setattr(step_module, "hold_lambdas", lambda model: held.append(1) or hold(model))
    for size in (None, 4):
        config = with_fields(tiny_config, model={"lambda_max": 0.05}, scale={"micro_batch_size": size})
        Run(config, tmp_path / str(size))
        found.append(weights(checkpoint(tmp_path / str(size), 6)))
    assert len(held) == 2 * 6  # once a step
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_node_about_to_go_is_answered_by_a_checkpoint(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY_STEPS", 1)
    monkeypatch.setattr(saver, "_POLL_SECONDS", 0.0)
    asked: list[bool] = []

    def preempted() -> bool:
        asked.append(len(asked) == 1)  # the second look, after step 2
        return asked[-1]

    run = Run(tiny_config, tmp_path, preempted=preempted)
    assert run.steps == [2, 3, 6]
    assert run.warnings == ["a node is about to go: saving at step 2"]
    assert asked == [False, True]  # not asked again: the answer is known


def test_a_store_that_stays_away_ends_the_run(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(store: CheckpointStore, snapshot: Snapshot, before_publishing: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(CheckpointStore, "put", refuse)
    config = with_fields(tiny_config, checkpoint={"retry_minutes": 0.0})
    with pytest.raises(RunStopped, match=r"no checkpoint could be written for 0 minutes: .*No space left on device"):
        Run(config, tmp_path)
    assert [step for step, _ in scalars(config, "train/loss")] == [3, 6]  # found at the second save


def test_a_cut_in_evaluation_costs_the_evaluation_only(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uncut = Run(dataclasses.replace(tiny_config, name="uncut"), tmp_path / "uncut")
    evaluate, calls = loop.evaluate, []

    def cut_once(*arguments: Any) -> dict[str, float]:
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", cut_once)
    with pytest.raises(KeyboardInterrupt):
        Run(tiny_config, tmp_path / "cut")
    assert "top1" not in CheckpointStore(tmp_path / "cut", tiny_config.checkpoint).entries()[-1].metrics
    resumed = Run(tiny_config, tmp_path / "cut", stop_after=0)  # no step is left to take
    assert [metrics["epoch"] for metrics in resumed.epochs] == [2]
    for name in ("step", "top1", "loss", "train_loss", "train_top1"):
        assert resumed.metrics[-1][name] == uncut.metrics[-1][name], name


def test_the_epoch_of_a_cut_run_is_counted_whole(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = with_fields(tiny_config, checkpoint={"every_steps": 1})
    uncut = Run(dataclasses.replace(config, name="uncut"), tmp_path / "uncut")
    cut(config, tmp_path / "cut", 5)
    resumed = Run(config, tmp_path / "cut")
    for name in ("train_loss", "train_top1"):
        assert resumed.metrics[-1][name] == uncut.metrics[-1][name], name


def test_a_full_disk_costs_nothing_once_there_is_room(
    tiny_config: RunConfig, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "_FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(CheckpointWriter, "wait", lambda writer, seconds=None: None)  # training goes on
    filler = small_disk / "filler"
    config = dataclasses.replace(with_fields(tiny_config, optim={"epochs": 4}), storage=str(small_disk))

    def fill_and_free(batch: Batch) -> Batch:
        if batch.row == 4:
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        if batch.row == 8:
            filler.unlink()
            monkeypatch.undo()  # the end of the run is waited for
        return batch

    run = Run(config, small_disk / "tiny", source=fill_and_free)
    assert "could not be written and is tried again" in run.warnings[0]
    assert run.metrics[-1]["step"] == 12
    assert [step for step, _ in scalars(config, "train/loss")] == [3, 6, 9, 10, 12]


def test_a_run_that_keeps_no_checkpoints_outlives_a_full_disk(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(log: EventLog) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(EventLog, "copy", refuse)
    assert len(Run(tiny_config, tmp_path, keep_last=0).epochs) == 2


def test_another_precision_is_said_and_kept(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(tiny_config, tmp_path, 4)
    monkeypatch.setattr(loop, "numbers", lambda *_: "bf16")
    resumed = Run(tiny_config, tmp_path)
    assert resumed.warnings == ["the run goes on in bf16; so far it computed in fp32"]
    assert resumed.metrics[-1]["precisions"] == ["fp32", "bf16"]


def test_workers_that_were_taken_for_lost_write_no_more(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = with_fields(tiny_config, checkpoint={"every_steps": 1}, data={"audit": True})

    def go_on_elsewhere(batch: Batch) -> Batch:
        if batch.row == 3:
            Logbook(config.location).claim()
        return batch

    with pytest.raises(RunStopped, match="another group of workers goes on with this run"):
        Run(config, tmp_path, source=go_on_elsewhere)
    assert CheckpointStore(tmp_path, config.checkpoint).entries()[-1].step == 3
    assert {row["step"] for row in audited(config)} == {1, 2, 3}


def test_a_run_is_claimed_before_its_newest_checkpoint_is_looked_for(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken_for_lost, looks = Logbook(tiny_config.location), []
    taken_for_lost.claim()
    newest_whole = CheckpointStore.newest_whole

    def look(store: CheckpointStore, warn: Warn, up_to: int | None, model: ModelConfig) -> Entry | None:
        with pytest.raises(Superseded):
            taken_for_lost.require_ours()
        looks.append(up_to)
        return newest_whole(store, warn, up_to, model)

    monkeypatch.setattr(CheckpointStore, "newest_whole", look)
    Run(tiny_config, tmp_path)
    assert looks == [None]


def test_bad_images_are_skipped_counted_and_named(tiny_config: RunConfig, folder: Path, tmp_path: Path) -> None:
    (folder / "train/red/003.png").write_bytes(b"not an image")
    (folder / "val/blue/001.png").write_bytes((folder / "val/blue/002.png").read_bytes()[:100])
    run = Run(tiny_config, tmp_path)
    named = {image for kind, fields in run.published if kind == "skipped" for image in fields["images"]}
    assert {image.split(":")[0] for image in named} == {"train/red/003.png", "val/blue/001.png"}
    assert run.metrics[-1]["skipped_images"] == 2  # each once, however many epochs met it


def test_too_many_bad_images_end_the_run(tiny_config: RunConfig, folder: Path, tmp_path: Path) -> None:
    for number in range(4):
        (folder / f"train/red/{number:03d}.png").write_bytes(b"")
    config = with_fields(tiny_config, data={"max_skipped_fraction": 0.1})
    with pytest.raises(RunStopped, match="4 of the 36 training images cannot be used, more than the 3"):
        Run(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["bit", "truncated", "missing file", "no manifest", "half a manifest", "empty"])
def test_a_damaged_checkpoint_is_passed_over(tiny_config: RunConfig, tmp_path: Path, harm: str) -> None:
    config = with_fields(tiny_config, checkpoint={"every_steps": 2}, data={"audit": True})
    uncut = Run(dataclasses.replace(config, name="uncut"), tmp_path / "uncut")
    cut(config, tmp_path / "cut", 5)
    last = checkpoint(tmp_path / "cut", 4)
    if harm == "bit":
        damage(last / "training.pt")
    elif harm == "truncated":
        (last / "model.safetensors").write_bytes((last / "model.safetensors").read_bytes()[:-7])
    elif harm == "missing file":
        (last / "training.pt").unlink()
    elif harm == "no manifest":
        (last / "checkpoint.json").unlink()
    elif harm == "half a manifest":
        (last / "checkpoint.json").write_text((last / "checkpoint.json").read_text()[:100])
    else:
        shutil.rmtree(last)
        last.mkdir()
    resumed = Run(config, tmp_path / "cut")
    if harm != "empty":  # which is not seen, as on an object store
        assert "checkpoint_step_00000004 is passed over" in resumed.warnings[0]
    assert resumed.steps == uncut.steps == [2, 3, 4, 6]
    ours, theirs = weights(checkpoint(tmp_path / "cut", 6)), weights(checkpoint(tmp_path / "uncut", 6))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # the record follows the step that the run really went on from, 3
    assert [step for step, _ in scalars(config, "train/loss")] == [2, 3, 4, 6]
    assert audited(config) == audited(dataclasses.replace(config, name="uncut"))


def test_no_whole_checkpoint_ends_the_run(tiny_config: RunConfig, tmp_path: Path) -> None:
    Run(tiny_config, tmp_path)
    for step in (3, 6):
        damage(checkpoint(tmp_path, step) / "model.safetensors")
    with pytest.raises(RunStopped, match=r"none of the 2 checkpoints in .* can be used.*sha256 of model.safetensors"):
        Run(tiny_config, tmp_path)


def test_checkpoint_of_another_model_is_passed_over(tiny_config: RunConfig, tmp_path: Path) -> None:
    Run(with_fields(tiny_config, model={"mlp_ratio": 3.0}), tmp_path / "other")
    Run(with_fields(tiny_config, optim={"epochs": 1}), tmp_path / "run")
    shutil.copytree(checkpoint(tmp_path / "other", 6), checkpoint(tmp_path / "run", 6))
    resumed = Run(tiny_config, tmp_path / "run")
    assert re.search(r"checkpoint_step_0*6 is passed over: .* is of another model", resumed.warnings[0])
    assert [metrics["step"] for metrics in resumed.epochs] == [6]  # it went on from step 3
    shutil.rmtree(checkpoint(tmp_path / "run", 3))
    shutil.rmtree(checkpoint(tmp_path / "run", 6))
    shutil.copytree(checkpoint(tmp_path / "other", 6), checkpoint(tmp_path / "run", 6))
    with pytest.raises(RunStopped, match=r"none of the 1 checkpoints in .* can be used"):
        Run(tiny_config, tmp_path / "run")


def test_checkpoint_describes_itself(tiny_config: RunConfig, tmp_path: Path) -> None:
    run = Run(with_fields(tiny_config, checkpoint={"every_steps": 2}), tmp_path)
    manifest = json.loads((checkpoint(tmp_path, 6) / "checkpoint.json").read_text())
    assert manifest["step"] == 6
    assert manifest["seed"] == 0
    assert manifest["model"]["num_classes"] == 3
    assert manifest["metrics"]["top1"] == run.metrics[-1]["top1"]
    assert sorted(manifest["sha256"]) == ["model.safetensors", "training.pt"]
    assert run.steps == [2, 3, 4, 6]
    assert [metrics["step"] for metrics in run.epochs] == [3, 6]


def audited(config: RunConfig) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(config.folder / "audit").to_pylist()
    return sorted(rows, key=lambda row: (row["epoch"], row["position"]))


def test_audit_leaves_out_what_could_not_be_trained_on(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = with_fields(tiny_config, data={"audit": True, "max_skipped_fraction": 0.5})
    train = open_dataset(config.data).train
    Path(train.root, train.key(7)).write_bytes(b"")
    Run(config, tmp_path)
    rows = audited(config)
    assert len(rows) == 2 * 35
    assert train.key(7) not in {row["key"] for row in rows}
    order = epoch_permutation(36, config.seed, 0).tolist()
    assert {row["position"] for row in rows if row["epoch"] == 1} == set(range(36)) - {order.index(7)}


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


def test_audit_names_each_copy_of_repeated_augmentation(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = with_fields(tiny_config, data={"audit": True}, augment={"repeats": 3}, scale={"micro_batch_size": 4})
    Run(config, tmp_path)
    train = open_dataset(config.data).train
    rows = audited(config)
    for epoch in (1, 2):
        order = epoch_permutation(36, config.seed, epoch - 1)
        steps = [[train.key(sample) for sample in order[first : first + 4]] * 3 for first in (0, 4, 8)]
        assert [row["key"] for row in rows if row["epoch"] == epoch] == [key for step in steps for key in step]


@pytest.mark.slow
def test_audit_of_a_cut_run_is_that_of_the_uncut_one(tiny_config: RunConfig, tmp_path: Path) -> None:
    uncut = with_fields(tiny_config, data={"audit": True}, checkpoint={"every_steps": 2})
    Run(uncut, tmp_path / "uncut")
    short = dataclasses.replace(uncut, name="cut")
    cut(short, tmp_path / "cut", 5)
    # the last checkpoints are lost, so the run goes on from the one before, and what was audited after it goes
    for step in (3, 4):
        shutil.rmtree(checkpoint(tmp_path / "cut", step))
    Run(short, tmp_path / "cut")
    assert audited(short) == audited(uncut)


@pytest.mark.slow
def test_checkpoints_by_the_clock(tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY_STEPS", 1)
    config = with_fields(tiny_config, checkpoint={"every_minutes": 1e-6})
    assert Run(config, tmp_path).steps == [1, 2, 3, 4, 5, 6]
    config = dataclasses.replace(with_fields(tiny_config, checkpoint={"every_minutes": 60.0}), name="b")
    assert Run(config, tmp_path / "b").steps == [3, 6]


@pytest.mark.slow
def test_mixing_trains(tiny_config: RunConfig, tmp_path: Path) -> None:
    plain = Run(tiny_config, tmp_path / "plain").metrics[-1]
    config = dataclasses.replace(with_fields(tiny_config, augment={"mixup": 0.8, "cutmix": 1.0}), name="mixed")
    mixed = Run(config, tmp_path / "mixed").metrics[-1]
    assert mixed["train_loss"] != plain["train_loss"]
    again = dataclasses.replace(with_fields(config, scale={"micro_batch_size": 4}), name="again")
    assert Run(again, tmp_path / "again").metrics[-1]["train_loss"] == pytest.approx(mixed["train_loss"], rel=1e-4)


def test_a_gpu_that_is_too_old_stops_all_ranks_or_fails_its_own(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that stopped alone would be waited for."""
    monkeypatch.setattr(loop, "unsupported", lambda device: "an old GPU")
    dataset = open_dataset(tiny_config.data)
    plans = plan_run(tiny_config, dataset)
    stream = LocalStream(
        BatchLoader(tiny_config, dataset.train, plans[0]), BatchLoader(tiny_config, dataset.val, plans[1])
    )
    worker = Worker(torch.device("cpu"), print, print)
    with pytest.raises(RunStopped, match="an old GPU"):
        fit(tiny_config, *plans, stream, worker)
    with pytest.raises(RuntimeError, match="an old GPU") as failed:
        fit(tiny_config, *plans, stream, dataclasses.replace(worker, agree=lambda _: None))
    assert not isinstance(failed.value, RunStopped)
