"""SIGKILL at every moment of a run that could be a bad one; started again, it ends with the bits of the uncut run."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import with_fields
from safetensors.torch import load_file

from diffvit.config import RunConfig, from_json, to_json
from diffvit.data.datasets import open_dataset
from diffvit.training import checkpoint, checkpoint_store, loop, run_folder
from diffvit.training.alone import train_alone

pytestmark = pytest.mark.faults  # a process each, which imports torch

# (where, which function, at which call or the first whose argument has that in it, before or after it). Checkpoints are
# written at steps 2, 3, 4, 6, 8, 9, of which those in mid-epoch may give way to later ones
MOMENTS: dict[str, tuple[Any, str, int | str, str]] = {
    "start-up": (loop, "load_checkpoint", 1, "before"),
    "first step": (loop, "take_step", 1, "before"),
    "in mid-epoch": (loop, "take_step", 5, "after"),
    "weights written, the rest not": (checkpoint, "save_file", 3, "after"),
    "before the manifest": (checkpoint, "write_manifest", 3, "before"),
    "written, not in its place": (checkpoint, "write_manifest", 4, "after"),
    "before old ones are deleted": (checkpoint_store, "kept_steps", 4, "before"),
    "half deleted": (shutil, "rmtree", ".deleted-", "after"),
    "audit written, not in its place": (os, "fsync", 7, "after"),
    "evaluation": (loop, "evaluate", 2, "before"),
    "before results.json": (run_folder, "write_results", 1, "before"),
}


def train_and_die(config: str, moment: str) -> None:
    """The process that is killed."""
    module, name, call, when = MOMENTS[moment]
    function: Callable[..., Any] = getattr(module, name)
    calls = 0

    def kill_or_call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        now = calls == call if isinstance(call, int) else call in str(arguments[0])
        if now and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    torch.set_num_threads(1)
    setattr(module, name, kill_or_call)
    parsed = from_json(config, "test")
    train_alone(parsed, open_dataset(parsed.data))


def killed(config: RunConfig, moment: str) -> int | None:
    process = multiprocessing.get_context("forkserver").Process(target=train_and_die, args=(to_json(config), moment))
    process.start()
    process.join(120)
    return process.exitcode


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    classes = open_dataset(tiny_config.data).classes
    return with_fields(
        tiny_config,
        model={"num_classes": 3, "drop_path": 0.2},
        data={"classes": classes, "audit": True},
        optim={"epochs": 3, "ema_decay": 0.5},
        checkpoint={"every_steps": 2, "keep_last": 1},
    )


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_as_the_uncut_one(config: RunConfig, moment: str) -> None:
    dataset = open_dataset(config.data)
    whole = train_alone(dataclasses.replace(config, name="whole"), dataset)
    cut = dataclasses.replace(config, name="cut")
    if moment == "start-up":  # it loads a checkpoint only when there is one
        assert killed(cut, "in mid-epoch") == -signal.SIGKILL
    assert killed(cut, moment) == -signal.SIGKILL
    results = train_alone(cut, dataset)
    assert (results["status"], results["last"]["step"]) == ("finished", 9)
    assert results["best"] == whole["best"]
    assert len(results["interruptions"]) == 1  # one in start-up makes that before it longer
    folders = [cut.folder, Path(cut.storage) / "whole"]
    ours, theirs = (load_file(folder / "checkpoint_step_00000009/model.safetensors") for folder in folders)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    audits = [
        pq.read_table(run / "audit").sort_by([("epoch", "ascending"), ("position", "ascending")]) for run in folders
    ]
    assert audits[0].equals(audits[1])
    # nothing is left behind; which checkpoints beside the best and the last are there depends on the disk's speed
    left = [{path.name for path in folder.iterdir() if "checkpoint_step" not in path.name} for folder in folders]
    assert left[0] - {"interruptions.json"} == left[1]
    assert not list(cut.folder.rglob(".*"))
