"""What a process of a Ray Train worker group is to the loop: its plans, its stream, how it speaks to the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device

from diffvit.config import RunConfig, from_json
from diffvit.data.loader import BatchLoader, plan_run
from diffvit.data.order import EvalPlan, TrainPlan
from diffvit.data.stream import RayStream
from diffvit.training.checkpoint_store import CheckpointStore
from diffvit.training.cluster import cpu_count
from diffvit.training.notes import Notes
from diffvit.training.worker import Worker


@dataclass(frozen=True)
class Member:
    """A process of a worker group, with what the loop needs."""

    config: RunConfig
    train_plan: TrainPlan
    eval_plan: EvalPlan
    stream: RayStream
    worker: Worker
    notes: Notes


def join_group(job: dict[str, Any]) -> Member:
    """On a worker of Ray Train: what it has to do with, from what `launch` handed over."""
    config, dataset, progress = from_json(job["config"], "train_loop_config"), ray.get(job["dataset"]), job["progress"]
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    if not config.scale.gpu:
        torch.set_num_threads(max(cpu_count() // context.get_local_world_size(), 1))

    notes = Notes(config.location)  # where no console hears the run; only rank 0 writes down what it tells

    def publish(kind: str, fields: dict[str, Any]) -> None:
        if progress is not None:
            progress.actor.put_nowait.remote((kind, fields))  # not waited for
        elif rank == 0:
            notes.publish(kind, fields)

    worker = Worker(
        device=get_device(),
        report=ray.train.report,
        publish=publish,
        rank=rank,
        workers=workers,
        store=CheckpointStore(config.location, config.checkpoint),
        agree=broadcast_from_rank_zero,
        preempted=lambda: ray.train.get_preemption_info() is not None,
    )
    train_plan, eval_plan = plan_run(config, dataset, workers)
    stream = RayStream(
        BatchLoader(config, dataset.train, train_plan),
        BatchLoader(config, dataset.val, eval_plan),
        rank,
        workers,
        broadcast_from_rank_zero,
        worker.warn,
    )
    return Member(config, train_plan, eval_plan, stream, worker, notes)
