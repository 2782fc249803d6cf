"""A run without Ray leaves what a run through Ray leaves, and goes on where it was cut, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import with_fields
from safetensors.torch import load_file

from diffvit.config import RunConfig
from diffvit.data import loader as loader_module
from diffvit.data.batches import Batch
from diffvit.data.datasets import Dataset, open_dataset
from diffvit.data.loader import BatchLoader, LocalStream, plan_run
from diffvit.training import logbook, loop
from diffvit.training.alone import train_alone
from diffvit.training.loop import RunStopped
from diffvit.training.notes import read_messages


@pytest.fixture
def dataset(tiny_config: RunConfig) -> Dataset:
    return open_dataset(tiny_config.data)


@pytest.fixture
def config(tiny_config: RunConfig, dataset: Dataset) -> RunConfig:
    return with_fields(tiny_config, model={"num_classes": 3}, data={"classes": dataset.classes}, optim={"epochs": 4})


def test_leaves_what_a_run_leaves(config: RunConfig, dataset: Dataset) -> None:
    results = train_alone(config, dataset)
    assert json.loads((config.folder / "results.json").read_text()).items() >= results.items()
    assert results["status"] == "finished"
    assert (results["last"]["epoch"], results["last"]["step"]) == (4, 12)
    assert results["device"] == "cpu"
    assert results["flops_per_second"] == results["flops_per_image"] * results["images_per_second"]
    kept = {path.name for path in config.folder.glob("checkpoint_step_*")}
    assert kept == {results["best"]["checkpoint"], "checkpoint_step_00000009", results["last"]["checkpoint"]}
    assert list((config.folder / "tensorboard").glob("events.*"))
    assert not list(config.folder.glob(".partial*"))
    finished = (config.folder / "results.json").stat().st_mtime_ns
    train_alone(config, dataset)
    assert (config.folder / "results.json").stat().st_mtime_ns == finished
    with pytest.raises(ValueError, match="with another config"):
        train_alone(with_fields(config, optim={"lr": 1.0}), dataset)


def test_what_no_console_shows_is_kept(
    config: RunConfig, dataset: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "train/red/003.png").write_bytes(b"not an image")
    (folder / "val/blue/001.png").write_bytes(b"")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(loop, "LOG_EVERY_STEPS", 1)
    train_alone(with_fields(config, scale={"precision": "bf16"}), dataset)
    (message,) = read_messages(config.location)
    assert "scale.precision = 'bf16', but this CPU would emulate bf16" in message
    lines = (config.folder / "skipped.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == ["train/red/003.png", "val/blue/001.png"]


@pytest.mark.parametrize(
    "sections",
    [
        {"optim": {"epochs": 4, "warmup_epochs": 0, "warmup_steps": 13}},
        {"model": {"variant": "diff_v2"}, "init": {"weights": "plain.safetensors", "gate_opening_steps": 13}},
    ],
)
def test_more_steps_than_the_run_has_are_refused(config: RunConfig, dataset: Dataset, sections) -> None:
    with pytest.raises(ValueError, match=r"_steps must not exceed the 12 steps of the run, got 13"):
        train_alone(with_fields(config, **sections), dataset)
    assert not config.folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("damaged", "optimizer"), [(False, "muon"), (True, "adamw")])
def test_cut_it_goes_on(
    config: RunConfig, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, damaged: bool, optimizer: str
) -> None:
    config = with_fields(config, optim={"optimizer": optimizer})
    whole = train_alone(dataclasses.replace(config, name="whole"), dataset)
    cut = dataclasses.replace(config, name="cut")
    monkeypatch.setattr(logbook, "_SIGN_SECONDS", 0.0)
    deliver = LocalStream.train

    def deliver_and_die(stream: LocalStream, first_step: int) -> Iterator[Batch]:
        for batch in deliver(stream, first_step):
            if batch.row == 7:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(LocalStream, "train", deliver_and_die)
    with pytest.raises(KeyboardInterrupt):
        train_alone(cut, dataset)
    assert json.loads((cut.folder / "results.json").read_text())["status"] == "interrupted"
    monkeypatch.setattr(LocalStream, "train", deliver)
    if damaged:
        last = cut.folder / "checkpoint_step_00000006/training.pt"
        last.write_bytes(last.read_bytes()[:-1])
    results = train_alone(cut, dataset)
    assert results["last"]["step"] == 12
    (interruption,) = results["interruptions"]
    assert interruption["steps_repeated"] == (3 if damaged else 0)  # the last sign of life is that of the save, at 6
    ours = load_file(cut.folder / results["last"]["checkpoint"] / "model.safetensors")
    theirs = load_file(cut.folder.parent / "whole" / whole["last"]["checkpoint"] / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_average_that_would_be_of_the_first_weights_is_refused(config: RunConfig, dataset: Dataset) -> None:
    plan_run(with_fields(config, optim={"ema_decay": 0.7}), dataset)  # 0.02 of it after 12 steps
    with pytest.raises(ValueError, match=r"at most 0\.7615 for a run of 12 steps, or .* weights by 31 %; got 0\.9"):
        plan_run(with_fields(config, optim={"ema_decay": 0.9}), dataset)


def test_divergence_says_why(config: RunConfig, dataset: Dataset) -> None:
    config = with_fields(config, optim={"lr": 1e30, "warmup_epochs": 0.0, "clip_norm": 0.0})
    with pytest.raises(RunStopped, match="not finite"):
        train_alone(config, dataset)
    results = json.loads((config.folder / "results.json").read_text())
    assert results["status"] == "stopped"
    assert "not finite" in results["reason"]


@pytest.mark.slow  # processes that import torch
def test_decoders_change_nothing_but_who_decodes(config: RunConfig, dataset: Dataset) -> None:
    weights = []
    for name, decoders in (("own", 0), ("helped", 2)):
        named = dataclasses.replace(config, name=name)
        results = train_alone(named, dataset, decoders=decoders)
        weights.append(load_file(named.folder / results["last"]["checkpoint"] / "model.safetensors"))
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_few_validation_images_are_decoded_once(
    config: RunConfig, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = plan_run(config, dataset)
    val = BatchLoader(config, dataset.val, plans[1])
    made: list[int] = []
    monkeypatch.setattr(
        BatchLoader,
        "__call__",
        lambda loader, row: (made.append(row), loader._load(row, loader.plan.samples(row), None))[1],
    )
    stream = LocalStream(BatchLoader(config, dataset.train, plans[0]), val)
    first, second = list(stream.evaluate()), list(stream.evaluate())
    assert made == [0]
    assert [batch.row for batch in first] == [batch.row for batch in second] == [0]
    monkeypatch.setattr(loader_module, "_KEPT_BYTES", 0)
    list(stream.evaluate())
    assert made == [0, 0]


def test_a_bad_image_counts_once_however_often_it_is_repeated(config: RunConfig, dataset: Dataset) -> None:
    config = with_fields(config, augment={"repeats": 3}, optim={"epochs": 3})
    path = config.data.path + "/" + dataset.train.key(0)
    Path(path).write_bytes(b"no image")
    results = train_alone(config, dataset)
    assert (results["status"], results["skipped_images"]) == ("finished", 1)


def test_bad_images_are_too_many_whenever_they_are_met(config: RunConfig, dataset: Dataset) -> None:
    """With three copies of each an epoch shows a third of the images; one of 36 may be bad, and two are."""
    config = with_fields(config, augment={"repeats": 3}, optim={"epochs": 9}, data={"max_skipped_fraction": 0.03})
    for number in (0, 20):
        Path(config.data.path, dataset.train.key(number)).write_bytes(b"no image")
    with pytest.raises(RunStopped, match=r"2 of the 36 training images cannot be used, more than the 1 that"):
        train_alone(config, dataset)
