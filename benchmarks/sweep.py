"""What TPE and ASHA find for a number of trained epochs, beside random search that trains every trial to its end.

First a table of real trainings is made: the sample's recipe with a smaller model and fewer images, once for each point
of a grid over `tune.py`'s space (every head count that fits, lambda_init from the depth schedule and constants,
learning rates). The table is written to `--table` as it grows, and a call that was cut goes on. Then the searches are
run on it under many seeds: the sampler, the space and ASHA are those of `tune.py`, one trial at a time, and a trial
that they draw is answered by the learning curve of the nearest grid point, which costs nothing.

Every search starts with the recipe itself, as `tune.py` does. Top-1 is that on the images that the search is judged by.

    python benchmarks/sweep.py                    # 126 trainings of 9 epochs
    python benchmarks/sweep.py --heads 1 2 --lambdas 2 --lrs 3 --epochs 3 --images 640 --table small.jsonl
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import optuna
import torch
import tyro
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler
from rich.console import Console
from rich.table import Table

from diffvit.config import RunConfig, valid_num_heads
from diffvit.data.loader import BatchLoader, LocalStream, plan_run
from diffvit.data.sources import Dataset, open_dataset
from diffvit.data.subset import Subset, parted_for_search
from diffvit.recipes import RECIPES
from diffvit.search.config import SearchConfig
from diffvit.search.sitting import build_asha, build_sampler
from diffvit.search.space import Space
from diffvit.training.launch import resolve
from diffvit.training.loop import RunStopped, Worker, fit

Point = tuple[int, Any, float]
"""Heads, lambda_init ('depth' or a constant), learning rate."""
Curve = list[float]
"""Top-1 in percent after each epoch; shorter where the training ended early because its loss was not finite."""
LRS, LAMBDAS = cast(tuple[float, float], Space().lr), cast(tuple[float, float], Space().lambda_init)
METHODS: dict[str, tuple[Literal["tpe", "random"], bool]] = {
    "random": ("random", False),
    "random + ASHA": ("random", True),
    "TPE": ("tpe", False),
    "TPE + ASHA": ("tpe", True),
}


@dataclass(frozen=True)
class Options:
    """What to train, and how to search it."""

    table: str = "sweep-table.jsonl"
    """Where the trainings are kept."""
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
    trials: int = 24
    """The budget: epochs of so many whole trials."""
    seeds: int = 5
    """Searches by each method."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console(width=110)
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    dataset = _part_of_sample(options.images)
    recipe = resolve(_recipe(options), dataset)
    curves = _trained(options, recipe, dataset, console)
    best = max(top1 for curve in curves.values() for top1 in curve)
    console.print(f"{len(curves)} trainings of {options.epochs} epochs; the best has {best:.2f} % top-1")
    budget = options.trials * options.epochs
    found = {
        name: np.stack([list(search(curves, recipe, name, seed, budget)) for seed in range(options.seeds)])
        for name in METHODS
    }
    _print(found, options, console)


