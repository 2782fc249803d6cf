"""Whole runs through Ray Train: what a user gets, what is refused, and what a lost worker costs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import ray.train
import torch
from conftest import ObjectStore, make_folder, with_fields
from ray.exceptions import RayActorError
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from safetensors.torch import load_file

from diffvit.config import PrepareConfig, RunConfig, from_json
from diffvit.data import datasets
from diffvit.data.prepare import prepare
from diffvit.models.vit import VisionTransformer
from diffvit.models.weights import load_weights
from diffvit.storage import Storage
from diffvit.training.launch import RunStopped, TrainingFailedError, _cause, train
from diffvit.training.run_lock import RunLock

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    return with_fields(tiny_config, scale={"workers": 2}, optim={"epochs": 3})


def test_a_run_from_start_to_finish(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    results = train(config)
    written = json.loads((config.folder / "results.json").read_text())
    assert written.items() >= results.items()
    assert results["status"] == "finished"
    assert results["last"]["epoch"] == 3
    assert results["last"]["step"] == 9
    assert results["best"]["top1"] >= results["last"]["top1"]
    assert results["world_sizes"] == [2]
    assert 0 < results["seconds_to_first_step"] < results["wall_seconds"]
    assert results["peak_bytes"] > 2**27  # torch alone takes more
    assert set(written["versions"]) >= {"torch", "ray"}
    # what lies in the folder: the best and the last two checkpoints, nothing half written
    checkpoints = {path.name for path in config.folder.glob("checkpoint_step_*")}
    assert checkpoints == {results["best"]["checkpoint"], "checkpoint_step_00000006", results["last"]["checkpoint"]}
    assert not list(config.folder.glob(".partial*"))
    assert from_json((config.folder / "config.json").read_text(), "").model.num_classes == 3
    assert list((config.folder / "tensorboard").glob("events.*"))
    load_weights(VisionTransformer(with_fields(config, model={"num_classes": 3}).model), config.folder)
    shown = capsys.readouterr().out
    assert "36 training and 15 validation images, 3 classes; 2 workers on CPU" in shown
    assert sum(line.split()[:2] == [str(e), str(3 * e)] for e in (1, 2, 3) for line in shown.splitlines()) == 3

    assert train(config)["last"] == results["last"]  # finished: nothing is trained again
    with pytest.raises(ValueError, match=r"(?s)exists in .* with another config.*optim.lr: 0.003 there, 0.1 now"):
        train(with_fields(config, optim={"lr": 0.1}))
    with pytest.raises(ValueError, match="choose another --name or leave --resume on"):
        train(dataclasses.replace(config, resume=False))


def test_a_killed_worker_costs_nothing_but_time(config: RunConfig, tmp_path: Path) -> None:
    """SIGKILL in mid-epoch: Ray starts the group again and the weights end as if nothing had happened, bit for bit."""
    images = make_folder(tmp_path / "more", images_per_class=160, val_per_class=5)  # 40 steps an epoch
    config = with_fields(
        config,
        data={"path": str(images), "audit": True},
        optim={"epochs": 2},
        model={"drop_path": 0.1},
        checkpoint={"every_steps": 5},
    )
    whole = train(dataclasses.replace(config, name="whole"))
    cut = dataclasses.replace(config, name="cut")
    killer = threading.Thread(target=kill_a_worker_after_the_first_checkpoint, args=(cut.folder,), daemon=True)
    killer.start()
    results = train(cut)
    killer.join()
    assert results["last"]["step"] == whole["last"]["step"] == 80
    assert results["world_sizes"] == [2, 2]
    (interruption,) = results["interruptions"]
    assert interruption["why"].startswith(("worker 0 was lost", "worker 1 was lost"))
    assert interruption["seconds_lost"] > 0
    assert whole["interruptions"] == []
    ours = load_file(cut.folder / results["last"]["checkpoint"] / "model.safetensors")
    theirs = load_file(cut.folder.parent / "whole" / whole["last"]["checkpoint"] / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    audits = [pq.read_table(run / "audit").sort_by([("epoch", "ascending"), ("position", "ascending")])
              for run in (cut.folder, cut.folder.parent / "whole")]  # fmt: skip
    assert audits[0].equals(audits[1])
    assert audits[0].num_rows == 2 * 480


def test_a_second_run_of_the_name_is_refused(config: RunConfig) -> None:
    with RunLock(config.folder), pytest.raises(ValueError, match=f"being worked on by process {os.getpid()}"):
        train(config)


def test_an_open_number_of_workers_takes_what_divides_the_batch(config: RunConfig) -> None:
    """Of 6 CPUs there is room for 3 workers of 2, but only 2 and 4 divide a batch of 8."""
    results = train(
        with_fields(config, scale={"workers": (2, 5), "cpus_per_worker": 2.0}, optim={"epochs": 1, "batch_size": 8})
    )
    assert results["world_sizes"] == [2]
    assert results["last"]["step"] == 4


def kill_a_worker_after_the_first_checkpoint(folder: Path) -> None:
    while not list(folder.glob("checkpoint_step_*")):
        time.sleep(0.01)
    os.kill(own_processes("ray::RayTrainWorker")[0], signal.SIGKILL)


def own_processes(title: str) -> list[int]:
    """Processes of that title among the descendants of this one."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(entry.name)] = (entry / "cmdline").read_text()

    def is_own(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and is_own(parents[pid]))

    return [pid for pid, found in titles.items() if found.startswith(title) and is_own(pid)]


