"""One run of two Ray Train workers, interrupted again and again, beside the same run left alone: what is lost.

It is cut at random moments: a worker is killed (SIGKILL), or the command is, or it is told to end (SIGTERM, Ctrl-C), or
it is killed and its newest checkpoint is damaged too. A command that ended is typed again. Then the two must agree in
every bit of the weights and in the audit, and nothing may be left behind.

    python benchmarks/soak.py
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
import torch
import tyro
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from diffvit.config import CheckpointConfig, RunConfig, to_json
from diffvit.manifest import WEIGHTS_NAME
from diffvit.recipes import RECIPES
from diffvit.training.checkpoint_store import CheckpointStore

JOB = Path(__file__).parents[1] / "ray_jobs/pretrain.py"
KINDS = {
    "worker killed": signal.SIGKILL,
    "command killed": signal.SIGKILL,
    "command told to end": signal.SIGTERM,
    "Ctrl-C": signal.SIGINT,
    "command killed, newest checkpoint damaged": signal.SIGKILL,
}
_MARK = "DIFFVIT_SOAK"
"""Variable by which every process that a run started is found."""
_WAIT_SECONDS = 300.0
_LET_GO_SECONDS = 30.0


@dataclass(frozen=True)
class Options:
    """What the run has to live through."""

    interruptions: int = 30
    """How many."""
    seed: int = 0
    """Of the kinds and the moments."""
    epochs: int = 12
    """Of the sample; too few, and the run ends before it was cut so often."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console(width=110)
    memory = shared_memory()
    with TemporaryDirectory() as storage:
        whole, cut = (config(name, storage, options) for name in ("whole", "cut"))
        sitting = Sitting(whole)
        sitting.wait()
        plan = list(moments(options))
        started = time.monotonic()
        sittings = [sitting := Sitting(cut)]
        for kind, delay in plan:
            before = newest(cut)
            sitting.wait_until(lambda seen=before: newest(cut) > seen)  # type: ignore[misc]
            time.sleep(delay)
            if sitting.interrupt(kind, cut):
                sittings.append(sitting := Sitting(cut))
        sitting.wait()
        seconds = time.monotonic() - started
        left = [process for one in sittings for process in one.processes()]
        results = json.loads((cut.folder / "results.json").read_text())
        show(plan, results, seconds, console)
        checks = {
            "the run has finished": results["status"] == "finished",
            "every interruption is listed": len(results["interruptions"]) == len(plan),
            "the final weights have the bits of the uncut run's": same_weights(cut, whole),
            "so has what AdamW remembers": same_moments(cut, whole),
            "each sample was trained on once an epoch, as in the uncut run": audit(cut).equals(audit(whole)),
            "the uncut run's files, the list of interruptions, and no others": files(cut) == files(whole),
            "no process is left": not left,
            "no shared memory is left": shared_memory() <= memory,
        }
    for name, holds in checks.items():
        console.print(f"{'yes' if holds else 'NO ':<4} {name}")
    sys.exit(not all(checks.values()))


def config(name: str, storage: str, options: Options) -> RunConfig:
    """The sample's recipe with a smaller model, which is saved twice a second or so."""
    recipe = RECIPES["sample"]()
    return dataclasses.replace(
        recipe,
        name=name,
        storage=storage,
        model=dataclasses.replace(recipe.model, embed_dim=32, depth=3),
        data=dataclasses.replace(recipe.data, audit=True),
        optim=dataclasses.replace(recipe.optim, epochs=options.epochs),
        scale=dataclasses.replace(recipe.scale, max_failures=options.interruptions),
        checkpoint=CheckpointConfig(every_steps=10),
    )


def moments(options: Options) -> Iterator[tuple[str, float]]:
    """What happens, and how many seconds after a new checkpoint."""
    rng = random.Random(options.seed)
    for _ in range(options.interruptions):
        yield rng.choice(list(KINDS)), rng.uniform(0.0, 1.5)


