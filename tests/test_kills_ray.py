"""SIGKILL of the command and of workers, at moments that could be bad ones and at random ones."""

from __future__ import annotations

import dataclasses
import json
import os
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import ray.train
import torch
from conftest import ObjectStore, make_folder, with_fields
from pyarrow import BufferReader
from safetensors.torch import load, load_file

from diffvit.config import RunConfig, to_json
from diffvit.storage import Storage
from diffvit.training import launch
from diffvit.training.checkpoint import checkpoint_name
from diffvit.training.checkpoint_store import CheckpointStore
from diffvit.training.run_lock import RunLock

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.usefixtures("local_ray")]

JOB = Path(__file__).parents[1] / "ray_jobs/pretrain.py"
LOOP = "diffvit.training.loop"
# (rank, where, which function, at which call, of those with an argument that ends so)
KILLS = (
    (1, LOOP, "take_step", 2, ""),
    (0, LOOP, "start_state", 1, ""),
    (0, "diffvit.storage:Storage", "write", 1, "training.pt"),
    (0, LOOP, "evaluate", 1, ""),
)
IN_START_UP = 1
"""That makes the interruption before it longer."""


def dying(died: Path) -> Callable[[dict[str, Any]], str | None]:
    """What a worker runs: training, in which the next of `KILLS` happens. `died` counts them.

    A nested function, because Ray's workers cannot import this module.
    """
    train_worker, kills = launch._train_worker, KILLS

    def train_and_die(job: dict[str, Any]) -> str | None:
        number = len(list(died.iterdir()))
        rank = ray.train.get_context().get_world_rank()
        if number < len(kills) and kills[number][0] == rank:
            _, where, name, last_call, ending = kills[number]
            owner = pkgutil.resolve_name(where)
            function, calls = getattr(owner, name), 0

            def kill_or_call(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                calls += not ending or any(str(argument).endswith(ending) for argument in arguments)
                if calls == last_call:
                    (died / str(number)).touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            setattr(owner, name, kill_or_call)
        return train_worker(job)

    return train_and_die


def kill_the_command(config: RunConfig, folder: Path) -> None:
    """Type it, on the Ray that is there, and kill it when it has saved something."""
    (folder / "config.json").write_text(to_json(config))
    address = ray.get_runtime_context().gcs_address
    with (folder / "log").open("w") as log:
        command = [sys.executable, str(JOB), "--config", str(folder / "config.json")]
        environment = os.environ | {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"}
        with subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process:
            while not CheckpointStore(config.location, config.checkpoint).entries():
                assert process.poll() is None, (folder / "log").read_text()[-3000:]
                time.sleep(0.05)
            with pytest.raises(ValueError, match=f"'tiny' is being worked on by process {process.pid}"):
                RunLock(config.location).__enter__()
            process.kill()


def audited(config: RunConfig) -> list[dict[str, Any]]:
    run = Storage(config.location)
    rows = [row for name in run.sizes("audit") for row in pq.read_table(BufferReader(run.read(name))).to_pylist()]
    return sorted(rows, key=lambda row: (row["epoch"], row["position"]))


def test_killed_at_every_moment(
    tiny_config: RunConfig,
    object_store: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It ends with the bits and the audit of a run on a disk that nothing happened to."""
    whole = with_fields(
        tiny_config,
        model={"drop_path": 0.2},
        data={"audit": True},
        optim={"epochs": 8, "ema_decay": 0.5},
        scale={"workers": 2, "max_failures": len(KILLS)},
        checkpoint={"every_steps": 2},
    )
    uncut = launch.train(whole)
    config = dataclasses.replace(whole, storage=object_store.uri(f"kills-{tmp_path.name}"))
    kill_the_command(config, tmp_path)
    died = tmp_path / "died"
    died.mkdir()
    monkeypatch.setattr(launch, "_train_worker", dying(died))
    results = launch.train(config)
    assert len(list(died.iterdir())) == len(KILLS)
    assert (results["status"], results["last"]["step"]) == ("finished", 24)
    reasons = [interruption["why"] for interruption in results["interruptions"]]
    assert len(reasons) == 1 + len(KILLS) - IN_START_UP
    assert reasons[0].startswith("ended without a word")
    assert all(reason.startswith("worker ") for reason in reasons[1:]), reasons
    run, last = Storage(config.location), results["last"]["checkpoint"]
    ours = load(run.read(f"{last}/model.safetensors"))
    theirs = load_file(whole.folder / uncut["last"]["checkpoint"] / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert results["best"]["top1"] == uncut["best"]["top1"]
    assert audited(config) == audited(whole)
    assert json.loads(run.read("results.json")).items() >= results.items()
    assert f"tensorboard --logdir s3://bucket/kills-{tmp_path.name}\n" in capsys.readouterr().out
    assert not [name for name in run.names() if name.startswith(".")]  # nothing of Ray's
    checkpoints = {name for name in run.names() if name.startswith("checkpoint_step_")}
    assert checkpoints == {entry.name for entry in CheckpointStore(config.location, config.checkpoint).entries()}


def killed_at(step: int, rank: int, saved: Path) -> Callable[[dict[str, Any]], str | None]:
    """What a worker runs: training, in which the process of `rank` dies once there are `step` steps and `saved`."""
    train_worker, loop = launch._train_worker, LOOP

    def train_and_die(job: dict[str, Any]) -> str | None:
        module = pkgutil.resolve_name(loop)
        take_step = module.take_step

        def take_step_or_die(config: Any, plan: Any, model: Any, state: Any, *others: Any) -> Any:
            if state.step == step and ray.train.get_context().get_world_rank() == rank:
                while not saved.exists():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            return take_step(config, plan, model, state, *others)

        module.take_step = take_step_or_die
        return train_worker(job)

    return train_and_die


def test_runs_of_one_to_four_workers_cut_at_random_steps(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each goes on with another number of workers; the audit is that of a run by one which nothing happened to."""
    images = make_folder(tmp_path / "more", images_per_class=40, val_per_class=5)  # 20 steps of 12
    whole = with_fields(
        tiny_config,
        data={"path": str(images), "audit": True},
        scale={"max_failures": 0},
        checkpoint={"every_steps": 3},
    )
    launch.train(dataclasses.replace(whole, name="whole"))
    rng = np.random.default_rng(11)
    saves = (3 * np.sort(rng.choice(np.arange(1, 6), 4, replace=False))).tolist()
    for workers, save in zip(rng.permutation([1, 2, 3, 4]).tolist(), saves, strict=True):
        config = with_fields(whole, scale={"workers": workers})
        saved = whole.folder / checkpoint_name(save) / "checkpoint.json"
        with monkeypatch.context() as patch:
            dying = killed_at(save + int(rng.integers(1, 3)), int(rng.integers(workers)), saved)
            patch.setattr(launch, "_train_worker", dying)
            with pytest.raises(launch.TrainingFailedError):
                launch.train(config)
    results = launch.train(with_fields(whole, scale={"workers": 3}))
    assert (results["last"]["step"], len(results["interruptions"])) == (20, 4)
    assert sorted(results["world_sizes"][:-1]) == [1, 2, 3, 4]

    def samples(config: RunConfig) -> list[tuple[Any, ...]]:  # the ranks differ, of course
        return [tuple(row[name] for name in ("epoch", "step", "position", "key")) for row in audited(config)]

    assert samples(whole) == samples(dataclasses.replace(whole, name="whole"))
    assert len(set(samples(whole))) == len(samples(whole)) == 2 * 120