def _part_of_sample(images: int) -> Dataset:
    whole = parted_for_search(open_dataset(RECIPES["sample"]().data), SearchConfig().holdout, 0)
    train, val = np.arange(images), np.arange(min(len(whole.val), max(images // 3, 1)))
    return dataclasses.replace(whole, train=Subset(whole.train, train), val=Subset(whole.val, val))


def _recipe(options: Options) -> RunConfig:
    recipe = RECIPES["sample"]()
    model = dataclasses.replace(recipe.model, embed_dim=options.embed_dim, depth=options.depth)
    warmup_epochs = options.epochs / 6  # 2 of 12, as in the sample's
    optim = dataclasses.replace(recipe.optim, epochs=options.epochs, warmup_epochs=warmup_epochs)
    return dataclasses.replace(recipe, model=model, optim=optim, scale=dataclasses.replace(recipe.scale, workers=1))


def _grid(options: Options, recipe: RunConfig) -> list[Point]:
    heads = options.heads or valid_num_heads(recipe.model.embed_dim, recipe.model.variant)
    constants = [round(float(value), 6) for value in np.linspace(*LAMBDAS, options.lambdas)]
    lrs = [float(f"{value:.6g}") for value in np.geomspace(*LRS, options.lrs)]
    return list(product(heads, ["depth", *constants], lrs))


def _trained(options: Options, recipe: RunConfig, dataset: Dataset, console: Console) -> dict[Point, Curve]:
    """The learning curve of every grid point; what `options.table` holds is not trained again."""
    skipped = ("table", "trials", "seeds", "heads", "lambdas", "lrs")
    identity = {name: value for name, value in dataclasses.asdict(options).items() if name not in skipped}
    path, points = Path(options.table), _grid(options, recipe)
    curves = dict(_read(path, identity))
    console.print(f"{len(points)} points, {sum(point not in curves for point in points)} of them to train", style="dim")
    started, done = time.process_time(), 0
    with path.open("a") as file:
        if not file.tell():
            file.write(json.dumps(identity) + "\n")
        for point in points:
            if point not in curves:
                curves[point] = _train(_at(recipe, point), dataset)
                file.write(json.dumps({"point": point, "top1": curves[point]}) + "\n")
                file.flush()
                done += 1
    if done:
        console.print(f"{(time.process_time() - started) / done:.1f} s of CPU time a training", style="dim")
    return {point: curves[point] for point in points}


def _read(path: Path, identity: dict[str, Any]) -> Iterator[tuple[Point, Curve]]:
    if not path.exists() or not path.stat().st_size:
        return
    whole, _, cut = path.read_bytes().rpartition(b"\n")
    os.truncate(path, path.stat().st_size - len(cut))
    first, *lines = whole.decode().splitlines()
    if json.loads(first) != identity:
        raise SystemExit(f"error: {path} was made with {first}; choose another --table")
    for line in lines:
        entry = json.loads(line)
        heads, lambda_init, lr = entry["point"]
        yield (heads, lambda_init, lr), entry["top1"]


def _at(recipe: RunConfig, point: Point) -> RunConfig:
    heads, lambda_init, lr = point
    model = dataclasses.replace(recipe.model, num_heads=heads, lambda_init=lambda_init)
    return dataclasses.replace(recipe, model=model, optim=dataclasses.replace(recipe.optim, lr=lr))


def _train(config: RunConfig, dataset: Dataset) -> Curve:
    curve: Curve = []

    def report(metrics: dict[str, Any]) -> None:
        if "top1" in metrics:
            curve.append(float(metrics["top1"]))

    plan, eval_plan = plan_run(config, dataset)
    stream = LocalStream(BatchLoader(config, dataset.train, plan), BatchLoader(config, dataset.val, eval_plan))
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(RunStopped):  # a trial that failed
        config = dataclasses.replace(config, storage=folder)
        fit(config, plan, eval_plan, stream, Worker(torch.device("cpu"), report, lambda *_: None))
    return curve


def _nearest(points: Iterable[Point], config: RunConfig) -> Point:
    """The grid point of the same heads and kind of lambda_init with the nearest log learning rate and constant."""
    wanted = config.model.lambda_init

    def distance(point: Point) -> float:
        heads, lambda_init, lr = point
        if heads != config.model.num_heads or (lambda_init == "depth") != (wanted == "depth"):
            return math.inf
        away = 0.0 if wanted == "depth" else (lambda_init - wanted) / (LAMBDAS[1] - LAMBDAS[0])
        return math.hypot(away, math.log(lr / config.optim.lr) / math.log(LRS[1] / LRS[0]))

    return min(points, key=distance)


def search(curves: dict[Point, Curve], recipe: RunConfig, method: str, seed: int, budget: int) -> Iterator[float]:
    """The best top-1 so far after each of `budget` trained epochs."""
    sampler, early_stopping = METHODS[method]
    config = SearchConfig(sampler=sampler)
    space = Space(num_heads=tuple(sorted({heads for heads, _, _ in curves})))
    study = optuna.create_study(direction="maximize", sampler=build_sampler(config, seed))
    own, outside = space.parameters(recipe)
    if not outside:
        study.enqueue_trial(own)
    (bracket,) = build_asha(config, recipe.optim.epochs)._brackets
    best, spent = 0.0, 0
    while spent < budget:
        trial = study.ask()
        curve = curves[_nearest(curves, space.propose(trial, recipe))]
        reached = 0.0
        for epoch, top1 in enumerate(curve, start=1):
            reached = max(reached, top1)
            best, spent = max(best, reached), spent + 1
            yield best
            if spent == budget:
                return
            action = bracket.on_result(SimpleNamespace(trial_id=str(trial.number)), epoch, reached)
            if early_stopping and action == TrialScheduler.STOP:
                study.tell(trial, reached)
                break
        else:
            if len(curve) == recipe.optim.epochs:
                study.tell(trial, reached)
                continue
            study.tell(trial, state=TrialState.FAIL)
            spent += 1  # the epoch in which it failed
            yield best


def _print(found: dict[str, Any], options: Options, console: Console) -> None:
    budget = options.trials * options.epochs
    table = Table("epochs trained", *found, title=f"best top-1 so far, mean ± std of {options.seeds} searches, %")
    for eighth in range(1, 9):
        epochs = max(budget * eighth // 8, 1)
        columns = [column[:, epochs - 1] for column in found.values()]
        table.add_row(str(epochs), *(f"{c.mean():.2f} ± {c.std(ddof=min(1, len(c) - 1)):.2f}" for c in columns))
    console.print(table)
    aim = float(found["random"][:, -1].mean())
    for name, column in found.items():
        reached = np.flatnonzero(column.mean(axis=0) >= aim)
        share = f"{(reached[0] + 1) / budget:.2f} of the budget" if len(reached) else "not reached"
        console.print(f"{name:<14} to random search's {aim:.2f} %: {share}")


if __name__ == "__main__":
    main()
