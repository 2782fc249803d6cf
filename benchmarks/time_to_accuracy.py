"""Seconds of training to 90 % test top-1 on Fashion-MNIST: the recipe `fashion-mnist-fast` beside a public small ViT.

The peer is s-chh's PyTorch-Scratch-Vision-Transformer-ViT (commit 5d66670): its model, 210,058 parameters, and its
hyperparameters, in a plain loop below; its own loop decodes every image in every epoch, this one keeps the whole set as
a tensor and crops and flips batches, so that it waits for no data. Ours is `pretrain.py` as anyone would run it: Ray,
two workers, images decoded again in every epoch, checkpoints and evaluations. Both have the same number of cores, the
peer as ranks that average their gradients: threads serve a model this small badly.

Both evaluate all test images after every epoch; the seconds are those of `curves.py`, up to the end of the first epoch
whose evaluation reaches the target.

    python ray_jobs/prepare.py --source torchvision:FashionMNIST --root DIR --out fashion-mnist
    python benchmarks/time_to_accuracy.py --data-path fashion-mnist --plot docs/time-to-accuracy.png
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from curves import Curve, draw, run_job, run_ranks
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffvit.config import DataConfig
from diffvit.data.datasets import Split, open_dataset
from diffvit.data.images import decode_image

SIDE, PATCH, WIDTH, HEADS, DEPTH, DROPOUT = 28, 4, 64, 4, 6, 0.1
EPOCHS, WARMUP_EPOCHS, BATCH, FIRST_LR, LR, LAST_LR, WEIGHT_DECAY = 200, 10, 128, 5e-5, 5e-4, 1e-5, 1e-3
"""s-chh's."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    data_path: str
    """Fashion-MNIST as prepare.py leaves it."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each trains both; ours goes first for the even ones."""
    target: float = 90.0
    """Test top-1 in per cent."""
    recipe: str = "fashion-mnist-fast"
    """Ours."""
    cores: int = 2
    """Workers of ours, ranks of the peer's, one thread each; must divide 128, the peer's batch."""
    peer_seconds: float = math.inf
    """The peer gives up after the epoch in which so many have passed, or after its 200 epochs."""
    plot: str = ""
    """File for the curves, .png or .svg."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.cores < 1 or BATCH % options.cores:
        raise SystemExit(f"cores must divide the peer's batch of {BATCH}, got {options.cores}")
    console = Console(width=110, highlight=False)
    ways: dict[str, Callable[[Options, int], Curve]] = {"diffvit": train_ours, "s-chh's ViT": train_peer}
    curves: dict[str, list[Curve]] = {name: [] for name in ways}
    for seed in options.seeds:
        for name in sorted(ways, reverse=bool(seed % 2)):
            curves[name].append(ways[name](options, seed))
            console.print(f"seed {seed}: {name} {_said(curves[name][-1], options.target)}")
            console.print(*[f"{accuracy:.2f}" for _, accuracy in curves[name][-1]])
    console.print(table(curves, options))
    if options.plot:
        draw(curves, lowest=70, target=options.target).savefig(options.plot, dpi=120)


def train_ours(options: Options, seed: int) -> Curve:
    where = ("--data.path", options.data_path, "--seed", str(seed), "--scale.workers", str(options.cores))
    return run_job(options.recipe, *where)[0]


def train_peer(options: Options, seed: int) -> Curve:
    """Up to the first epoch that reaches the target, or `peer_seconds`."""
    curve = run_ranks(_train_peer, options, seed, ranks=options.cores)
    return [(seconds, accuracy) for seconds, accuracy in curve]


def _train_peer(rank: int, options: Options, seed: int) -> Curve:
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    dataset = open_dataset(DataConfig(path=options.data_path))
    images, labels = in_memory(dataset.train)
    test_images, test_labels = (part[rank :: options.cores] for part in in_memory(dataset.val))
    model = PeerViT(len(dataset.classes))
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    torch.manual_seed(seed * options.cores + rank)  # of crops, flips and dropout
    curve: Curve = []
    dist.barrier()
    started = time.perf_counter()
    for epoch in range(EPOCHS):
        optimizer.param_groups[0]["lr"] = peer_lr(epoch)
        for batch in torch.randperm(len(images), generator=order).split(BATCH)[: len(images) // BATCH]:
            chosen = batch[rank :: options.cores]
            F.cross_entropy(replica(scaled(augmented(images[chosen]))), labels[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
        told = torch.tensor([time.perf_counter() - started])
        dist.broadcast(told, 0)  # so that all ranks end together
        curve.append((float(told), top1(model, test_images, test_labels)))
        if curve[-1][1] >= options.target or curve[-1][0] >= options.peer_seconds:
            break
    return curve


def peer_lr(epoch: int) -> float:
    """Of the epoch, from 0: linear, then cosine, both by the epoch."""
    if epoch < WARMUP_EPOCHS:
        return FIRST_LR + (LR - FIRST_LR) * epoch / (WARMUP_EPOCHS - 1)
    progress = (epoch - WARMUP_EPOCHS) / (EPOCHS - WARMUP_EPOCHS)
    return LAST_LR + (LR - LAST_LR) * (1 + math.cos(math.pi * progress)) / 2


def in_memory(split: Split) -> tuple[Tensor, Tensor]:
    """All images of the split (n, 1, 28, 28), uint8, and their labels (n,)."""
    labels = torch.from_numpy(split.labels.copy())
    encoded: Iterator[bytes | OSError] = split.read_many(torch.arange(len(labels)).numpy())
    return torch.stack([decode_image(e, 1, SIDE**2) for e in encoded if isinstance(e, bytes)]), labels


def augmented(images: Tensor) -> Tensor:
    """RandomCrop(28, padding=2) and RandomHorizontalFlip, for a batch (B, 1, 28, 28)."""
    padded = F.pad(images[:, 0], [2] * 4)
    top, left = torch.randint(0, 5, (2, len(images), 1))
    rows, columns = top + torch.arange(SIDE), left + torch.arange(SIDE)
    columns = torch.where(torch.rand(len(images), 1) < 0.5, columns, columns.flip(1))
    return padded[torch.arange(len(images)).view(-1, 1, 1), rows.unsqueeze(2), columns.unsqueeze(1)].unsqueeze(1)


def scaled(images: Tensor) -> Tensor:
    return images.float().div_(127.5).sub_(1)


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In per cent, over the images of all ranks."""
    model.eval()
    sums = torch.tensor([0, len(labels)])
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        sums[0] += (model(scaled(x)).argmax(1) == y).sum()
    model.train()
    dist.all_reduce(sums)
    return 100 * float(sums[0] / sums[1])


