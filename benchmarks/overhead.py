"""What Ray costs end to end: training images a second of `pretrain.py` beside a plain PyTorch loop.

Both train the model of a recipe with the same decoding, augmentation and optimiser; what differs is all that stands
between: the stream, two ranks and their gradients and the recording, against a `DataLoader` and one process with as
many threads. Measured in turn, the last epoch of each run. Left out are start-up and, in both, the time between two
epochs: evaluation, and in `pretrain.py` copying the state for a checkpoint; writing the copy, beside training, is in.

    python benchmarks/overhead.py
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from diffvit.config import RunConfig, to_json
from diffvit.data.images import decode_image, normalize, train_transform
from diffvit.data.sources import Split, open_dataset
from diffvit.models.vit import VisionTransformer
from diffvit.recipes import RECIPES
from diffvit.training.launch import resolve
from diffvit.training.optim import build_optimizer, build_schedule

JOB = Path(__file__).parents[1] / "ray_jobs/pretrain.py"


@dataclass(frozen=True)
class Options:
    """What to measure."""

    recipe: str = "sample"
    """One that neither mixes images nor repeats or averages anything: the plain loop does not."""
    data_path: str = ""
    """Empty: the recipe's."""
    epochs: int = 3
    """Of each run; the last one counts."""
    rounds: int = 3
    """Each measures both, the first to go changing."""
    workers: int = 2
    """Ranks of pretrain.py; threads of the plain loop."""
    loaders: int = 2
    """Processes of the plain loop's DataLoader."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    config = config_of(options)
    console = Console(width=110)
    ways = {"diffvit": run_job, "plain PyTorch": run_plain_loop}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds):
        for name in sorted(ways, reverse=bool(number % 2)):
            speeds[name].append(ways[name](config, options))
            console.print(f"round {number + 1}: {name} {speeds[name][-1]:,.0f} images/s")
    table = Table("", "images/s, median", "to the plain loop", title=f"{options.recipe}, {platform.machine()}")
    for name, found in speeds.items():
        ratios = [mine / plain for mine, plain in zip(found, speeds["plain PyTorch"], strict=True)]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        table.add_row(name, f"{statistics.median(found):,.0f}", spread)
    console.print(table)


def config_of(options: Options) -> RunConfig:
    """The run that both train."""
    config = RECIPES[options.recipe]()
    augment, optim = config.augment, config.optim
    if augment.mixup or augment.cutmix or augment.repeats > 1 or optim.ema_decay or config.init.weights:
        raise SystemExit(
            f"recipe must be without mixup, cutmix, repeats, ema_decay and init.weights, which the plain loop lacks; "
            f"got {options.recipe!r}: take another, such as 'sample'"
        )
    return replace(
        config,
        name="measured",
        data=replace(config.data, path=options.data_path or config.data.path),
        optim=replace(optim, epochs=options.epochs, warmup_epochs=0.5, warmup_steps=None),
        scale=replace(config.scale, workers=options.workers, gpu=False),
    )


def run_job(config: RunConfig, _: Options) -> float:
    with TemporaryDirectory() as storage:
        file = Path(storage) / "config.json"
        file.write_text(to_json(replace(config, storage=storage)))
        subprocess.run([sys.executable, str(JOB), "--config", str(file)], check=True, stdout=subprocess.DEVNULL)
        results = json.loads((Path(storage) / "measured/results.json").read_text())
    return float(results["images_per_second"])


class Decoded(Dataset[tuple[Tensor, int]]):
    """The training images as a `DataLoader` wants them."""

    def __init__(self, config: RunConfig, split: Split) -> None:
        self._split, self._labels = split, split.labels
        self._transform = train_transform(config.augment, config.model.image_size)
        self._channels, self._max_pixels = config.model.in_channels, config.data.max_pixels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        (encoded,) = self._split.read_many(np.array([index]))
        assert isinstance(encoded, bytes)
        return self._transform(decode_image(encoded, self._channels, self._max_pixels)), int(self._labels[index])


def run_plain_loop(config: RunConfig, options: Options) -> float:
    torch.set_num_threads(options.workers)
    dataset = open_dataset(config.data)
    config = resolve(config, dataset)
    model = VisionTransformer(config.model)
    loader = DataLoader(
        Decoded(config, dataset.train),
        batch_size=config.optim.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=options.loaders,
        persistent_workers=True,
    )
    optimizer = build_optimizer(model, config.optim)
    schedule = build_schedule(optimizer, config.optim, len(loader))
    loss_of = nn.CrossEntropyLoss(label_smoothing=config.optim.label_smoothing)
    for _ in range(config.optim.epochs):
        started = time.perf_counter()
        for images, labels in loader:
            loss = loss_of(model(normalize(images, config.data.mean, config.data.std)), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        seconds = time.perf_counter() - started
    return len(loader) * config.optim.batch_size / seconds


if __name__ == "__main__":
    main()
