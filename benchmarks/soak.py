"""One run of two Ray Train workers, interrupted again and again, beside the same run left alone: what is lost.

It is cut at random moments: a worker is killed (SIGKILL), or the command is, or it is told to end (SIGTERM, Ctrl-C), or
it is killed and its newest checkpoint is damaged too. A command that ended is typed again at once. Then the two must
agree in every bit of the weights and in the audit, and nothing may be left behind.

    python benchmarks/soak.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import torch
import tyro
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from sitting import Sitting, newest_step, processes, temporary_folder

from diffvit.config import CheckpointConfig, DataConfig, RunConfig
from diffvit.data.datasets import open_dataset
from diffvit.manifest import WEIGHTS_NAME
from diffvit.recipes import RECIPES

KINDS = {
    "worker killed": (signal.SIGKILL, "worker "),
    "command killed": (signal.SIGKILL, "ended without a word"),
    "command told to end": (signal.SIGTERM, "interrupted by the user"),
    "Ctrl-C": (signal.SIGINT, "interrupted by the user"),
    "command killed, newest checkpoint damaged": (signal.SIGKILL, "ended without a word"),
}
"""The signal, and how the reason begins that the run's list of interruptions must give."""
_LET_GO_SECONDS = 120.0
"""After a killed command two of Ray's agents try for a minute to report that."""


@dataclass(frozen=True)
class Options:
    """What the run has to live through."""

    interruptions: int = 30
    """How many."""
    seed: int = 0
    """Of the kinds and the moments."""
    epochs: int = 45
    """Of 40 steps; too few, and the run ends before it was cut so often."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))  # else nobody would end what we started
    console = Console(width=110)
    memory = shared_memory()
    with TemporaryDirectory() as storage, ExitStack() as sittings:
        write_images(Path(storage, "images"))
        whole, cut = (config(name, storage, options) for name in ("whole", "cut"))
        sittings.enter_context(Sitting(whole)).wait()
        plan = list(moments(options))
        started = time.monotonic()
        sitting = sittings.enter_context(Sitting(cut))
        for number, (kind, delay) in enumerate(plan):
            sitting.wait_for_checkpoint(number)
            time.sleep(delay)
            console.print(f"{time.monotonic() - started:5.0f} s  step {newest_step(cut):5d}  {kind}")
            if interrupt(sitting, kind, cut):
                sitting = sittings.enter_context(Sitting(cut))
        sitting.wait()
        seconds = time.monotonic() - started
        wait_until(lambda: not processes())
        results = json.loads((cut.folder / "results.json").read_text())
        show(plan, results["interruptions"], seconds, console)
        holds = {
            "the run has finished": results["status"] == "finished",
            "every interruption is listed, with its reason": reasons_hold(plan, results["interruptions"]),
            "the final weights have the bits of the uncut run's": same_weights(cut, whole),
            "so has what AdamW remembers": same_moments(cut, whole),
            "each sample was trained on once an epoch, as in the uncut run": audit(cut).equals(audit(whole)),
        }
        left = {
            "the run's folder holds what the uncut run's does": files(cut) ^ files(whole),
            "no process is left": set(map(str, processes())),
            "no temporary file is left, but for Ray's logs": temporary_files(storage),
            "no shared memory is left": shared_memory() - memory,
        }
    for name, held in (holds | {name: not found for name, found in left.items()}).items():
        console.print(f"{'yes' if held else 'NO ':<4} {name} {' '.join(sorted(left.get(name, ())))}")
    sys.exit(not all(holds.values()) or any(left.values()))


def write_images(folder: Path) -> None:
    """640 training and 40 validation images of the embedded sample."""
    dataset = open_dataset(DataConfig())
    for name, split, count in (("train", dataset.train, 640), ("val", dataset.val, 40)):
        for index, encoded in enumerate(split.read_many(np.arange(count))):
            path = folder / name / f"class{split.labels[index]}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cast(bytes, encoded))


def config(name: str, storage: str, options: Options) -> RunConfig:
    """The sample's recipe on fewer images with a tiny model, saved every few steps."""
    recipe = RECIPES["sample"]()
    return dataclasses.replace(
        recipe,
        name=name,
        storage=storage,
        model=dataclasses.replace(recipe.model, embed_dim=32, depth=2),
        data=dataclasses.replace(recipe.data, path=f"{storage}/images", audit=True),
        optim=dataclasses.replace(recipe.optim, epochs=options.epochs, batch_size=16),
        scale=dataclasses.replace(recipe.scale, max_failures=options.interruptions),
        checkpoint=CheckpointConfig(every_steps=5),
    )


