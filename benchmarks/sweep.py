"""What TPE and ASHA find for a number of trained epochs, beside random search that trains every trial to its end.

First a table of real trainings is made (`sweep_table.py`). Then the searches are run on it under many seeds: the
sampler, the space and ASHA are those of `tune.py`, one trial at a time, and a trial that they draw is answered by the
learning curve of the nearest grid point, which costs nothing. Every search starts with the recipe itself, as `tune.py`
does.

A search sees the best of many noisy readings, which flatters whoever takes more of them. So what counts is the
top-1 on images that no search looks at, after the last epoch, of the point that it would name at that moment.

    python benchmarks/sweep.py --plot docs/sweep-budget.png       # 126 trainings of 9 epochs
    python benchmarks/sweep.py --overhead runs/sample-sweep       # of a sweep's trials beyond their training
    python benchmarks/sweep.py --heads 1 2 --lambdas 2 --lrs 3 --epochs 3 --images 640 --table small.jsonl
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import numpy.typing as npt
import optuna
import torch
import tyro
from ray.tune.schedulers import TrialScheduler
from rich.console import Console
from rich.table import Table
from sweep_plot import Curves, draw
from sweep_table import LAMBDAS, LRS, Grid, Point, Task, Training, train_grid

from diffvit.config import RunConfig
from diffvit.search.config import SearchConfig
from diffvit.search.sitting import build_asha, build_sampler
from diffvit.search.space import Space

METHODS: dict[str, tuple[Literal["tpe", "random"], bool]] = {
    "random": ("random", False),
    "random + ASHA": ("random", True),
    "TPE": ("tpe", False),
    "TPE + ASHA": ("tpe", True),
}

TITLES = {"test_top1": "on images no search looks at", "top1": "as the search reads it"}
"""Of the fields of `Found`."""


@dataclass(frozen=True)
class Options(Grid):
    """What to train, and how to search it."""

    table: str = "sweep-table.jsonl"
    """Where the trainings are kept."""
    trials: int = 24
    """The budget: epochs of so many whole trials."""
    seeds: int = 5
    """Searches by each method."""
    plot: str = ""
    """Where to draw what was found against what was spent, as a PNG."""
    overhead: str = ""
    """A finished sweep's folder: only say what its trials took beyond their training."""


@dataclass(frozen=True)
class Found:
    """What a search has after an epoch of its budget."""

    top1: float
    """The best reading so far."""
    test_top1: float
    """Of the point that had it, trained to its end, on images that no search looks at."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console(width=110)
    if options.overhead:
        print_overhead(Path(options.overhead), console)
        return
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    task = Task.of(options)
    trainings = train_grid(Path(options.table), options, task, console)
    console.print(f"made at commit {', '.join(sorted({training.commit for training in trainings.values()}))}")
    budget = options.trials * options.epochs
    found = {
        name: [list(search(trainings, task.recipe, name, seed, budget)) for seed in range(options.seeds)]
        for name in METHODS
    }
    panels = {
        title: {name: np.array([[getattr(at, field) for at in run] for run in runs]) for name, runs in found.items()}
        for field, title in TITLES.items()
    }
    for title, curves in panels.items():
        _print(curves, title, options, console)
    if options.plot:
        draw(Path(options.plot), panels)


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


def search(
    trainings: Mapping[Point, Training], recipe: RunConfig, method: str, seed: int, budget: int
) -> Iterator[Found]:
    """What is found after each of `budget` trained epochs."""
    sampler, early_stopping = METHODS[method]
    config = SearchConfig(sampler=sampler)
    space = Space(num_heads=tuple(sorted({heads for heads, _, _ in trainings})))
    study = optuna.create_study(direction="maximize", sampler=build_sampler(config, seed))
    own, outside = space.parameters(recipe)
    if not outside:
        study.enqueue_trial(own)
    (bracket,) = build_asha(config, recipe.optim.epochs)._brackets
    best, spent = Found(0.0, 0.0), 0
    while spent < budget:
        trial = study.ask()
        training = trainings[_nearest(trainings, space.propose(trial, recipe))]
        reached = 0.0
        for epoch, top1 in enumerate(training.top1, start=1):
            reached, spent = max(reached, top1), spent + 1
            if reached > best.top1 and training.test_top1 is not None:
                best = Found(reached, training.test_top1)
            yield best
            if spent == budget:
                return
            action = bracket.on_result(SimpleNamespace(trial_id=str(trial.number)), epoch, reached)
            if early_stopping and action == TrialScheduler.STOP:
                study.tell(trial, reached)
                break
        else:
            if training.test_top1 is not None:
                study.tell(trial, reached)
                continue
            study.tell(trial, 0.0)  # as tune.py tells of a trial that diverged
            spent += 1  # the epoch in which it failed
            yield best


def _print(found: Curves, title: str, options: Options, console: Console) -> None:
    budget = options.trials * options.epochs
    table = Table("epochs trained", *found, title=f"top-1 {title}, mean ± std of {options.seeds} searches, %")
    for eighth in range(1, 9):
        epochs = max(budget * eighth // 8, 1)
        table.add_row(str(epochs), *(_spread(curves[:, epochs - 1]) for curves in found.values()))
    console.print(table)
    third = max(budget // 3, 1)
    ours, theirs = found["TPE + ASHA"][:, third - 1], found["random"][:, -1]
    more, error = _mean_and_error(ours - theirs)
    console.print(
        f"TPE + ASHA after {third} epochs has {_spread(ours)} %, random search after {budget} has {_spread(theirs)} %: "
        f"{more:+.2f}, standard error {error:.2f} over {options.seeds} pairs\n"
    )


def _spread(values: npt.NDArray[np.float64]) -> str:
    return f"{values.mean():.2f} ± {values.std(ddof=min(1, len(values) - 1)):.2f}"


def _mean_and_error(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def print_overhead(folder: Path, console: Console) -> None:
    """What a trial of a sweep takes beyond its training, from the sweep's `trials.csv`."""
    with (folder / "trials.csv").open() as file:
        runs = [run for run in csv.DictReader(file) if run["status"] in ("finished", "stopped")]
    for kind in ("trials", "finalists"):
        beyond = [float(run["seconds"]) - float(run["train_seconds"]) for run in runs if run["run"].startswith(kind)]
        if beyond:
            console.print(
                f"{len(beyond)} {kind}: {statistics.fmean(beyond):.1f} s beyond training in the mean, "
                f"{statistics.median(beyond):.1f} s in the median, {max(beyond):.1f} s at most"
            )


if __name__ == "__main__":
    main()
