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
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
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

from diffvit.config import CheckpointConfig, DataConfig, RunConfig, to_json
from diffvit.data.sources import open_dataset
from diffvit.manifest import WEIGHTS_NAME
from diffvit.recipes import RECIPES
from diffvit.training.checkpoint_store import CheckpointStore
from diffvit.training.logbook import Logbook

JOB = Path(__file__).parents[1] / "ray_jobs/pretrain.py"
KINDS = {
    "worker killed": (signal.SIGKILL, "worker "),
    "command killed": (signal.SIGKILL, "ended without a word"),
    "command told to end": (signal.SIGTERM, "interrupted by the user"),
    "Ctrl-C": (signal.SIGINT, "interrupted by the user"),
    "command killed, newest checkpoint damaged": (signal.SIGKILL, "ended without a word"),
}
"""The signal, and how the reason begins that the run's list of interruptions must give."""
_MARK = "DIFFVIT_SOAK"
"""Variable by which every process that a run started is found."""
_WAIT_SECONDS = 300.0
_LET_GO_SECONDS = 60.0


@dataclass(frozen=True)
class Options:
    """What the run has to live through."""

    interruptions: int = 30
    """How many."""
    seed: int = 0
    """Of the kinds and the moments."""
    epochs: int = 30
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
            sitting.wait_until(lambda listed=number: len(interruptions(cut)) == listed)  # type: ignore[misc]
            begun = newest(cut)
            sitting.wait_until(lambda seen=begun: newest(cut) > seen)  # type: ignore[misc]
            time.sleep(delay)
            console.print(f"{time.monotonic() - started:5.0f} s  step {newest(cut):5d}  {kind}")
            if sitting.interrupt(kind, cut):
                sitting = sittings.enter_context(Sitting(cut))
        sitting.wait()
        seconds = time.monotonic() - started
        left = Sitting.processes()
        results = json.loads((cut.folder / "results.json").read_text())
        show(plan, results["interruptions"], seconds, console)
        checks = {
            "the run has finished": results["status"] == "finished",
            "every interruption is listed, with its reason": reasons_hold(plan, results["interruptions"]),
            "the final weights have the bits of the uncut run's": same_weights(cut, whole),
            "so has what AdamW remembers": same_moments(cut, whole),
            "each sample was trained on once an epoch, as in the uncut run": audit(cut).equals(audit(whole)),
            "the uncut run's files, the list of interruptions, and no others": files(cut) == files(whole),
            "no process is left": not left,
            "no temporary file is left, beside Ray's logs": {path.name for path in temporary(storage).iterdir()} <= {"ray"},
            "no shared memory is left": shared_memory() <= memory,
        }
    for name, holds in checks.items():
        console.print(f"{'yes' if holds else 'NO ':<4} {name}")
    sys.exit(not all(checks.values()))


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


def temporary(storage: str) -> Path:
    return Path(storage, "tmp")


def moments(options: Options) -> Iterator[tuple[str, float]]:
    """What happens, and how many seconds after a new checkpoint."""
    rng = random.Random(options.seed)
    for _ in range(options.interruptions):
        yield rng.choice(list(KINDS)), rng.uniform(0.0, 0.5)


class Sitting:
    """The command, from when it is typed until it ends; what is left of it is killed at the end of the `with` block."""

    def __init__(self, config: RunConfig) -> None:
        self._mark = f"{os.getpid()}-{uuid.uuid4().hex}"
        self._log = Path(config.storage, f"{config.name}.log")
        described = Path(config.storage, f"{config.name}.json")
        described.write_text(to_json(config))
        temporary(config.storage).mkdir(exist_ok=True)
        environment = {
            _MARK: self._mark,
            "TMPDIR": str(temporary(config.storage)),
            "SPT_NOENV": "1",  # or setproctitle, which Ray's workers use, writes over a process's environment
            "RAY_worker_niceness": "0",  # or anything else on the machine goes first
        }
        with self._log.open("a") as log:
            self._command = subprocess.Popen(
                [sys.executable, str(JOB), "--config", str(described)],
                stdout=log,
                stderr=log,
                env=os.environ | environment,
                # a background job of a shell ignores Ctrl-C, and so would this
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def __enter__(self) -> Sitting:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes(self._mark):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._command.wait()

    def interrupt(self, kind: str, config: RunConfig) -> bool:
        """Whether the command has ended by it."""
        number, _ = KINDS[kind]
        if kind == "worker killed":
            workers = self.processes(self._mark, "ray::RayTrainWorker")
            os.kill(random.Random(self._mark).choice(workers), number)
            return False
        self._command.send_signal(number)
        self._command.wait(_WAIT_SECONDS)
        if kind.endswith("damaged"):
            self.wait_until_gone()  # a writer that outlives the command for a moment would write another one
            weights = final(config) / WEIGHTS_NAME
            os.truncate(weights, weights.stat().st_size // 2)
        return True

    def wait(self) -> None:
        """Until it has ended by itself, and what it started too."""
        if self._command.wait(_WAIT_SECONDS):
            raise SystemExit(f"the run failed:\n{self._log.read_text()[-3000:]}")
        self.wait_until_gone()

    def wait_until_gone(self) -> None:
        deadline = time.monotonic() + _LET_GO_SECONDS
        while self.processes(self._mark) and time.monotonic() < deadline:
            time.sleep(0.1)

    def wait_until(self, happens: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _WAIT_SECONDS
        while not happens():
            if self._command.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the run has ended or stands still:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.1)

    @staticmethod
    def processes(mark: str = f"{os.getpid()}-", title: str = "") -> list[int]:
        """Those that a sitting (all sittings, by default) has started and that live, the command itself included."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                ours = f"{_MARK}={mark}".encode() in (folder / "environ").read_bytes()
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


def interruptions(config: RunConfig) -> list[dict[str, Any]]:
    return Logbook(config.folder).interruptions


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
