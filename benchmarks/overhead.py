"""What Ray costs, start-up left out: `pretrain.py` beside a plain PyTorch loop, in speed and in accuracy by time.

All train the model of a recipe with the same decoding, augmentation, optimiser and options of DDP, for the same epochs,
and evaluate all test images after each, which each keeps decoded. What differs is all that stands between: the stream,
the checkpoints and the recording. The plain loop is measured in two forms: two ranks whose gradients are averaged, as
in `pretrain.py`, each of which decodes for itself; and one process with as many threads, for which others decode. In
turn.

Seconds are those of `curves.py`, to the end of the last evaluation. `pretrain.py`'s begin before its first images come,
a plain loop's with its first step. Images/s are those of all epochs but the first, evaluations and checkpoints
included. The stream decodes ahead, so what it did for later epochs in the first one is missing there, and not in the
seconds of the whole.

    python benchmarks/overhead.py --plot docs/overhead.png
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import tyro
from curves import Curve, draw, run_job, run_ranks
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from diffvit.config import RunConfig, to_json
from diffvit.data.datasets import Split, open_dataset
from diffvit.data.images import decode_image, eval_transform, normalize, train_transform
from diffvit.models.vit import VisionTransformer
from diffvit.recipes import RECIPES
from diffvit.training.optim import build_optimizer, build_schedule
from diffvit.training.resolve import resolve

EVAL_BATCH = 250


@dataclass(frozen=True)
class Options:
    """What to measure."""

    recipe: str = "sample"
    """One that neither mixes images nor repeats or averages anything: the plain loop does not."""
    data_path: str = ""
    """Empty: the recipe's."""
    epochs: int = 0
    """Of each run; 0 for the recipe's."""
    rounds: int = 3
    """Each measures all, the first to go changing, under another seed."""
    cores: int = 2
    """Ranks of pretrain.py and of the plain loop, or threads of the latter."""
    plot: str = ""
    """File for the curves, .png or .svg."""


@dataclass(frozen=True)
class Plain:
    """A form of the plain loop."""

    ranks: int
    threads: int
    decoders: int


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    config = config_of(options)
    console = Console(width=110, highlight=False)
    cores = options.cores
    plain = f"plain, {cores} ranks"
    ways: dict[str, Callable[[RunConfig], Curve]] = {
        "diffvit": train_by_job,
        plain: partial(train_plain, form=Plain(cores, 1, 0)),
        f"plain, {cores} threads": partial(train_plain, form=Plain(1, cores, cores)),
    }
    names = list(ways)
    steps = len(open_dataset(config.data).train) // config.optim.batch_size
    trained = (config.optim.epochs - 1) * steps * config.optim.batch_size
    curves: dict[str, list[Curve]] = {name: [] for name in names}
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            curve = ways[name](replace(config, seed=number))
            (started, _), (seconds, accuracy) = curve[0], curve[-1]
            speed = trained / (seconds - started)
            curves[name].append(curve)
            speeds[name].append(speed)
            console.print(f"round {number + 1}: {name} {speed:,.0f} images/s, {accuracy:.2f} % after {seconds:.1f} s")
    title = f"{options.recipe}, {config.optim.epochs} epochs, {platform.machine()}"
    table = Table("", "images/s after epoch 1", f"to {plain}", "seconds", f"to {plain}", "top-1, %", title=title)
    for name in names:
        lasted, theirs = ([curve[-1][0] for curve in curves[way]] for way in (name, plain))
        table.add_row(
            name,
            f"{statistics.median(speeds[name]):,.0f}",
            ratios(speeds[name], speeds[plain]),
            f"{statistics.median(lasted):.1f}",
            ratios(lasted, theirs),
            f"{statistics.mean(curve[-1][1] for curve in curves[name]):.2f}",
        )
    console.print(table)
    if options.plot:
        draw(curves, lowest=50, scale="linear").savefig(options.plot, dpi=120)


def ratios(ours: list[float], theirs: list[float]) -> str:
    """Of the two in each round: median, least and most."""
    found = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})"