def test_divergence_is_not_tried_again(config: RunConfig) -> None:
    config = with_fields(config, scale={"workers": 1}, optim={"lr": 1e30, "warmup_epochs": 0.0, "clip_norm": 0.0})
    with pytest.raises(RunStopped, match="not finite"):
        train(config)
    results = json.loads((config.folder / "results.json").read_text())
    assert results["status"] == "stopped"
    assert "not finite" in results["reason"]


@pytest.mark.faults
def test_a_shard_that_is_lost_ends_the_run_with_its_name(config: RunConfig, tmp_path: Path) -> None:
    images = make_folder(tmp_path / "more", images_per_class=160, val_per_class=5)
    prepare(PrepareConfig(source=str(images), out=str(tmp_path / "shards"), shard_mib=0.01), lambda *_: None)
    config = with_fields(
        config,
        data={"path": str(tmp_path / "shards")},
        optim={"epochs": 100},
        checkpoint={"every_steps": 5},
        scale={"max_failures": 0},
    )

    def lose() -> None:
        while not list(config.folder.glob("checkpoint_step_*/checkpoint.json")):
            time.sleep(0.05)
        for shard in (tmp_path / "shards/train").iterdir():
            shard.unlink()

    loser = threading.Thread(target=lose, daemon=True)
    loser.start()
    with pytest.raises(TrainingFailedError, match=r"^training failed: .*StorageError: shard \S+ of \S+ cannot be read"):
        train(config)
    loser.join()
    results = json.loads((config.folder / "results.json").read_text())
    assert results["status"] == "failed"
    assert "; the same command goes on from the last checkpoint (scale.max_failures = 0, " in results["reason"]
    assert results["last"]["step"] >= 5


