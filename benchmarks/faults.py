"""What checkpoints and interruptions cost.

Measured, in one run: the time of training steps without checkpoints, with one written beside training every
`--every-seconds`, and with the same ones written while training waits; then seconds lost, from `results.json`, by a run
whose process is killed (SIGKILL) and started again.

    python benchmarks/faults.py
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro
from rich.console import Console
from rich.table import Table

from diffvit.config import CheckpointConfig, RunConfig, from_json, to_json
from diffvit.data.loader import BatchLoader
from diffvit.data.order import TrainPlan
from diffvit.data.sources import open_dataset
from diffvit.models.vit import VisionTransformer
from diffvit.recipes import RECIPES
from diffvit.training.alone import train_alone
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
    round_seconds: float = 6.0
    """Training time of each way in a round."""
    every_seconds: float = 3.0
    """Between checkpoints."""
    kills: int = 3
    """Times the run is killed."""
    gpu: bool = False
    """Train on the GPU."""
    child: str = ""
    """Set in the processes that are killed: the config they train."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.child:
        config = from_json(options.child, "--child")
        train_alone(config, open_dataset(config.data))
        return
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
    seconds: dict[str, list[float]] = {"none": [], "beside training": [], "training waits": []}
    handing_over: list[float] = []
    with TemporaryDirectory() as folder:
        writer = CheckpointWriter(CheckpointStore(folder, CheckpointConfig()), 1, print)
        for round_number in range(options.rounds + 1):
            for way, found in seconds.items():
                steps, started = 0, time.perf_counter()
                saved = started
                while (now := time.perf_counter()) - started < options.round_seconds:
                    take_step(config, plan, model, state, iter((batch,)), sums, 0, device)
                    steps += 1
                    if way != "none" and now - saved >= options.every_seconds:
                        saved = time.perf_counter()
                        writer.submit(take_snapshot(state, config, {"epoch": 1}))
                        if way == "training waits":
                            writer.wait()
                        elif round_number:
                            handing_over.append(time.perf_counter() - saved)
                sums.read()  # waits for the device
                if round_number:  # the first one warms up
                    found.append((time.perf_counter() - started) / steps)
                writer.wait()
        writer.close()
    table = Table("checkpoints", "ms a step", f"to none, one every {options.every_seconds:g} s", "at one a minute")
    for way, found in seconds.items():
        ratio = statistics.median(mine / base for mine, base in zip(found, seconds["none"], strict=True))
        a_minute = 100 * (ratio - 1) * options.every_seconds / 60
        table.add_row(way, f"{1000 * statistics.median(found):.2f}", f"{ratio:.3f}", f"{a_minute:+.3f} %")
    console.print(table)
    console.print(
        f"handing one over stops training for {1000 * statistics.median(handing_over):.1f} ms (median of "
        f"{len(handing_over)})"
    )


def measure_kills(options: Options, console: Console) -> None:
    rng = random.Random(0)
    with TemporaryDirectory() as storage:
        optim = replace(sample_config().optim, epochs=3)
        checkpoint = CheckpointConfig(every_minutes=options.every_seconds / 60)
        config = replace(sample_config(), name="killed", storage=storage, optim=optim, checkpoint=checkpoint)
        command = [sys.executable, __file__, "--child", to_json(config)]
        for _ in range(options.kills):
            with subprocess.Popen(command) as process:
                time.sleep(rng.uniform(8, 16))
                os.kill(process.pid, signal.SIGKILL)
        subprocess.run(command, check=True)
        results = json.loads((Path(storage) / "killed/results.json").read_text())
    for cut in results["interruptions"]:
        console.print(f"killed: {cut['seconds_lost']} s lost, {cut['steps_repeated']} steps repeated")
    console.print(f"{results['status']} at step {results['last']['step']}, top-1 {results['last']['top1']:.2f} %")


if __name__ == "__main__":
    main()
