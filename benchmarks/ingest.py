"""Images a second from disk to training crops: this project's stream, torch's DataLoader, and the ceiling.

500 x 375 JPEGs -> 224 px crops, Inception crop and flip, uint8 batches. All decode on the same CPUs, at the
niceness of the stream's tasks, and read the same pictures, which are warm in the page cache; they take turns, and
ratios are those of one round. ImageFolder decodes by PIL; a DataLoader with our decoder and transform is there too. The
ceiling is this project's decode and augmentation in plain processes that give
nothing to anybody. Aims: 1.3 of DataLoader, 0.85 of the ceiling, a first batch after at most 3 times DataLoader's.

    python benchmarks/ingest.py
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import ray
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from diffvit.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, PrepareConfig, RunConfig
from diffvit.data.datasets import Split, open_dataset
from diffvit.data.images import decode_image, train_transform
from diffvit.data.loader import BatchLoader
from diffvit.data.order import EvalPlan, TrainPlan
from diffvit.data.prepare import prepare
from diffvit.data.stream import RayStream
from diffvit.training.cluster import connect


@dataclass(frozen=True)
class Options:
    """What to measure."""

    images: int = 20_000
    """Training images; there are ten classes. A short epoch: 40,000 are nearer to what data sets have."""
    pictures: int = 2000
    """Different ones among them; the others are links to these."""
    processes: int = 2
    """That decode: DataLoader's workers, the CPUs of the local Ray, and the ceiling's processes."""
    batch_size: int = 128
    """Images in a batch."""
    rounds: int = 3
    """Epochs of each."""


@dataclass
class Measured:
    """Seconds from the first call to the first and the last batch of an epoch."""

    first: float
    whole: float


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    folder = Path(tempfile.mkdtemp(prefix="diffvit-ingest-"))
    try:
        measure(options, folder)
    finally:
        shutil.rmtree(folder)


def measure(options: Options, folder: Path) -> None:
    console = Console(width=110)
    mean_bytes = make_photos(folder / "photos", options.images, options.pictures)
    started = time.perf_counter()
    connect()
    ray_start = time.perf_counter() - started
    if (cpus := int(ray.cluster_resources()["CPU"])) != options.processes:
        raise SystemExit(f"Ray has {cpus} CPUs here, so compare it with --processes {cpus}, not {options.processes}")
    prepare(PrepareConfig(source=str(folder / "photos"), out=str(folder / "shards")), lambda *_: None)
    dataset = open_dataset(DataConfig(path=str(folder / "shards")))
    epochs: dict[str, Callable[[], Measured]] = {
        "diffvit": lambda: stream_epoch(dataset.train, options),
        "DataLoader": lambda: dataloader_epoch(pil_folder(folder / "photos/train"), options),
        "DataLoader, our decoder": lambda: dataloader_epoch(our_folder(folder / "photos/train"), options),
        "ceiling": lambda: ceiling_epoch(dataset.train, options),
    }
    names = list(epochs)
    results: dict[str, list[Measured]] = {name: [] for name in names}
    with peak_object_store() as peaks:
        for number in range(options.rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                results[name].append(epochs[name]())
            peaks.append(0.0)
    console.print(
        f"{platform.machine()}, {options.processes} processes, {options.images:,} JPEGs of 500 x 375 "
        f"({mean_bytes / 1024:.0f} KiB each), batches of {options.batch_size}, {options.rounds} rounds; "
        f"Ray started in {ray_start:.1f} s"
    )
    table = Table("", "images/s", "to DataLoader", "to the ceiling", "first batch, s", "to DataLoader's")
    for name in names:
        speeds = [options.images / m.whole for m in results[name]]
        to_loader = [r.whole / m.whole for m, r in zip(results[name], results["DataLoader"], strict=True)]
        to_ceiling = [r.whole / m.whole for m, r in zip(results[name], results["ceiling"], strict=True)]
        first = [m.first / r.first for m, r in zip(results[name], results["DataLoader"], strict=True)]
        table.add_row(
            name,
            f"{statistics.median(speeds):,.0f}",
            f"{statistics.median(to_loader):.2f}",
            f"{statistics.median(to_ceiling):.2f}",
            f"{statistics.median(m.first for m in results[name]):.2f}",
            f"{statistics.median(first):.2f}",
        )
    console.print(table)
    console.print(f"object store, peak of each round: {', '.join(f'{peak:.0f} MiB' for peak in peaks[:-1])}")


def loaders(train: Split, options: Options) -> tuple[BatchLoader, BatchLoader]:
    config = RunConfig(
        model=ModelConfig(image_size=224, num_classes=10),
        augment=AugmentConfig(crop="inception"),
        optim=OptimConfig(batch_size=options.batch_size),
    )
    plan = TrainPlan(len(train), seed=0, epochs=1, batch_size=options.batch_size)
    return BatchLoader(config, train, plan), BatchLoader(config, train, EvalPlan(len(train), 250))


def timed_epoch(epoch: Iterable[object]) -> Measured:
    """Take every batch; the clock starts before the epoch does, with the processes that it starts."""
    started = time.perf_counter()
    batches = iter(epoch)
    next(batches)
    first = time.perf_counter() - started
    for _ in batches:
        pass
    return Measured(first, time.perf_counter() - started)


def stream_epoch(train: Split, options: Options) -> Measured:
    return timed_epoch(RayStream(*loaders(train, options), 0, 1, lambda value: value).train(0))


def pil_folder(folder: Path) -> ImageFolder:
    """What torchvision's own recipes do, with the pixels left as uint8, which spares it the conversion."""
    transform = v2.Compose([v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    return ImageFolder(str(folder), transform)


def our_folder(folder: Path) -> ImageFolder:
    return ImageFolder(str(folder), train_transform(AugmentConfig(crop="inception"), 224), loader=decoded)


def decoded(path: str) -> torch.Tensor:
    return decode_image(Path(path).read_bytes(), 3, 10**8)


def dataloader_epoch(images: ImageFolder, options: Options) -> Measured:
    loader = DataLoader(
        images,
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=options.processes,
        worker_init_fn=be_nice,
    )
    return timed_epoch(loader)


def ceiling_epoch(train: Split, options: Options) -> Measured:
    """Plain processes that make every batch of the plan and keep none."""
    loader, _ = loaders(train, options)
    assert isinstance(loader.plan, TrainPlan)
    rows = loader.plan.total_steps
    context = multiprocessing.get_context("fork")
    started = time.perf_counter()
    workers = [
        context.Process(target=make_and_drop, args=(loader, range(number, rows, options.processes)))
        for number in range(options.processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return Measured(float("nan"), time.perf_counter() - started)


def be_nice(_: int = 0) -> None:
    """As the stream's tasks are, so that a busy machine takes as much from all three."""
    os.setpriority(os.PRIO_PROCESS, 0, 19)


def make_and_drop(loader: BatchLoader, rows: range) -> None:
    be_nice()
    torch.set_num_threads(1)
    for row in rows:
        loader(row)


@contextmanager
def peak_object_store() -> Iterator[list[float]]:
    """A list whose last number becomes the largest use of the object store seen so far, in MiB."""
    peaks, stop = [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            free = ray.available_resources().get("object_store_memory", 0.0)
            peaks[-1] = max(peaks[-1], (ray.cluster_resources()["object_store_memory"] - free) / 2**20)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield peaks
    stop.set()
    thread.join()


def make_photos(folder: Path, images: int, pictures: int) -> float:
    """Pictures with the spectrum of photographs (amplitude 1 / frequency), ten classes; the mean size in bytes."""
    rng = np.random.default_rng(0)
    scenes = [scene(rng, 600, 450) for _ in range(40)]
    sizes: list[int] = []
    made: list[Path] = []
    for number in range(images + 100):
        path = folder / ("train" if number < images else "val") / str(number % 10) / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(made) == pictures:
            path.hardlink_to(made[number % pictures])
            continue
        made.append(path)
        top, left = rng.integers(0, 75), rng.integers(0, 100)
        crop = scenes[number % len(scenes)][top : top + 375, left : left + 500]
        Image.fromarray(crop).save(path, quality=90)
        sizes.append(path.stat().st_size)
    return statistics.mean(sizes)


def scene(rng: np.random.Generator, width: int, height: int) -> npt.NDArray[np.uint8]:
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    frequencies[0, 0] = 1
    grey, *colour = (np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) / frequencies).real for _ in range(4))
    channels = np.stack([grey + 0.3 * extra for extra in colour], -1)
    channels = 128 + 60 * (channels - channels.mean()) / channels.std()
    pixels: npt.NDArray[np.uint8] = np.clip(channels, 0, 255).astype(np.uint8)
    return pixels


if __name__ == "__main__":
    main()
