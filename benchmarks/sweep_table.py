"""The table of real trainings that `sweep.py` searches: a learning curve for each point of a grid over tune.py's space.

The sample's recipe with a smaller model and fewer images is trained once at every point. A line of the file holds the
top-1 after each epoch on the images that a search is judged by, that of the last epoch on the sample's validation
split, which no search looks at, and the commit. It is written as it grows, and a call that was cut goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console

from diffvit.config import RunConfig, to_json, valid_num_heads
from diffvit.data.datasets import Dataset, open_dataset
from diffvit.data.loader import BatchLoader, LocalStream, plan_run
from diffvit.data.subset import Subset, parted_for_search
from diffvit.recipes import RECIPES
from diffvit.search.config import SearchConfig
from diffvit.search.space import Space
from diffvit.search.trial import score
from diffvit.training.checkpoint_store import CheckpointStore
from diffvit.training.loop import RunStopped, Worker, fit
from diffvit.training.resolve import resolve

Point = tuple[int, Any, float]
"""Heads, lambda_init ('depth' or a constant), learning rate."""
LRS, LAMBDAS = cast(tuple[float, float], Space().lr), cast(tuple[float, float], Space().lambda_init)


@dataclass(frozen=True)
class Grid:
    """What is trained."""

    heads: tuple[int, ...] = ()
    """Head counts of the grid; empty: all that fit."""
    lambdas: int = 5
    """Constants of lambda_init in the grid, from the lowest to the highest of the space, beside the depth schedule."""
    lrs: int = 7
    """Learning rates of the grid, on a log scale."""
    embed_dim: int = 48
    """Width of the model."""
    depth: int = 4
    """Its blocks."""
    images: int = 3000
    """Training images of an epoch; as many as a third of them, but no more than there are, are judged by."""
    epochs: int = 9
    """Of a trial that trains to its end."""

    def points(self, recipe: RunConfig) -> list[Point]:
        heads = self.heads or valid_num_heads(recipe.model.embed_dim, recipe.model.variant)
        constants = [round(float(value), 6) for value in np.linspace(*LAMBDAS, self.lambdas)]
        lrs = [float(f"{value:.6g}") for value in np.geomspace(*LRS, self.lrs)]
        return list(product(heads, ["depth", *constants], lrs))


@dataclass(frozen=True)
class Training:
    """One point of the grid, trained to its end."""

    top1: tuple[float, ...]
    """Percent after each epoch, on what a search is judged by; shorter where its loss was not finite any more."""
    test_top1: float | None
    """Percent on the validation split after the last epoch; None where it did not come to that."""
    commit: str


@dataclass(frozen=True)
class Task:
    """The recipe, the images that it trains on and is judged by, and those that it is scored on in the end."""

    recipe: RunConfig
    parted: Dataset
    scored: Dataset

    @staticmethod
    def of(grid: Grid) -> Task:
        whole = open_dataset(RECIPES["sample"]().data)
        parted = parted_for_search(whole, SearchConfig().holdout, 0)
        train, val = np.arange(grid.images), np.arange(min(len(parted.val), max(grid.images // 3, 1)))
        parted = dataclasses.replace(parted, train=Subset(parted.train, train), val=Subset(parted.val, val))
        return Task(resolve(_recipe(grid), parted), parted, whole)


def _recipe(grid: Grid) -> RunConfig:
    recipe = RECIPES["sample"]()
    model = dataclasses.replace(recipe.model, embed_dim=grid.embed_dim, depth=grid.depth)
    warmup_epochs = grid.epochs / 6  # 2 of 12, as in the sample's
    optim = dataclasses.replace(recipe.optim, epochs=grid.epochs, warmup_epochs=warmup_epochs)
    return dataclasses.replace(recipe, model=model, optim=optim, scale=dataclasses.replace(recipe.scale, workers=1))


def train_grid(path: Path, grid: Grid, task: Task, console: Console) -> dict[Point, Training]:
    """Every point of the grid; what the file at `path` holds is not trained again."""
    recipe = json.loads(to_json(dataclasses.replace(task.recipe, storage="")))
    made_with = {"images": grid.images, "judged_by": len(task.parted.val), "recipe": recipe}
    points, known = grid.points(task.recipe), dict(_read(path, made_with))
    missing = [point for point in points if point not in known]
    console.print(f"{len(points)} points, {len(missing)} of them to train", style="dim")
    started, commit = time.process_time(), _commit()
    with path.open("a") as file:
        if not file.tell():
            file.write(json.dumps(made_with) + "\n")
        for point in missing:
            known[point] = _train(_at(task.recipe, point), task, commit)
            file.write(json.dumps({"point": point, **dataclasses.asdict(known[point])}) + "\n")
            file.flush()
    if missing:
        console.print(f"{(time.process_time() - started) / len(missing):.1f} s of CPU time a training", style="dim")
    return {point: known[point] for point in points}


def _read(path: Path, made_with: dict[str, Any]) -> Iterator[tuple[Point, Training]]:
    if not path.exists() or not path.stat().st_size:
        return
    whole, _, cut = path.read_bytes().rpartition(b"\n")
    os.truncate(path, path.stat().st_size - len(cut))
    first, *lines = whole.decode().splitlines()
    if json.loads(first) != made_with:
        raise SystemExit(f"error: {path} was made with {first}; choose another --table")
    for line in lines:
        entry = json.loads(line)
        heads, lambda_init, lr = entry["point"]
        yield (heads, lambda_init, lr), Training(tuple(entry["top1"]), entry["test_top1"], entry["commit"])


def _at(recipe: RunConfig, point: Point) -> RunConfig:
    heads, lambda_init, lr = point
    model = dataclasses.replace(recipe.model, num_heads=heads, lambda_init=lambda_init)
    return dataclasses.replace(recipe, model=model, optim=dataclasses.replace(recipe.optim, lr=lr))


def _train(config: RunConfig, task: Task, commit: str) -> Training:
    curve: list[float] = []

    def report(metrics: dict[str, Any]) -> None:
        if "top1" in metrics:
            curve.append(float(metrics["top1"]))

    plan, eval_plan = plan_run(config, task.parted)
    stream = LocalStream(BatchLoader(config, task.parted.train, plan), BatchLoader(config, task.parted.val, eval_plan))
    test_top1 = None
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(RunStopped):  # a trial that failed
        config = dataclasses.replace(config, storage=folder)
        store = CheckpointStore(config.folder, config.checkpoint)
        fit(config, plan, eval_plan, stream, Worker(torch.device("cpu"), report, lambda *_: None, store=store))
        test_top1 = score(to_json(config), task.scored, str(config.folder))["top1"]
    return Training(tuple(curve), test_top1, commit)


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