def moments(options: Options) -> Iterator[tuple[str, float]]:
    """What happens, and how many seconds after a new checkpoint."""
    rng = random.Random(options.seed)
    for _ in range(options.interruptions):
        yield rng.choice(list(KINDS)), rng.uniform(0.0, 0.5)


def interrupt(sitting: Sitting, kind: str, config: RunConfig) -> bool:
    """Whether the command has ended by it."""
    if kind == "worker killed":
        sitting.kill_a_worker()
        return False
    sitting.end(KINDS[kind][0])
    if kind.endswith("damaged"):
        wait_until(lambda: not sitting.workers())  # they outlive the command for a moment, and may write another one
        weights = final(config) / WEIGHTS_NAME
        os.truncate(weights, weights.stat().st_size // 2)
    return True


def wait_until(happens: Callable[[], bool]) -> None:
    """Or until it is too late; the checks tell."""
    deadline = time.monotonic() + _LET_GO_SECONDS
    while not happens() and time.monotonic() < deadline:
        time.sleep(0.1)


def final(config: RunConfig) -> Path:
    return config.folder / f"checkpoint_step_{newest_step(config):08d}"


def same_weights(one: RunConfig, other: RunConfig) -> bool:
    ours, theirs = (load_file(final(config) / WEIGHTS_NAME) for config in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def same_moments(one: RunConfig, other: RunConfig) -> bool:
    ours, theirs = (
        torch.load(final(config) / "training.pt", weights_only=True)["optimizer"]["state"] for config in (one, other)
    )
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[number][name]) for number, kept in ours.items() for name, value in kept.items()
    )


def audit(config: RunConfig) -> Any:
    return pq.read_table(config.folder / "audit").sort_by([("epoch", "ascending"), ("position", "ascending")])


def reasons_hold(plan: list[tuple[str, float]], listed: list[dict[str, Any]]) -> bool:
    return len(listed) == len(plan) and all(
        entry["why"].startswith(KINDS[kind][1]) for (kind, _), entry in zip(plan, listed, strict=True)
    )


def files(config: RunConfig) -> set[str]:
    """What lies in the run's folder; checkpoints by their number, because the disk's speed decides which are kept.

    Of TensorBoard's files, one each sitting, none is named.
    """
    names = {str(path.relative_to(config.folder)) for path in config.folder.rglob("*") if path.is_file()}
    checkpoints = {name.split("/")[0] for name in names if name.startswith("checkpoint_step_")}
    others = {name for name in names if not name.startswith(("checkpoint_step_", "tensorboard/events."))}
    kept = "checkpoints" if len(checkpoints) in (2, 3) else f"{len(checkpoints)} checkpoints"
    return others - {"interruptions.json"} | {kept}


def temporary_files(storage: str) -> set[str]:
    """Folders count only with something in them: torch's compiler makes one that stays empty."""
    folder = temporary_folder(storage)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in files if not name.startswith("ray/")}


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def show(plan: list[tuple[str, float]], listed: list[dict[str, Any]], seconds: float, console: Console) -> None:
    table = Table("interrupted by", "times", "steps repeated", "seconds lost, median", "at most")
    for kind in KINDS:
        entries = [entry for (planned, _), entry in zip(plan, listed, strict=False) if planned == kind]
        if entries:
            lost = [entry["seconds_lost"] for entry in entries]
            repeated = sum(entry["steps_repeated"] for entry in entries)
            median = f"{statistics.median(lost):.1f}"
            table.add_row(kind, str(len(entries)), str(repeated), median, f"{max(lost):.1f}")
    console.print(table)
    for (kind, _), entry in zip(plan, listed, strict=False):
        if not entry["why"].startswith(KINDS[kind][1]):
            console.print(f"{kind}: the run says {entry['why']!r}")
    lost = sum(entry["seconds_lost"] for entry in listed)
    console.print(f"{len(listed)} interruptions in {seconds:.0f} s, of which {lost:.0f} s were lost")


if __name__ == "__main__":
    main()
