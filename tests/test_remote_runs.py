"""Whole runs in object stores (emulators, on loopback): what lies there, and what a cut or an outage costs."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import GoogleStore, ObjectStore, with_fields
from pyarrow import BufferReader
from safetensors.torch import load

from diffvit.analysis.curves import read_curves
from diffvit.analysis.finished_runs import load_run
from diffvit.config import RunConfig
from diffvit.data.batches import Batch
from diffvit.data.datasets import Dataset, open_dataset
from diffvit.data.loader import LocalStream
from diffvit.models.fetched import on_disk
from diffvit.models.pretrained import UnknownOriginError, origin_of
from diffvit.models.saved import load_saved
from diffvit.models.vit import VisionTransformer
from diffvit.models.weights import load_weights
from diffvit.rehearse import _beside
from diffvit.storage import Storage
from diffvit.training import checkpoint_writer, loop
from diffvit.training.alone import train_alone
from diffvit.training.checkpoint_store import CheckpointStore
from diffvit.training.loop import RunStopped

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def dataset(tiny_config: RunConfig) -> Dataset:
    return open_dataset(tiny_config.data)


@pytest.fixture
def store(request: pytest.FixtureRequest) -> ObjectStore | GoogleStore:
    found: ObjectStore | GoogleStore = request.getfixturevalue(getattr(request, "param", "object_store"))
    return found


@pytest.fixture
def config(tiny_config: RunConfig, dataset: Dataset, store: ObjectStore | GoogleStore, tmp_path: Path) -> RunConfig:
    """12 steps, saved at 3, 6, 9 and 12."""
    config = with_fields(
        tiny_config,
        model={"num_classes": 3, "drop_path": 0.2},
        data={"classes": dataset.classes, "audit": True},
        optim={"epochs": 4},
    )
    return dataclasses.replace(config, storage=store.uri(f"runs-{tmp_path.name}"))


def weights(config: RunConfig, checkpoint: str) -> dict[str, torch.Tensor]:
    return load(Storage(config.location).read(f"{checkpoint}/model.safetensors"))


def audited(config: RunConfig) -> list[dict[str, Any]]:
    run = Storage(config.location)
    rows = [row for name in run.sizes("audit") for row in pq.read_table(BufferReader(run.read(name))).to_pylist()]
    return sorted(rows, key=lambda row: (row["epoch"], row["position"]))


def cut(monkeypatch: pytest.MonkeyPatch, config: RunConfig, dataset: Dataset, row: int) -> None:
    """The run ends when it asks for batch `row`."""
    deliver = LocalStream.train

    def deliver_and_die(stream: LocalStream, first_step: int) -> Iterator[Batch]:
        for batch in deliver(stream, first_step):
            if batch.row == row:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(LocalStream, "train", deliver_and_die)
        with pytest.raises(KeyboardInterrupt):
            train_alone(config, dataset)


@pytest.mark.parametrize("store", ["object_store", "google_store"], indirect=True)
def test_cut_it_goes_on_from_the_store_alone(
    config: RunConfig, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, scratch: Path, tmp_path: Path
) -> None:
    """And ends with the bits of the uncut run on a disk; no secret and no local path is in what it leaves."""
    secret = "bWFnaWMgd29yZHM"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    uncut = dataclasses.replace(config, storage=str(tmp_path / "disk"))
    whole = train_alone(uncut, dataset)
    cut(monkeypatch, config, dataset, 7)
    assert list(scratch.iterdir()) == []
    results = train_alone(config, dataset)
    run = Storage(config.location)
    assert json.loads(run.read("results.json")).items() >= results.items()
    assert (results["status"], results["last"]["step"], len(results["interruptions"])) == ("finished", 12, 1)
    assert results["best"] == whole["best"]
    kept = {"checkpoint_step_00000009", results["last"]["checkpoint"], results["best"]["checkpoint"]}
    assert {name for name in run.names() if name.startswith("checkpoint")} == kept
    theirs = load((uncut.folder / whole["last"]["checkpoint"] / "model.safetensors").read_bytes())
    ours = weights(config, results["last"]["checkpoint"])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    table = pq.read_table(uncut.folder / "audit").sort_by([("epoch", "ascending"), ("position", "ascending")])
    assert audited(config) == table.to_pylist()
    assert set(run.names()) - kept == {
        *(
            "alive.json",
            "audit",
            "config.json",
            "data.json",
            "interruptions.json",
            "results.json",
            "sitting.json",
            "tensorboard",
        )
    }
    assert train_alone(config, dataset)["last"] == results["last"]  # finished: nothing is trained again
    with on_disk(config.location, "last") as copy:
        curves, whole_curves = (read_curves(folder / "tensorboard") for folder in (copy, uncut.folder))
        finished = load_run(copy)
    assert curves["train/loss"] == whole_curves["train/loss"]
    assert [step for step, _ in curves["val/top1"]] == [3, 6, 9, 12]
    assert all(torch.equal(finished.model.state_dict()[name], theirs[name]) for name in theirs)
    for name in run.sizes():
        assert secret.encode() not in run.read(name), name
        assert str(scratch).encode() not in run.read(name), name
    assert list(scratch.iterdir()) == []


def test_weights_at_a_url(config: RunConfig, dataset: Dataset, scratch: Path) -> None:
    results = train_alone(with_fields(config, optim={"epochs": 1}), dataset)
    assert origin_of(config.location).model == config.model
    best = weights(config, results["best"]["checkpoint"])
    saved = load_saved(config.location).model.state_dict()
    assert all(torch.equal(saved[name], best[name]) for name in best)
    tuned = with_fields(
        dataclasses.replace(config, name="tuned"),
        init={"weights": f"{Storage(config.location).child('checkpoint_step_00000003').uri}", "train": "head"},
        optim={"epochs": 1},
    )
    train_alone(tuned, dataset)
    ours = weights(tuned, "checkpoint_step_00000003")
    assert all(torch.equal(ours[name], best[name]) for name in best if not name.startswith("head."))
    file = Storage(config.location).child("checkpoint_step_00000003/model.safetensors").uri
    named = Storage(config.location).child("vit_tiny_patch16_224")  # whose heads no shape shows
    named.write("model.safetensors", Storage(config.location).read("checkpoint_step_00000003/model.safetensors"))
    plain = VisionTransformer(dataclasses.replace(config.model, variant="softmax", num_heads=2))
    with pytest.raises(ValueError, match=r"of a model with model.num_heads = 3, got 2"):
        load_weights(plain, named.child("model.safetensors").uri)
    with pytest.raises(UnknownOriginError, match=r"'s3://bucket/.*/model\.safetensors.*' says nothing of its model"):
        origin_of(file)
    with on_disk(file) as path:
        assert path.name == "model.safetensors"
        assert load(path.read_bytes()).keys() == best.keys()
    written = Storage(config.location).read("results.json")
    for content, outcome in ((b'{"best":', "results.json cannot be read"), (b'{"best": {"checkpoint": "gone"}}', None)):
        Storage(config.location).write("results.json", content)
        with pytest.raises(ValueError, match=outcome) if outcome else nullcontext():
            saved = load_saved(config.location).model.state_dict()
            assert all(torch.equal(saved[name], best[name]) for name in best)
    Storage(config.location).write("results.json", written)
    name = "checkpoint_step_00000003/model.safetensors"
    Storage(config.location).write(name, Storage(config.location).read(name)[:-1])
    url = config.location.partition("?")[0]
    with pytest.raises(ValueError, match=rf"checkpoint {url}/checkpoint_step_00000003 is damaged"):
        load_saved(config.location)
    with pytest.raises(ValueError, match=r"s3://bucket/.*/nothing cannot be read"):
        load_saved(Storage(config.storage).child("nothing").uri)
    assert list(scratch.iterdir()) == []


def test_a_damaged_checkpoint_is_passed_over(
    config: RunConfig, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_alone(dataclasses.replace(config, name="whole"), dataset)
    cut(monkeypatch, config, dataset, 8)
    run = Storage(config.location)
    name = "checkpoint_step_00000006/training.pt"
    run.write(name, run.read(name)[:-1] + b"!")
    run.write("checkpoint_step_00000007/model.safetensors", b"an upload that was cut")
    warnings: list[str] = []
    results = train_alone(config, dataset, lambda kind, fields: warnings.append(fields.get("message", "")))
    passed_over = [warning for warning in warnings if "is passed over" in warning]
    assert [warning.split()[0] for warning in passed_over] == ["checkpoint_step_00000007", "checkpoint_step_00000006"]
    assert "sha256 of training.pt" in passed_over[1]
    assert "checkpoint_step_00000007" not in run.names()
    ours, theirs = (
        weights(one, whole["last"]["checkpoint"]) for one in (config, dataclasses.replace(config, name="whole"))
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert results["last"]["step"] == 12
    assert audited(config) == audited(dataclasses.replace(config, name="whole"))


@pytest.mark.slow
def test_training_outlasts_an_outage(
    config: RunConfig, dataset: Dataset, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store goes after step 4 and comes back only when the steps to the end are done."""
    monkeypatch.setattr(checkpoint_writer, "_FIRST_DELAY_SECONDS", 0.05)
    whole = dataclasses.replace(config, name="whole")
    train_alone(whole, dataset)
    warnings: list[str] = []
    all_steps_done = threading.Event()
    step = loop.take_step

    def take_step(*arguments: Any) -> torch.Tensor:
        state = arguments[3]
        norm = step(*arguments)
        if state.step == 4:
            object_store.stop()
        if state.step == 12:
            all_steps_done.set()
        return norm

    def bring_back() -> None:
        assert all_steps_done.wait(60)
        while not warnings:
            time.sleep(0.01)
        object_store.start()

    monkeypatch.setattr(loop, "take_step", take_step)
    back = threading.Thread(target=bring_back)
    back.start()
    results = train_alone(
        config, dataset, lambda kind, fields: warnings.append(fields["message"]) if kind == "warning" else None
    )
    back.join()
    assert (results["status"], results["last"]["step"], results["interruptions"]) == ("finished", 12, [])
    assert all("could not be written and is tried again: s3://bucket/runs-" in warning for warning in warnings)
    steps = [entry.step for entry in CheckpointStore(config.location, config.checkpoint).entries()]
    assert steps[-2:] == [9, 12]
    assert len(audited(config)) == 4 * 36
    ours, theirs = (weights(one, "checkpoint_step_00000012") for one in (config, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_an_outage_that_is_too_long_ends_the_run(
    config: RunConfig, dataset: Dataset, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "_FIRST_DELAY_SECONDS", 0.05)
    config = with_fields(config, checkpoint={"retry_minutes": 0.5 / 60})
    failed = threading.Event()
    try_to_write = checkpoint_writer.CheckpointWriter._write

    def write(writer: Any, waiting: Any) -> None:
        try_to_write(writer, waiting)
        if writer.failure and not failed.is_set():
            object_store.start()  # so that what happened can be written down
            failed.set()

    monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "_write", write)
    step = loop.take_step

    def take_step(*arguments: Any) -> torch.Tensor:
        if arguments[3].step == 4:
            while Storage(config.location).size("checkpoint_step_00000003/checkpoint.json") is None:
                time.sleep(0.01)
            object_store.stop()
        if arguments[3].step == 8:
            assert failed.wait(60)
        return step(*arguments)

    monkeypatch.setattr(loop, "take_step", take_step)
    with pytest.raises(RunStopped, match=r"no checkpoint could be written for 0.008\d* minutes: s3://bucket/runs-"):
        train_alone(config, dataset)
    results = json.loads(Storage(config.location).read("results.json"))
    assert results["status"] == "stopped"
    assert results["last"]["step"] < 12


def test_no_more_is_fetched_than_a_checkpoint(
    config: RunConfig, dataset: Dataset, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below a mistaken URL may lie terabytes, and a run that was cut has all its checkpoints and its audit."""
    fetched: list[str] = []
    fetch = Storage.fetch
    monkeypatch.setattr(Storage, "fetch", lambda store, name, to: (fetched.append(name), fetch(store, name, to)))
    train_alone(with_fields(config, optim={"epochs": 2}, data={"audit": True}), dataset)
    with pytest.raises(ValueError, match=r"cannot be read: it is neither a run with a checkpoint nor a checkpoint"):
        load_saved(config.storage)
    assert fetched == []
    run = Storage(config.location)
    run.delete("results.json")
    for best, top1 in (("checkpoint_step_00000006", 101), ("checkpoint_step_00000003", 102)):
        manifest = json.loads(run.read(f"{best}/checkpoint.json"))
        manifest["metrics"]["top1"] = top1
        run.write(f"{best}/checkpoint.json", json.dumps(manifest).encode())
        weights_of_best = weights(config, best)
        fetched.clear()
        saved = load_saved(config.location).model.state_dict()
        assert all(torch.equal(saved[name], weights_of_best[name]) for name in weights_of_best)
        assert {name.partition("/")[0] for name in fetched if name.endswith(".safetensors")} == {best}
        assert not [name for name in fetched if name.startswith("audit")]
    assert list(scratch.iterdir()) == []


def test_what_is_refused(config: RunConfig, dataset: Dataset) -> None:
    with pytest.raises(ValueError, match=r"storage cannot be used: .*leave them to the environment") as caught:
        dataclasses.replace(config, storage="s3://KEY:SECRET@bucket/runs")
    assert "SECRET" not in str(caught.value)
    train_alone(with_fields(config, optim={"epochs": 1}), dataset)
    with pytest.raises(ValueError, match=r"(?s)'tiny' exists in s3://bucket/.*/tiny with another config.*optim.lr"):
        train_alone(with_fields(config, optim={"epochs": 1, "lr": 1.0}), dataset)
    Storage(config.storage).write("thesis/chapter.tex", b"do not lose me")
    with pytest.raises(ValueError, match="it is not a run"):
        train_alone(dataclasses.replace(config, name="thesis"), dataset)
    absent = dataclasses.replace(config, storage=config.storage.replace("s3://bucket", "s3://no-such-bucket"))
    with pytest.raises(ValueError, match=r"storage s3://no-such-bucket/.* cannot be written"):
        train_alone(absent, dataset)


@pytest.mark.parametrize("ends", [True, False])
def test_a_rehearsal_leaves_nothing_in_the_store(config: RunConfig, ends: bool) -> None:
    store = Storage(config.storage)
    store.write("tiny/results.json", b"of the run itself")
    config = with_fields(config, checkpoint={"every_steps": 5})  # which the forecast adds, so they are not to be timed
    with pytest.raises(RuntimeError) if not ends else nullcontext(), _beside(config) as temporary:
        assert (temporary.storage, temporary.scale.max_failures) == (config.storage, 0)
        assert temporary.name != config.name
        assert (temporary.checkpoint.every_steps, temporary.checkpoint.every_minutes) == (None, None)
        Storage(temporary.location).write("checkpoints/a", b"x")
        assert len(store.names()) == 2
        if not ends:
            raise RuntimeError
    assert store.names() == ["tiny"]
    assert store.read("tiny/results.json") == b"of the run itself"