class Sitting:
    """The command, from when it is typed until it ends."""

    def __init__(self, config: RunConfig) -> None:
        self._mark = uuid.uuid4().hex
        self._log = Path(config.storage, f"{config.name}.log")
        described = Path(config.storage, f"{config.name}.json")
        described.write_text(to_json(config))
        with self._log.open("a") as log:
            self._command = subprocess.Popen(
                [sys.executable, str(JOB), "--config", str(described)],
                stdout=log,
                stderr=log,
                env=os.environ | {_MARK: self._mark},
            )

    def interrupt(self, kind: str, config: RunConfig) -> bool:
        """Whether the command has ended by it."""
        if kind == "worker killed":
            os.kill(random.Random(self._mark).choice(self.processes("ray::RayTrainWorker")), KINDS[kind])
            return False
        self._command.send_signal(KINDS[kind])
        self._command.wait(_WAIT_SECONDS)
        if kind.endswith("damaged"):
            file = store(config).entries()[-1]
            weights = Path(config.folder, f"checkpoint_step_{file.step:08d}", WEIGHTS_NAME)
            os.truncate(weights, weights.stat().st_size // 2)
        return True

    def wait(self) -> None:
        """Until it has ended by itself, and what it started too."""
        if self._command.wait():
            raise SystemExit(f"the run failed:\n{self._log.read_text()[-3000:]}")
        self.wait_until(lambda: not self.processes(), _LET_GO_SECONDS, fails=False)

    def wait_until(self, happens: Callable[[], bool], seconds: float = _WAIT_SECONDS, *, fails: bool = True) -> None:
        deadline = time.monotonic() + seconds
        while not happens():
            ended = fails and self._command.poll() is not None
            if ended or time.monotonic() > deadline:
                if fails:
                    raise SystemExit(f"the run has ended or stands still:\n{self._log.read_text()[-3000:]}")
                return
            time.sleep(0.1)

    def processes(self, title: str = "") -> list[int]:
        """Those that the command has started and that live, itself included."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                ours = f"{_MARK}={self._mark}".encode() in (folder / "environ").read_bytes()
                if ours and (folder / "cmdline").read_text().startswith(title):
                    found.append(int(folder.name))
            except OSError:  # it has ended meanwhile
                continue
        return found


def store(config: RunConfig) -> CheckpointStore:
    return CheckpointStore(config.folder, config.checkpoint)


def newest(config: RunConfig) -> int:
    """Step of the newest checkpoint, 0 before there is one."""
    entries = store(config).entries() if config.folder.exists() else []
    return entries[-1].step if entries else 0


def final(config: RunConfig) -> Path:
    return config.folder / f"checkpoint_step_{newest(config):08d}"


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


def files(config: RunConfig) -> set[str]:
    """What lies in the run's folder; checkpoints by their number, because the disk's speed decides which are kept."""
    names = [path.name for path in config.folder.iterdir()]
    checkpoints = sum(name.startswith("checkpoint_step_") for name in names)
    others = {name for name in names if not name.startswith("checkpoint_step_")} - {"interruptions.json"}
    return others | {"checkpoints" if checkpoints in (2, 3) else f"{checkpoints} checkpoints"}


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def show(plan: list[tuple[str, float]], results: dict[str, Any], seconds: float, console: Console) -> None:
    interruptions = results["interruptions"]
    repeated = sum(entry["steps_repeated"] for entry in interruptions)
    table = Table("interrupted by", "times")
    for kind, times in sorted(collections.Counter(kind for kind, _ in plan).items()):
        table.add_row(kind, str(times))
    console.print(table)
    lost = [entry["seconds_lost"] for entry in interruptions]
    console.print(
        f"{len(interruptions)} interruptions in {seconds:.0f} s; {repeated} steps repeated; seconds lost by each: "
        f"{min(lost):.1f} to {max(lost):.1f}, together {sum(lost):.0f}"
    )


if __name__ == "__main__":
    main()
