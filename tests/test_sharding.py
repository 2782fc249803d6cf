"""A model spread over workers trains, is saved and goes on as one that is not: real processes, without Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import with_fields
from safetensors.torch import load_file

from diffvit.config import RunConfig, ScaleConfig
from diffvit.data.batches import Batch
from diffvit.data.datasets import open_dataset
from diffvit.data.loader import BatchLoader, LocalStream
from diffvit.data.order import EvalPlan, TrainPlan
from diffvit.models.vit import VisionTransformer
from diffvit.training.checkpoint import TrainState
from diffvit.training.checkpoint_store import CheckpointStore, Entry
from diffvit.training.checkpoint_writer import CheckpointWriter
from diffvit.training.loop import Worker, fit, start_state

pytestmark = pytest.mark.slow

STEPS = 6  # two epochs of three


@dataclass(frozen=True)
class Job:
    """A run by a group of processes into `folder`, saved after every step."""

    config: RunConfig
    folder: Path
    stop_after: int | None = None
    poisoned_step: int | None = None
    """At which the images of the last rank are not finite."""


def train(workers: int, *jobs: Job) -> None:
    """One job after the other, in the same processes."""
    meeting = jobs[0].folder.parent / f"meeting-of-{workers}-for-{jobs[0].folder.name}"
    mp.spawn(_work, (workers, meeting, jobs), nprocs=workers)


def _work(rank: int, workers: int, meeting: Path, jobs: tuple[Job, ...]) -> None:
    torch.set_num_threads(1)
    submit = CheckpointWriter.submit

    def submit_and_wait(writer: CheckpointWriter, *what: Any, **options: Any) -> None:
        submit(writer, *what, **options)
        writer.wait()

    CheckpointWriter.submit = submit_and_wait  # type: ignore[method-assign]
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
    for job in jobs:
        _train(job, rank, workers)
    dist.destroy_process_group()


def _train(job: Job, rank: int, workers: int) -> None:
    config, dataset = job.config, open_dataset(job.config.data)
    optim = config.optim
    accumulated = config.accumulation_steps_of(workers)
    plan = TrainPlan(len(dataset.train), config.seed, optim.epochs, optim.batch_size, workers, accumulated)
    eval_plan = EvalPlan(len(dataset.val), 6)  # three rows: of two ranks one has two, the other one
    loaders = BatchLoader(config, dataset.train, plan), BatchLoader(config, dataset.val, eval_plan)
    stream = LocalStream(*loaders, rank, workers)
    whole_run = stream.train

    def watched(first_step: int) -> Iterator[Batch]:
        for batch in whole_run(first_step):
            step = plan.locate(batch.row)[0]
            if step == job.stop_after:
                raise KeyboardInterrupt
            poisoned = step == job.poisoned_step and rank == workers - 1
            yield dataclasses.replace(batch, images=np.float32(np.nan) * batch.images) if poisoned else batch

    stream.train = watched  # type: ignore[method-assign]

    def agree(value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def tell(*_: Any) -> None:
        pass

    store = CheckpointStore(job.folder, config.checkpoint)
    worker = Worker(torch.device("cpu"), tell, tell, rank, workers, store, agree)
    try:
        fit(config, plan, eval_plan, stream, worker)
    except KeyboardInterrupt:
        assert job.stop_after is not None
    _require_share(start_state(config, plan, worker), config, workers)


def _require_share(state: TrainState, config: RunConfig, workers: int) -> None:
    """A rank has its rows of every parameter, of the average and of the moments, and no others."""
    moments = [m for of_one in state.optimizer.state.values() for m in (of_one["exp_avg"], of_one["exp_avg_sq"])]
    averages = list(state.evaluated_model.parameters())
    assert state.ema is not None
    assert len(moments) == 2 * len(averages)
    for value in (*state.model.parameters(), *averages, *moments):
        if config.scale.sharding == "fsdp":
            assert value.to_local().shape[0] <= -(-value.shape[0] // workers)
        else:
            assert type(value.data) is torch.Tensor


def saved(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds of what is learnt, by name."""
    checkpoint = folder / f"checkpoint_step_{step:08d}"
    training = torch.load(checkpoint / "training.pt", weights_only=True)
    found = {f"average {name}": value for name, value in load_file(checkpoint / "model.safetensors").items()}
    found |= {f"weight {name}": value for name, value in training["model"].items()}
    for number, moments in training["optimizer"]["state"].items():
        found |= {f"{name} {number}": value for name, value in moments.items()}
    assert all(type(value) is torch.Tensor for value in found.values())
    return found


def entries(folder: Path, config: RunConfig) -> list[Entry]:
    found = CheckpointStore(folder, config.checkpoint).entries()
    assert [entry.step for entry in found] == list(range(1, STEPS + 1))
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    return with_fields(
        tiny_config,
        # the same samples are dropped, and lambda is held at its bound, whatever the number of workers
        model={"num_classes": 3, "drop_path": 0.4, "lambda_max": 0.05},
        optim={"ema_decay": 0.5, "clip_norm": 1.0},
        scale={"micro_batch_size": 3},  # two or more of them are accumulated
        checkpoint={"every_steps": 1, "keep_last": 99},
    )


def test_a_sharded_run_is_the_same_run(config: RunConfig, tmp_path: Path) -> None:
    sharded = with_fields(config, scale={"sharding": "fsdp"})
    names = ("plain", "uncut", "cut", "fewer", "more", "poisoned", "poisoned-plain")
    plain, uncut, cut, fewer, more, poisoned, poisoned_plain = (tmp_path / name for name in names)
    train(
        2,
        Job(config, plain),
        Job(sharded, uncut),
        Job(sharded, cut, stop_after=4),  # in the middle of the second epoch
        Job(sharded, fewer, stop_after=4),
        Job(config, more, stop_after=4),
        Job(sharded, poisoned, poisoned_step=3),
        Job(config, poisoned_plain, poisoned_step=3),
    )
    train(2, Job(sharded, cut))
    train(1, Job(config, fewer))
    train(3, Job(sharded, more))
    assert_same(saved(uncut), saved(plain), 2e-5)
    assert_same(saved(cut), saved(uncut), 0.0)
    for sharded_entry, entry in zip(entries(uncut, config), entries(plain, config), strict=True):
        for name in ("loss", "top1") if "loss" in entry.metrics else ():
            assert sharded_entry.metrics[name] == pytest.approx(entry.metrics[name], rel=1e-4)
    for resumed in (fewer, more):
        assert_same(saved(resumed), saved(plain), 2e-5)
    assert_same(saved(poisoned), saved(poisoned_plain), 2e-5)
    assert_same(
        {name: value for name, value in saved(poisoned, 4).items() if not name.startswith("average")},
        {name: value for name, value in saved(poisoned, 3).items() if not name.startswith("average")},
        0.0,
    )
    model = VisionTransformer(config.model)
    model.load_state_dict(load_file(uncut / f"checkpoint_step_{STEPS:08d}" / "model.safetensors"))


def test_what_is_not_offered_with_it() -> None:
    with pytest.raises(ValueError, match=r"compile is not offered with scale\.sharding = 'fsdp'"):
        ScaleConfig(sharding="fsdp", compile=True)
