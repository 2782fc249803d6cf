"""Where training ImageNet's ViT-S/16 for 90 epochs would stop scaling, predicted: speed, time, cost, and why.

Measured in this run: decoding on one core, the bytes of gradients and of a checkpoint and the time to write it, what
the stream's one coordinator deals out, and what a run's control takes of its head. The rest is assumed; every
assumption is an option, and `scale_facts.py` says where it comes from. No GPU and no cloud is used.

    python benchmarks/scale.py --plot docs/scale.png
"""

from __future__ import annotations

import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import torch
import tyro
from ingest import make_photos
from pydantic import TypeAdapter
from rich import box
from rich.console import Console
from rich.table import Table
from scale_control import Cores, control
from scale_facts import VARIANTS, Assumptions, Fleet, Measured
from scale_model import Prediction, ceilings_images_per_second, chunk_images, control_cores, predict, stops_at
from scale_plot import draw
from scale_stream import CHANNELS, IMAGE_SIZE, Dealt, deal

from diffvit.config import DataConfig, RunConfig
from diffvit.data import stream
from diffvit.data.datasets import open_dataset
from diffvit.data.loader import BatchLoader
from diffvit.data.order import TrainPlan
from diffvit.models.vit import VisionTransformer
from diffvit.recipes import RECIPES
from diffvit.training.checkpoint import TrainState, take_snapshot
from diffvit.training.optim import build_optimizer, build_schedule

RECIPE_OF = {"plain": "imagenet-s16-90ep", "V1": "imagenet-s16-90ep-v1", "V2": "imagenet-s16-90ep-v2"}
CHUNK_SHARE = 16
"""The coordinator is also watched with chunks of a 16th, so that what it costs shows and not the copying."""


@dataclass(frozen=True)
class Options(Assumptions):
    """What is assumed, and how long to measure."""

    plot: Path | None = None
    """PNG to draw."""
    measured: Path | None = None
    """JSON of what was measured: read if it is there, else written; so that assumptions can be varied in a second."""
    photos: int = 100
    """JPEGs to decode."""
    rounds: int = 3
    """Times each quick figure is taken; the median counts."""
    stream_seconds: float = 3.0
    """For which the coordinator is watched, each time."""
    stream_cpus: int = 12
    """Logical CPUs of the local Ray."""
    consumers: tuple[int, ...] = (1, 4, 16)
    """Ranks that take chunks."""
    groups: tuple[int, ...] = (4, 16, 48)
    """Workers of the runs whose control is watched: two sizes or more."""
    control_seconds: float = 20.0
    """For which each is watched."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    console = Console(width=150)
    measured = read_or_measure(options, console)
    runs = {f"{name}, {options.gpu.name}": predictions(name, options.gpu, options, measured) for name in VARIANTS}
    runs[f"plain, {options.big.name}"] = predictions("plain", options.big, options, measured)
    console.print(table(runs, options))
    for name, predicted in runs.items():
        console.print(f"PREDICTED: {name} {stops_at(predicted)}")
    most = options.gpus[-1]
    ceilings = ceilings_images_per_second(most, "plain", options.big, options, measured)
    chunk = chunk_images(most, options, measured)
    for name, images_per_second in ceilings.items():
        console.print(f"PREDICTED: {most} GPUs of {options.big.name}: {name} ends at {images_per_second:,.0f} images/s")
    for fleet in (options.gpu, options.big):
        wanted = most * fleet.gpu_images_per_second / chunk
        console.print(
            f"PREDICTED: {most} GPUs of {fleet.name}, each at its own rate, want {wanted:,.0f} chunks/s; "
            f"the coordinator, by its CPU time for one, gives {measured.stream_chunks_per_second:,.0f} (extrapolated)"
        )
    parts = control_cores(most, measured)
    console.print(
        f"PREDICTED: to control {most} workers takes {sum(parts.values()):.0%} of a core of the head (extrapolated): "
        + ", ".join(f"{name} {share:.0%}" for name, share in parts.items())
    )
    if options.plot is not None:
        del ceilings["GPU"]
        draw(options.plot, runs, ceilings)


def read_or_measure(options: Options, console: Console) -> Measured:
    adapter = TypeAdapter(Measured)
    if options.measured is not None and options.measured.exists():
        return adapter.validate_json(options.measured.read_bytes())
    measured = measure(options, console)
    if options.measured is not None:
        options.measured.write_bytes(adapter.dump_json(measured, indent=2))
    return measured


def predictions(variant: str, fleet: Fleet, options: Options, measured: Measured) -> list[Prediction]:
    return [predict(gpus, variant, fleet, options, measured) for gpus in options.gpus]


def table(runs: Mapping[str, Sequence[Prediction]], options: Options) -> Table:
    """A row for each number of GPUs, with every run's hours and dollars; speed and its bound are the first one's."""
    title = f"PREDICTED, not measured: ViT-S/16, {options.epochs} epochs"
    found = Table("GPUs", title=title, title_justify="left", box=box.SIMPLE)
    columns = ("images/s", "bound by", "data\nnodes")
    for column in (*columns, *(text for name in runs for text in (name.replace(", ", "\n") + "\nhours", "$"))):
        found.add_column(column, justify="right")
    for row in zip(*runs.values(), strict=True):
        plain = row[0]
        cells = [f"{plain.gpus}", f"{plain.images_per_second:,.0f}", plain.bound_by, f"{plain.data_nodes}"]
        found.add_row(*cells, *(cell for run in row for cell in (f"{run.hours:,.1f}", f"{run.dollars:,.0f}")))
    return found


def measure(options: Options, console: Console) -> Measured:
    """Take every figure that this machine can give."""
    config = RECIPES[RECIPE_OF["plain"]]()
    decoded = decode_images_per_core_second(config, options)
    gradients = {variant: gradient_bytes(RECIPES[recipe]()) for variant, recipe in RECIPE_OF.items()}
    saved = [save_checkpoint(config) for _ in range(options.rounds)]
    size, write, snapshot = (statistics.median(column) for column in zip(*saved, strict=True))
    console.print(
        f"measured on {platform.machine()}: {decoded:.0f} images/s decoded and augmented by one core (CPU time); "
        f"gradients of {', '.join(f'{name} {count / 1e6:.1f}' for name, count in gradients.items())} MB; a checkpoint "
        f"of {size / 1e6:.0f} MB in {write:.2f} s, after {1e3 * snapshot:.0f} ms for its copy"
    )
    images_per_chunk = stream._CHUNK_BYTES // (CHANNELS * IMAGE_SIZE**2)
    dealt = watch_coordinator(images_per_chunk, options)
    console.print(stream_table(dealt))
    controlled = watch_control(options)
    console.print(control_table(controlled))
    whole = [found for found in dealt if found.images_per_chunk == images_per_chunk and not found.loading_seconds]
    return Measured(
        decode_images_per_core_second=decoded,
        gradient_bytes=gradients,
        checkpoint_bytes=int(size),
        checkpoint_write_seconds=write,
        snapshot_seconds=snapshot,
        stream_chunks_per_second=1 / statistics.median(found.coordinator_seconds_per_chunk for found in whole),
        images_per_chunk=images_per_chunk,
        control_cores=controlled,
    )


def decode_images_per_core_second(config: RunConfig, options: Options) -> float:
    """Read from the page cache, decode and augment as the recipe says, one thread, by its CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        make_photos(Path(folder), options.photos, options.photos)
        split = open_dataset(replace(DataConfig(), path=folder)).train
        loader = BatchLoader(config, split, TrainPlan(len(split), 0, options.rounds + 1, len(split)))
        seconds = []
        for row in range(options.rounds + 1):
            started = time.process_time()
            loader(row)
            seconds.append(time.process_time() - started)
        return len(split) / statistics.median(seconds[1:])  # the first one warms up


