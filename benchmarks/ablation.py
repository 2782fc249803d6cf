"""What the options of V1, and Muon, do to a small model: one recipe with one thing changed, under several seeds.

Each run is whole, in a process of its own on one CPU, as many side by side as there are; accuracy is that after the
last epoch. Differences are to the recipe as it is, under the same seed.

    python benchmarks/ablation.py
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from diffvit.config import RunConfig
from diffvit.data.datasets import open_dataset
from diffvit.recipes import RECIPES
from diffvit.training.alone import train_alone
from diffvit.training.resolve import resolve

AS_IT_IS = "the recipe"
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    AS_IT_IS: {},
    "attention without bias": {"model": {"qkv_bias": False, "proj_bias": False}},
    "LayerNorm for RMSNorm": {"model": {"head_norm": "layer"}},
    "lambda kept in [0, 1]": {"model": {"lambda_max": 1.0}},
    "lambda_init 0.8 in every layer": {"model": {"lambda_init": 0.8}},
    "4 register tokens": {"model": {"reg_tokens": 4}},
    "Muon for AdamW": {"optim": {"optimizer": "muon"}},
}
"""Fields of the config's sections, by what is said of them."""


@dataclass(frozen=True)
class Options:
    """What to train."""

    recipe: str = "sample"
    """A V1."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of every row."""
    epochs: int = 0
    """Of each run; 0 for the recipe's."""
    processes: int = os.cpu_count() or 1
    """Runs side by side."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console(width=110, highlight=False)
    names = list(CHANGES) * len(options.seeds)
    seeds = [seed for seed in options.seeds for _ in CHANGES]
    found: dict[str, list[float]] = {name: [] for name in CHANGES}
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        for name, seed, top1 in zip(names, seeds, pool.map(partial(trained, options), names, seeds), strict=True):
            found[name].append(top1)
            console.print(f"{name}, seed {seed}: {top1:.2f} %")
    console.print(table(found, options))


def trained(options: Options, name: str, seed: int) -> float:
    """Top-1 in per cent."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as storage:
        config = replace(config_of(options, name), seed=seed, storage=storage, name="run")
        dataset = open_dataset(config.data)
        return float(train_alone(resolve(config, dataset), dataset)["last"]["top1"])


def config_of(options: Options, name: str) -> RunConfig:
    config = RECIPES[options.recipe]()
    if options.epochs:
        warmup = min(config.optim.warmup_epochs, options.epochs / 2)
        config = replace(config, optim=replace(config.optim, epochs=options.epochs, warmup_epochs=warmup))
    sections: dict[str, Any] = {
        section: replace(getattr(config, section), **fields) for section, fields in CHANGES[name].items()
    }
    return replace(config, **sections)


def table(found: dict[str, list[float]], options: Options) -> Table:
    """Mean and standard deviation over the seeds, and of the differences to the recipe."""
    shown = Table("", "top-1, %", "difference", *[f"seed {seed}" for seed in options.seeds], title=options.recipe)
    for name, values in found.items():
        differences = [value - base for value, base in zip(values, found[AS_IT_IS], strict=True)]
        said = "" if name == AS_IT_IS else mean_and_deviation(differences, "+")
        shown.add_row(name, mean_and_deviation(values), said, *[f"{value:.2f}" for value in values])
    return shown


def mean_and_deviation(values: list[float], sign: str = "") -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{deviation}"


if __name__ == "__main__":
    main()
