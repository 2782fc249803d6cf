"""A plain ViT that becomes differential, beside training from scratch: the same images, steps and rate for every arm.

The sample recipe's plain ViT is trained on five classes of Fashion-MNIST (all 30,000 images of trouser, dress, sandal,
sneaker, boot) and goes on with the five others (1,000 images of each of T-shirt, pullover, coat, shirt, bag; all 5,000
test images) as each of the arms. Runs that are finished are not repeated, so seeds can be trained side by side, and one
more call with all of them prints the table.

    apt-get install dataset-fashion-mnist
    python benchmarks/convert.py --out convert --seeds 0 1 2
"""

from __future__ import annotations

import dataclasses
import gzip
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from diffvit.analysis.curves import read_curves
from diffvit.config import InitConfig, RunConfig
from diffvit.data.datasets import open_dataset
from diffvit.models.pretrained import model_from, origin_of
from diffvit.recipes import sample_vit
from diffvit.training.alone import train_alone
from diffvit.training.resolve import resolve

FIRST, THEN = (1, 3, 5, 7, 9), (0, 2, 4, 6, 8)
"""Labels that the plain ViT is trained on before, and those that the arms are compared on."""
IMAGES_OF_A_CLASS = 1000
"""That the arms see; the plain ViT has seen 6,000 of each of its own."""
ARMS = {
    "plain ViT, goes on": ("softmax", True, 0.0),
    "becomes V1": ("diff", True, 0.0),
    "becomes V2, gate open at once": ("diff_v2", True, 0.0),
    "becomes V2, gate opens": ("diff_v2", True, 0.5),
    "plain ViT from scratch": ("softmax", False, 0.0),
    "V2 from scratch": ("diff_v2", False, 0.0),
}
"""Variant, whether it starts from the plain ViT, and the share of its steps over which the gate opens."""


@dataclass(frozen=True)
class Options:
    """What to train."""

    out: str = "convert"
    """Folder of the images and the runs."""
    source: str = "/usr/share/datasets/fashion-mnist"
    """Folder of Fashion-MNIST's four .gz files."""
    seeds: tuple[int, ...] = (0, 1, 2)
    first_epochs: int = 3
    """Of the plain ViT on its five classes."""
    epochs: int = 8
    """Of each arm."""
    lr: float = 1e-3
    """Of every run."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    out = Path(options.out).absolute()
    for name, labels, most in (("first", FIRST, None), ("then", THEN, IMAGES_OF_A_CLASS)):
        if not (out / name).exists():
            write_folder(Path(options.source), out / name, labels, most)
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in options.seeds:
        plain = run_config(options, "first", f"plain-{seed}", seed, options.first_epochs)
        train(plain)
        for number, arm in enumerate(ARMS):
            config = run_config(options, "then", f"arm{number}-{seed}", seed, options.epochs)
            found[arm].append(train(as_arm(config, arm, plain)))
    show(found)


def run_config(options: Options, data: str, name: str, seed: int, epochs: int) -> RunConfig:
    recipe, out = sample_vit(), Path(options.out).absolute()
    return dataclasses.replace(
        recipe,
        name=name,
        storage=str(out / "runs"),
        seed=seed,
        data=dataclasses.replace(recipe.data, path=str(out / data)),
        optim=dataclasses.replace(recipe.optim, epochs=epochs, lr=options.lr, warmup_epochs=1),
        scale=dataclasses.replace(recipe.scale, workers=1),
    )


def as_arm(config: RunConfig, arm: str, plain: RunConfig) -> RunConfig:
    """V2 has the plain ViT's MLP, since it is to take it over, and so more parameters."""
    variant, converts, opening = ARMS[arm]
    steps = config.optim.epochs * (len(THEN) * IMAGES_OF_A_CLASS // config.optim.batch_size)
    init = InitConfig(plain.location, gate_opening_steps=int(opening * steps)) if converts else InitConfig()
    return dataclasses.replace(config, model=model_from(origin_of(plain.location), variant), init=init)


def train(config: RunConfig) -> dict[str, float]:
    """Top-1 after the `first` and the `last` epoch of the run, which is trained if it is not yet."""
    dataset = open_dataset(config.data)
    results = train_alone(resolve(config, dataset), dataset)
    accuracy = read_curves(config.folder / "tensorboard")["val/top1"]
    return {"first": accuracy[0][1], "last": results["last"]["top1"]}


def show(found: dict[str, list[dict[str, float]]]) -> None:
    table = Table()
    for column in ("arm", "top-1 after one epoch, %", "after the last, %", "by seed"):
        table.add_column(column)
    for arm, results in found.items():
        values = {when: [run[when] for run in results] for when in ("first", "last")}
        cells = [
            f"{statistics.mean(top1):.2f} ± {statistics.stdev(top1) if len(top1) > 1 else 0.0:.2f}"
            for top1 in values.values()
        ]
        table.add_row(arm, *cells, ", ".join(f"{top1:.2f}" for top1 in values["last"]))
    Console(width=110).print(table)


def write_folder(source: Path, folder: Path, labels: tuple[int, ...], most: int | None) -> None:
    """An image folder of these classes, with the first `most` training images of each and all test images."""
    unfinished = folder.with_name(f".{folder.name}")
    for split, stem, limit in (("train", "train", most), ("val", "t10k", None)):
        images = np.frombuffer(
            gzip.decompress((source / f"{stem}-images-idx3-ubyte.gz").read_bytes()), np.uint8, -1, 16
        )
        truth = np.frombuffer(gzip.decompress((source / f"{stem}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, -1, 8)
        images = images.reshape(-1, 28, 28)
        for label in labels:
            place = unfinished / split / f"class{label}"
            place.mkdir(parents=True)
            for number in np.flatnonzero(truth == label)[:limit]:
                Image.fromarray(images[number]).save(place / f"{number:05d}.png")
    unfinished.rename(folder)


if __name__ == "__main__":
    main()
