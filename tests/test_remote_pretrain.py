"""A run through Ray Train whose folder is in an object store, and which loses a worker."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import ObjectStore, make_folder, with_fields
from pyarrow import BufferReader
from safetensors.torch import load, load_file
from test_pretrain import own_processes

from diffvit.config import RunConfig
from diffvit.storage import Storage
from diffvit.training.launch import train
from diffvit.training.run_lock import RunLock

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def test_a_killed_worker_goes_on_from_the_store(
    tiny_config: RunConfig, object_store: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights and its audit end as those of a run on a disk that nothing happened to, bit for bit."""
    images = make_folder(tmp_path / "more", images_per_class=60, val_per_class=5)  # 15 steps an epoch
    whole = with_fields(
        tiny_config,
        scale={"workers": 2},
        data={"path": str(images), "audit": True},
        optim={"epochs": 2},
        model={"drop_path": 0.1},
        checkpoint={"every_steps": 5},
    )
    uncut = train(whole)
    config = dataclasses.replace(whole, storage=object_store.uri(f"ray-{tmp_path.name}"))
    run = Storage(config.location)

    def kill_a_worker_after_the_first_checkpoint() -> None:
        while not any(name.endswith("checkpoint.json") for name in run.sizes()):
            time.sleep(0.05)
        with pytest.raises(ValueError, match=f"'tiny' is being worked on by process {os.getpid()}"):
            RunLock(config.location).__enter__()
        refused.append(True)
        os.kill(own_processes("ray::RayTrainWorker")[0], signal.SIGKILL)

    refused: list[bool] = []
    killer = threading.Thread(target=kill_a_worker_after_the_first_checkpoint, daemon=True)
    killer.start()
    results = train(config)
    killer.join()
    assert refused
    assert json.loads(run.read("results.json")).items() >= results.items()
    assert results["last"]["step"] == uncut["last"]["step"] == 30
    assert results["world_sizes"] == [2, 2]
    (interruption,) = results["interruptions"]
    assert interruption["why"].startswith(("worker 0 was lost", "worker 1 was lost"))
    ours = load(run.read(f"{results['last']['checkpoint']}/model.safetensors"))
    theirs = load_file(whole.folder / uncut["last"]["checkpoint"] / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    order = [("epoch", "ascending"), ("position", "ascending")]
    parts = [row for name in run.sizes("audit") for row in pq.read_table(BufferReader(run.read(name))).to_pylist()]
    expected = pq.read_table(whole.folder / "audit").sort_by(order).to_pylist()
    assert sorted(parts, key=lambda row: (row["epoch"], row["position"])) == expected
    assert not [name for name in run.names() if name.startswith(".")]  # nothing of Ray's
    assert f"tensorboard --logdir s3://bucket/ray-{tmp_path.name}\n" in capsys.readouterr().out