class PeerViT(nn.Module):
    """s-chh's: positions on the patches alone, a class token, dropout after each branch, a head of two layers."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, (SIDE // PATCH) ** 2, WIDTH))
        self.dropout = nn.Dropout(DROPOUT)
        self.blocks = nn.Sequential(*[PeerBlock() for _ in range(DEPTH)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, classes))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for parameter in (self.class_token, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        x = self.dropout(torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1))
        scores: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return scores


class PeerBlock(nn.Module):
    """Attention and an MLP twice as wide, normalised before."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.proj(attended))
        out: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return out


def seconds_to(curve: Curve, target: float) -> float | None:
    return next((seconds for seconds, accuracy in curve if accuracy >= target), None)


def _said(curve: Curve, target: float) -> str:
    reached = seconds_to(curve, target)
    end = f"{len(curve)} epochs, {curve[-1][0]:.1f} s, {curve[-1][1]:.2f} % in the last"
    return f"{target:g} % {'not reached' if reached is None else f'after {reached:.1f} s'} ({end})"


def table(curves: dict[str, list[Curve]], options: Options) -> Table:
    """Seconds to the target by seed, their mean and standard deviation, and the ratio of the means to ours.

    A curve that does not reach it counts with the seconds it lasted: the figure, and what follows from it, is then a
    lower bound, marked >.
    """
    title = f"seconds to {options.target:g} % test top-1, {options.cores} cores"
    shown = Table("", *[f"seed {seed}" for seed in options.seeds], "mean", "sd", "to diffvit", title=title)
    seconds = {
        name: [seconds_to(curve, options.target) or curve[-1][0] for curve in of_seeds]
        for name, of_seeds in curves.items()
    }
    bounds = {
        name: ["" if seconds_to(curve, options.target) else ">" for curve in of_seeds]
        for name, of_seeds in curves.items()
    }
    for name, lasted in seconds.items():
        by_seed = [f"{bound}{s:.1f}" for bound, s in zip(bounds[name], lasted, strict=True)]
        bound = max(bounds[name])
        sd = f"{statistics.stdev(lasted):.1f}" if len(lasted) > 1 and not bound else "-"
        ratio = f"{bound}{statistics.mean(lasted) / statistics.mean(seconds['diffvit']):.2f}"
        shown.add_row(
            name, *by_seed, f"{bound}{statistics.mean(lasted):.1f}", sd, "-" if any(bounds["diffvit"]) else ratio
        )
    return shown


if __name__ == "__main__":
    main()