def config_of(options: Options) -> RunConfig:
    """The run that all train."""
    config = RECIPES[options.recipe]()
    augment, optim = config.augment, config.optim
    if augment.mixup or augment.cutmix or augment.repeats > 1 or optim.ema_decay or config.init.weights:
        raise SystemExit(
            f"recipe must be without mixup, cutmix, repeats, ema_decay and init.weights, which the plain loop lacks; "
            f"got {options.recipe!r}: take another, such as 'sample'"
        )
    epochs = options.epochs or optim.epochs
    if epochs < 2:
        raise SystemExit(f"epochs must be at least 2, for the speed after the first one, got {epochs}")
    return replace(
        config,
        data=replace(config.data, path=options.data_path or config.data.path),
        optim=replace(optim, epochs=epochs, warmup_epochs=min(optim.warmup_epochs, epochs / 2)),
        scale=replace(config.scale, workers=options.cores, gpu=False),
    )


def train_by_job(config: RunConfig) -> Curve:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(to_json(config))
        return run_job("--config", str(file))[0]


class Decoded(Dataset[tuple[Tensor, int]]):
    """The images of a split as a `DataLoader` wants them."""

    def __init__(self, config: RunConfig, split: Split, transform: Callable[[Tensor], Tensor]) -> None:
        self._split, self._labels, self._transform = split, split.labels, transform
        self._channels, self._max_pixels = config.model.in_channels, config.data.max_pixels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        (encoded,) = self._split.read_many(np.array([index]))
        assert isinstance(encoded, bytes)
        return self._transform(decode_image(encoded, self._channels, self._max_pixels)), int(self._labels[index])


def train_plain(config: RunConfig, form: Plain) -> Curve:
    curve = run_ranks(_train_plain, config, form, ranks=form.ranks, threads=form.threads)
    return [(seconds, accuracy) for seconds, accuracy in curve]


def _train_plain(rank: int, config: RunConfig, form: Plain) -> Curve:
    dataset = open_dataset(config.data)
    config = resolve(config, dataset)
    torch.manual_seed(config.seed)
    model = VisionTransformer(config.model)
    replica: nn.Module = model
    if form.ranks > 1:  # with the options that `diffvit.training.step` has
        replica = DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)
    train = Decoded(config, dataset.train, train_transform(config.augment, config.model.image_size))
    val = Decoded(config, dataset.val, eval_transform(config.augment, config.model.image_size))
    sampler: DistributedSampler[tuple[Tensor, int]] = DistributedSampler(
        train, form.ranks, rank, seed=config.seed, drop_last=True
    )
    batch_size = config.optim.batch_size // form.ranks
    kept: dict[str, Any] = {"num_workers": form.decoders, "persistent_workers": form.decoders > 0}
    loader = DataLoader(train, batch_size, sampler=sampler, drop_last=True, **kept)
    val_loader = DataLoader(Subset(val, range(rank, len(val), form.ranks)), EVAL_BATCH, **kept)
    optimizer = build_optimizer(model, config.optim)
    schedule = build_schedule(optimizer, config.optim, len(loader))
    loss_of = nn.CrossEntropyLoss(label_smoothing=config.optim.label_smoothing)
    curve, began = [], 0.0
    tested: list[tuple[Tensor, Tensor]] = []
    for epoch in range(config.optim.epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            began = began or time.perf_counter()
            loss = loss_of(replica(normalize(images, config.data.mean, config.data.std)), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        tested = tested or list(val_loader)  # once, and then kept, as `pretrain.py` does
        accuracy = top1(model, tested, config)
        curve.append((time.perf_counter() - began, accuracy))
    return curve


@torch.no_grad()
def top1(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], config: RunConfig) -> float:
    """In per cent, over the images of all ranks."""
    model.eval()
    sums = torch.zeros(2)
    for images, labels in batches:
        found = model(normalize(images, config.data.mean, config.data.std)).argmax(1)
        sums += torch.tensor([(found == labels).sum(), len(labels)])
    model.train()
    dist.all_reduce(sums)
    return 100 * float(sums[0] / sums[1])


if __name__ == "__main__":
    main()
