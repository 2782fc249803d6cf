"""The arms of a comparison, trained over the cluster: each run whole, in a process of its own."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from diffvit.cluster.packages import require_packages
from diffvit.cluster.waiting import can_grow, wait_for_nodes
from diffvit.config import ModelConfig, RunConfig, as_variant, differing_fields, from_json, listed, to_json
from diffvit.data.datasets import Dataset, open_dataset
from diffvit.data.fingerprint import fingerprint_of, require_same_images
from diffvit.data.tasks import Report
from diffvit.storage import Storage, StorageError
from diffvit.training.alone import train_alone
from diffvit.training.loop import RunStopped
from diffvit.training.notes import Notes
from diffvit.training.resolve import resolve
from diffvit.training.run_folder import begun


@dataclass(frozen=True)
class ArmRoom:
    """What an arm takes of the cluster, and how many are trained side by side.

    Attributes:
        concurrent: 0 for as many as the cluster has, or may get, room for.
        decoders: processes, with a CPU each, that decode images for an arm; 0: its own.
        gpus: share of a GPU that an arm takes where the recipe trains on one.
    """

    concurrent: int = 0
    decoders: int = 0
    gpus: float = 1.0

    def needs(self, recipe: RunConfig) -> dict[str, float]:
        return {"CPU": 1.0 + self.decoders} | ({"GPU": self.gpus} if recipe.scale.gpu else {})


def arm_configs(recipe: RunConfig) -> dict[str, RunConfig]:
    """The recipe for each variant: as many maps in V1 as the plain ViT has heads, and as many parameters in all.

    V2 has D^2 more in the queries of each block; its MLP gives up as many: `mlp_ratio`, which is that of the plain ViT
    whatever the recipe's variant, less 0.5, since an MLP has 2 D^2 `mlp_ratio`.
    """
    model = recipe.model
    heads = 2 * model.num_heads if model.variant == "diff" else model.num_heads
    if heads % 2:
        raise ValueError(f"V1 takes half the plain model's heads, so model.num_heads must be even, got {heads}")
    shapes: dict[str, ModelConfig] = {
        "plain": as_variant(model, "softmax", heads),
        "v1": as_variant(model, "diff", heads // 2),
        "v2": as_variant(model, "diff_v2", heads, mlp_ratio=model.mlp_ratio - 0.5),
    }
    scale = dataclasses.replace(recipe.scale, workers=1)
    return {arm: dataclasses.replace(recipe, model=shape, scale=scale) for arm, shape in shapes.items()}


def train_arms(recipe: RunConfig, seeds: int, room: ArmRoom, report: Report) -> list[str]:
    """Train every arm under seeds 0, 1, …, as `<recipe.storage>/<arm>-seed<k>`; their locations, the plain ViT's first.

    Args:
        recipe: of all of them; its variant only says how many heads are meant.
        seeds: runs of each arm.
        room: what each takes, and how many go side by side.
        report: hears of progress.

    Raises:
        ValueError: the arms cannot be trained as asked, or no node for them came up.
        RunStopped: some could not be trained; the others are, and the same call goes on.
    """
    if recipe.init.weights:
        raise ValueError(
            "init.weights must be empty: the arms are compared from scratch, and no weights fit all of them, for V2's "
            "MLP gives up what its queries take"
        )
    dataset = open_dataset(recipe.data)
    configs = [
        resolve(dataclasses.replace(arm, name=f"{name}-seed{seed}", seed=seed), dataset)
        for name, arm in arm_configs(recipe).items()
        for seed in range(seeds)
    ]
    images = fingerprint_of(dataset)
    for config in configs:  # those that are trained already too
        earlier = begun(config)
        if earlier is not None and (differing := differing_fields(earlier, config)):
            raise ValueError(
                f"{config.location} was trained by another config; choose another --out:{listed(differing)}"
            )
        require_same_images(Storage(config.location), images, config.data.path)
    if not recipe.is_remote:
        recipe.folder.parent.mkdir(parents=True, exist_ok=True)  # other nodes are to see it
    needs = room.needs(recipe)
    limit = _limit(recipe, needs, len(configs))
    data = ray.put(dataset)
    options = {"num_cpus": needs["CPU"], "num_gpus": needs.get("GPU", 0), "max_retries": recipe.scale.max_failures}
    train_arm = ray.remote(**options)(_train_arm)
    # seed by seed, so that a comparison that is cut has whole seeds
    waiting = sorted(range(len(configs)), key=lambda place: configs[place].seed)
    running: dict[Any, RunConfig] = {}
    stopped: list[str] = []
    told: set[str] = set()
    report("training", 0, len(configs))
    while waiting or running:
        while waiting and len(running) < (room.concurrent or limit):
            chosen = configs[waiting.pop(0)]
            running[train_arm.remote(to_json(chosen), data, room.decoders)] = chosen
        (done,), _ = ray.wait(list(running), num_returns=1)
        finished = running.pop(done)
        reason, messages = _outcome(done)
        for message in messages:
            if message not in told:
                print(f"{finished.name}: {message}")
            told.add(message)
        if reason:
            stopped.append(f"{finished.name}: {reason}")
        report("training", len(configs) - len(waiting) - len(running), len(configs))
    if stopped:
        raise RunStopped(f"{len(stopped)} of {len(configs)} runs stopped: {'; '.join(stopped)}")
    return [arm.location for arm in configs]


def _limit(recipe: RunConfig, needs: dict[str, float], runs: int) -> int:
    """How many of the runs can go side by side. Waits for a first node where an autoscaler brings them."""
    if can_grow():
        wait_for_nodes([needs], 60 * recipe.scale.wait_minutes, print)
    require_packages(print)
    has = ray.cluster_resources()
    for kind, amount in needs.items():
        if has.get(kind, 0) < amount:
            remedy = "leave --scale.gpu out" if kind == "GPU" else "take fewer --decoders"
            raise ValueError(f"each arm needs {amount:g} {kind}; the cluster has {has.get(kind, 0):g}; {remedy}")
    room = int(min(has[kind] / amount + 1e-6 for kind, amount in needs.items()))
    return runs if can_grow() else room  # those that wait are what the autoscaler brings nodes for


def _train_arm(config: str, dataset: Dataset, decoders: int = 0) -> tuple[str | None, list[str]]:
    """Train one run; why it stopped, or None, and what it had to say."""
    run = from_json(config, "arm")
    if not run.is_remote and not Path(run.storage).is_dir():
        blind = f"its node does not see {run.storage}; --storage must be a folder that every node sees, or an s3:// URL"
        return blind, []
    torch.set_num_threads(1)  # many runs share a machine, one to a CPU
    with closing(Notes(run.location)) as notes:
        try:
            train_alone(run, dataset, notes.publish, decoders=decoders)
        except (RunStopped, ValueError, StorageError, OSError) as stop:
            return str(stop), notes.messages
        return None, notes.messages


def _outcome(done: Any) -> tuple[str | None, list[str]]:
    """What `_train_arm` returned; a lost process is a reason too, and does not end the others."""
    try:
        outcome: tuple[str | None, list[str]] = ray.get(done)
    except RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return (lines[-1] if isinstance(error, RayTaskError) else lines[0]), []
    return outcome