def gradient_bytes(config: RunConfig) -> int:
    """Of one step, in the parameters' own precision."""
    model = build(config)
    return sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad)


def save_checkpoint(config: RunConfig) -> tuple[int, float, float]:
    """Bytes of a checkpoint with AdamW's state, seconds to write it and seconds to copy the state before."""
    model = build(config)
    optimizer = build_optimizer(model, config.optim)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    state = TrainState(model, optimizer, build_schedule(optimizer, config.optim, 1), None)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        snapshot = take_snapshot(state, config, {})
        copied = time.perf_counter()
        snapshot.write(Path(folder))
        written = time.perf_counter()
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return size, written - copied, copied - started


def build(config: RunConfig) -> VisionTransformer:
    return VisionTransformer(replace(config.model, num_classes=1000))


def watch_coordinator(images_per_chunk: int, options: Options) -> list[Dealt]:
    """Chunks of a 16th and of the real size; then real ones that take a second, to see how many load at once."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    sizes = (images_per_chunk // CHUNK_SHARE, images_per_chunk)
    with local_ray(options.stream_cpus):
        found = [deal(count, size, options.stream_seconds) for size in sizes for count in options.consumers]
        found += [
            deal(count, images_per_chunk, 2 * options.stream_seconds, loading_seconds=1.0)
            for count in options.consumers
            if count <= options.stream_cpus
        ]
    return found


def watch_control(options: Options) -> dict[int, Cores]:
    """What the workers of a run cost the head, by their number."""
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    with local_ray(max(options.groups)):
        return {workers: control(workers, options.control_seconds) for workers in options.groups}


@contextmanager
def local_ray(cpus: int) -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=6 * 2**30,
    )
    try:
        yield
    finally:
        ray.shutdown()


def control_table(controlled: Mapping[int, Cores]) -> Table:
    title = "measured: CPU that the control of a run takes of the head, in % of a core"
    found = Table("workers", *next(iter(controlled.values())), title=title, title_justify="left")
    for workers, cores in controlled.items():
        found.add_row(f"{workers}", *(f"{100 * share:.1f}" for share in cores.values()))
    return found


def stream_table(dealt: Sequence[Dealt]) -> Table:
    title = "measured: what one coordinator deals out, when loading costs no CPU"
    found = Table("consumers", "images a chunk", "s to load one", title=title, title_justify="left")
    for column in ("chunks/s", "coordinator's CPU", "ms of it a chunk", "tasks at once"):
        found.add_column(column, justify="right")
    for row in dealt:
        found.add_row(
            f"{row.consumers}",
            f"{row.images_per_chunk}",
            f"{row.loading_seconds:g}",
            f"{row.chunks_per_second:.1f}",
            f"{row.coordinator_cpu_seconds / row.seconds:.0%}",
            f"{1e3 * row.coordinator_seconds_per_chunk:.0f}",
            f"{row.tasks_at_once:.1f}" if row.loading_seconds else "",
        )
    return found


if __name__ == "__main__":
    main()
