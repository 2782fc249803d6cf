"""What checkpoints and interruptions cost.

Measured, in one run: the time of training steps without checkpoints, with one written beside training every
`--every-seconds`, and with the same ones written while training waits; then seconds lost, from `results.json`, by a run
of two Ray Train workers of which one is killed (SIGKILL), or whose command is killed and typed again, in turn.

    python benchmarks/faults.py
"""

from __future__ import annotations

import json
import random
import signal
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory

import torch
import tyro
from rich.console import Console
from rich.table import Table
from sitting import Sitting

from diffvit.config import CheckpointConfig, RunConfig
from diffvit.data.datasets import open_dataset
from diffvit.data.loader import BatchLoader
from diffvit.data.order import TrainPlan
from diffvit.models.vit import VisionTransformer
from diffvit.recipes import RECIPES
from diffvit.training.checkpoint import TrainState, take_snapshot
from diffvit.training.checkpoint_store import CheckpointStore
from diffvit.training.checkpoint_writer import CheckpointWriter
from diffvit.training.metrics import Sums
from diffvit.training.optim import build_optimizer, build_schedule
from diffvit.training.step import take_step


@dataclass(frozen=True)
class Options:
    """What to measure."""

    rounds: int = 5
    """Each measures all three ways, in turn."""
    round_seconds: float = 10.0
    """Training time of each way in a round."""
    every_seconds: float = 3.0
    """Between checkpoints."""
    kills: int = 3
    """Times that a worker is killed, and that the command is."""
    gpu: bool = False
    """Train on the GPU."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console(width=110)
    measure_steps(options, console)
    if options.kills:
        measure_kills(options, console)


def sample_config() -> RunConfig:
    config = RECIPES["sample"]()
    classes = open_dataset(config.data).classes
    model = replace(config.model, num_classes=len(classes))
    data = replace(config.data, classes=classes)
    return replace(config, model=model, data=data, scale=replace(config.scale, workers=1))


def measure_steps(options: Options, console: Console) -> None:
    config = sample_config()
    device = torch.device("cuda" if options.gpu else "cpu")
    dataset = open_dataset(config.data)
    plan = TrainPlan(len(dataset.train), 0, config.optim.epochs, config.optim.batch_size)
    batch = BatchLoader(config, dataset.train, plan)(0)
    model = VisionTransformer(config.model).to(device)
    optimizer = build_optimizer(model, config.optim)
    state = TrainState(model, optimizer, build_schedule(optimizer, config.optim, plan.steps_per_epoch), None)
    sums = Sums(device)
    rounds: dict[str, list[Round]] = {"none": [], "beside training": [], "training waits": []}
    with TemporaryDirectory() as folder:
        writer = CheckpointWriter(CheckpointStore(folder, CheckpointConfig()), 1, print)
        for round_number in range(options.rounds + 1):
            for way, found in rounds.items():
                steps, saved, handing_over = 0, 0, 0.0
                started = time.perf_counter()
                while (now := time.perf_counter()) - started < options.round_seconds:
                    take_step(config, plan, model, state, iter((batch,)), sums, 0, device)
                    steps += 1
                    if way != "none" and now - started >= (saved + 1) * options.every_seconds:
                        writer.submit(take_snapshot(state, config, {"epoch": 1}))
                        if way == "training waits":
                            writer.wait()
                        handing_over += time.perf_counter() - now
                        saved += 1
                sums.read()  # waits for the device
                if round_number:  # the first one warms up
                    found.append(Round(time.perf_counter() - started, steps, saved, handing_over))
                writer.wait()
        writer.close()
    show_steps(rounds, options, console)


@dataclass(frozen=True)
class Round:
    """Steps, and checkpoints among them."""

    seconds: float
    steps: int
    saved: int
    handing_over_seconds: float

    def seconds_each(self, base: Round) -> float:
        """What a checkpoint adds to the time that `base`, without any, takes for as many steps."""
        return (self.seconds - self.steps * base.seconds / base.steps) / max(self.saved, 1)


def show_steps(rounds: dict[str, list[Round]], options: Options, console: Console) -> None:
    table = Table("checkpoints", "ms a step", "a checkpoint costs", "of which handing over", "at one a minute")
    for way, found in rounds.items():
        step = statistics.median(1000 * mine.seconds / mine.steps for mine in found)
        each = [mine.seconds_each(base) for mine, base in zip(found, rounds["none"], strict=True)]
        cost, over = (
            statistics.median(each),
            statistics.median(mine.handing_over_seconds / max(mine.saved, 1) for mine in found),
        )
        costs = (f"{1000 * cost:.0f} ms", f"{1000 * over:.0f} ms", f"{100 * cost / 60:+.3f} %") if way != "none" else ()
        table.add_row(way, f"{step:.2f}", *costs)
    console.print(table)
    saved = sum(mine.saved for mine in rounds["beside training"])
    console.print(f"{saved} checkpoints of each kind, one every {options.every_seconds:g} s; medians of the rounds")


def measure_kills(options: Options, console: Console) -> None:
    rng = random.Random(0)
    config = sample_config()
    with TemporaryDirectory() as storage, ExitStack() as sittings:
        config = replace(
            config,
            name="killed",
            storage=storage,
            optim=replace(config.optim, epochs=5 * options.kills),
            checkpoint=CheckpointConfig(every_minutes=options.every_seconds / 60),
            scale=replace(config.scale, workers=2, max_failures=options.kills),
        )
        sitting = sittings.enter_context(Sitting(config))
        for number in range(2 * options.kills):
            sitting.wait_for_checkpoint(number)
            time.sleep(rng.uniform(0, options.every_seconds))
            if number % 2:
                sitting.end(signal.SIGKILL)
                sitting = sittings.enter_context(Sitting(config))
            else:
                sitting.kill_a_worker()
        sitting.wait()
        results = json.loads((config.folder / "results.json").read_text())
    for number, cut in enumerate(results["interruptions"]):
        killed = "command" if number % 2 else "worker"
        console.print(f"{killed:<7} killed: {cut['seconds_lost']:5.1f} s lost, {cut['steps_repeated']} steps repeated")
    console.print(f"{results['status']} at step {results['last']['step']}, top-1 {results['last']['top1']:.2f} %")


if __name__ == "__main__":
    main()