@pytest.mark.faults
def test_images_whose_store_stays_away_end_the_run_with_its_name(
    config: RunConfig, object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for first, here for two seconds. The first 512 images, 6 steps, the rank reads itself."""
    monkeypatch.setattr(datasets, "Storage", partial(Storage, retry_seconds=2.0))
    uri = object_store.uri(f"away-{tmp_path.name}")
    images = make_folder(tmp_path / "more", images_per_class=160, val_per_class=5)
    prepare(PrepareConfig(source=str(images), out=uri, shard_mib=0.1), lambda *_: None)
    config = with_fields(
        config,
        data={"path": uri},
        optim={"epochs": 1000, "batch_size": 96},
        scale={"workers": 1, "max_failures": 0},
    )
    ended, gone = threading.Event(), list[float]()

    def leave() -> None:
        while not gone and not ended.wait(0.05):
            if list(config.folder.glob("checkpoint_step_000000[1-9]?/checkpoint.json")):
                object_store.stop()
                gone.append(time.monotonic())

    leaver = threading.Thread(target=leave)
    leaver.start()
    first_line = (
        rf"^training failed: .*StorageError: shard train/\S+ of {re.escape(uri)} cannot be read: .* is away, "
        "tried for 2 s: .*; the same command goes on from the last checkpoint"
    )
    try:
        with pytest.raises(TrainingFailedError, match=first_line):
            train(config)
        assert time.monotonic() - gone[0] > 1
    finally:
        ended.set()
        leaver.join()
        if gone:
            object_store.start()
    results = json.loads((config.folder / "results.json").read_text())
    assert results["status"] == "failed"
    assert results["last"]["step"] >= 10


def test_an_error_on_one_rank_ends_the_group_while_the_others_wait_for_it(tmp_path: Path) -> None:
    def work() -> None:
        if ray.train.get_context().get_world_rank() == 0:
            time.sleep(300)  # as in a collective that rank 1 never joins
        raise OSError("the disk is gone")

    began = time.monotonic()
    with pytest.raises(TrainingFailedError, match="the disk is gone"):
        TorchTrainer(
            work,
            scaling_config=ScalingConfig(num_workers=2),
            run_config=ray.train.RunConfig(name="one-fails", storage_path=str(tmp_path)),
        ).fit()
    assert time.monotonic() - began < 150


def test_the_worker_that_failed_is_named_and_not_those_that_lost_it() -> None:
    lost = RuntimeError("Traceback (most recent call last):\n  File ...\nRuntimeError: gloo: Connection closed by peer")
    died = RuntimeError("The actor died unexpectedly.\n\tclass_name: X\nWorker exits with a connection error code 2")
    failed = WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: X", died)
    assert _cause({0: lost, 1: failed}) == (1, "RuntimeError: The actor died unexpectedly.")
    assert _cause({0: KeyError("x")}) == (0, "KeyError: 'x'")
    assert _cause({0: lost}) == (0, "RuntimeError: gloo: Connection closed by peer")
    taken = WorkerHealthCheckFailedError("A worker health check failed.", RayActorError(preempted=True))
    assert _cause({0: failed, 3: taken, 4: lost})[0] == 3  # the others by NCCL
    crashed = RuntimeError(
        "Traceback ...\nRuntimeError: CUDA error: assert triggered\nCompile with `TORCH_USE_CUDA_DSA`."
    )
    assert _cause({0: lost, 3: crashed}) == (3, "RuntimeError: CUDA error: assert triggered")


def test_sigterm_ends_a_job_like_ctrl_c(tmp_path: Path) -> None:
    """As `ray job stop` sends it; Ray's own answer is a dump of the stack and SIGABRT."""
    script = tmp_path / "job.py"
    script.write_text(
        "import os, signal, time, ray\n"
        "from diffvit.cli import job_ends\n"
        "from diffvit.training.cluster import connect\n"
        "with job_ends('from here'):\n"
        "    connect()\n"
        "    waited = ray.remote(num_cpus=0)(lambda: time.sleep(60)).remote()\n"
        "    signal.setitimer(signal.ITIMER_REAL, 1)\n"
        "    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))\n"
        "    ray.get(waited)\n"
    )
    job = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert (job.returncode, "SIGTERM" in job.stderr) == (130, False)
    assert "error: interrupted; the same command goes on from here" in job.stderr


def test_impossible_resources_are_refused_at_once(config: RunConfig) -> None:
    cpus = ray.cluster_resources()["CPU"]
    with pytest.raises(
        ValueError, match=rf"2 workers need 100 CPUs each; the cluster has 1 node\(s\) with {cpus:g} CPUs"
    ):
        train(with_fields(config, scale={"cpus_per_worker": 100.0}))
    with pytest.raises(ValueError, match="leaves no CPU for decoding"):
        train(with_fields(config, scale={"cpus_per_worker": cpus / 2}))
    if not ray.cluster_resources().get("GPU"):
        with pytest.raises(ValueError, match=r"and 0 GPUs in all, room for 0; .* --scale\.no-gpu"):
            train(with_fields(config, scale={"gpu": True}))


def test_classes_must_match_the_data(config: RunConfig) -> None:
    with pytest.raises(ValueError, match="must be the number of classes in the data, 3, got 7"):
        train(with_fields(config, model={"num_classes": 7}))
