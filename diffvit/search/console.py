"""What a sweep shows in the terminal: its space, a live table that fits the screen, and what came out."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import rich.console
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from diffvit.search.config import SweepConfig
from diffvit.search.records import Record

_STYLES = {"running": "cyan", "failed": "red", "stopped": "dim", "finished": ""}
_SHORT = {
    "num_heads": "heads",
    "lambda_init": "lambda",
    "weight_decay": "decay",
    "drop_path": "drop",
    "patch_size": "px",
}
"""Names that fit a screen of 80 columns."""
_CHROME_LINES = 8
"""Lines of the screen that are not rows: header, title, summary, prompt."""


class SweepTable:
    """Shows runs as they change, the running ones first and then the best, as many as fit."""

    def __init__(
        self, sweep: SweepConfig, records: Sequence[Record], console: rich.console.Console | None = None
    ) -> None:
        self._sweep = sweep
        self._columns = sweep.space.varied(sweep.run)
        self._records = {record.name: record for record in records}
        self._console = console or rich.console.Console(highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._told: set[str] = set()

    def __enter__(self) -> SweepTable:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def print_header(self, trained_on: int, judged_on: int, left: int) -> None:
        """The space, what is held out, and what is still to do."""
        run, search = self._sweep.run, self._sweep.search
        self._console.print(
            f"[bold]{escape(run.name)}[/]: {search.trials} trials of {run.optim.epochs} epochs, {left} to go"
        )
        self._console.print(f"trained on {trained_on:,} images, judged on {judged_on:,} others of the training set")
        for name, words in self._sweep.space.describe(run).items():
            self._console.print(f"  {name:<16} {words}")
        points = self._sweep.space.points(run)
        if points:
            self._console.print(f"{len(points)} points, each trained once at most, in random order and by no sampler")
        steps_per_epoch = max(trained_on // run.optim.batch_size, 1)
        warmup = run.optim.warmup_epochs + (run.optim.warmup_steps or 0) / steps_per_epoch
        if search.stops_early and search.grace_epochs <= warmup:
            self._console.print(
                f"ASHA may stop a trial after {search.grace_epochs} epochs, but the warm-up takes {warmup:.3g}: to "
                f"judge rates at their peak give --search.grace-epochs {math.floor(warmup) + 1} or more",
                style="yellow",
            )
        watch = f"watch:  tensorboard --logdir {shlex.quote(str(run.folder))}"
        self._console.print(watch, style="dim", markup=False)

    def tell(self, record: Record, message: str) -> None:
        """Show what a run had to say, once of all runs."""
        if message not in self._told:
            self._console.print(f"{record.name}: {message}", style="yellow", markup=False)
        self._told.add(message)

    def changed(self, record: Record) -> None:
        """Show the new state of a run."""
        self._records[record.name] = record
        if self._console.is_terminal:
            self._live.update(self._screen(), refresh=True)
        elif record.status != "running":
            values = "  ".join(f"{name} {shown(record.values.get(name))}" for name in self._columns)
            best = "" if record.best_top1 is None else f"  best top-1 {record.best_top1:.2f} %"
            reason = f": {record.reason}" if record.reason else ""
            self._console.print(
                f"{record.name}  {values}  {record.epochs} epochs{best}  {record.status}{reason}", markup=False
            )

    def _screen(self) -> Group:
        table = Table(box=None, padding=(0, 1, 0, 0))
        for name in (
            "run",
            *(_SHORT.get(name, name) for name in self._columns),
            "epoch",
            "top-1",
            "best",
            "s",
            "status",
        ):
            table.add_column(name, justify="left" if name in ("run", "status") else "right", no_wrap=True)
        rows = sorted(self._records.values(), key=lambda run: (run.status != "running", -(run.best_top1 or -1.0)))
        for run in rows[: max(self._console.height - _CHROME_LINES, 1)]:
            table.add_row(
                f"{run.number:04d}" + (f" seed {run.seed}" if run.role == "finalist" else ""),
                *(shown(run.values.get(name)) for name in self._columns),
                f"{run.epochs}",
                *("" if x is None else f"{x:.2f}" for x in (run.last_top1, run.best_top1)),
                f"{run.seconds:.0f}",
                run.status,
                style=_STYLES[run.status],
            )
        failed = [f"{run.number:04d} failed: {run.reason}" for run in self._records.values() if run.reason]
        last = Text(failed[-1] if failed else "", no_wrap=True, overflow="ellipsis", style=_STYLES["failed"])
        return Group(self._summary(), table, last)

    def _summary(self) -> str:
        counts = dict.fromkeys(_STYLES, 0)
        for run in self._records.values():
            counts[run.status] += 1
        return ", ".join(f"{count} {status}" for status, count in counts.items() if count)


def shown(value: Any) -> str:
    """A varied value as the tables write it."""
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def print_sweep(folder: Path, results: dict[str, Any]) -> None:
    """Say what a sweep found and where everything lies."""
    console = rich.console.Console(highlight=False, soft_wrap=True)
    winner = results["winner"]
    values = ", ".join(f"{name} {shown(value)}" for name, value in winner["values"].items())
    console.print(f"[bold]{escape(folder.name)}[/]: configuration {winner['number']:04d} ({values})")
    console.print(f"  held-out images  {mean_and_std(winner['search_top1'])}")
    console.print(f"  validation split {mean_and_std(winner['val_top1'])}, {looked_at(results['val_looked_at'])}")
    for lost in results["finalists_failed"]:
        console.print(f"  {lost}; the same command trains it again", style="yellow", markup=False)
    for name, file in (("recipe", "best.json"), ("report", "report.html"), ("every run", "trials.csv")):
        console.print(f"  {name:<16} {folder / file}", markup=False)
    console.print(f"  {'curves':<16} tensorboard --logdir {shlex.quote(str(folder))}", markup=False)


def mean_and_std(found: dict[str, Any]) -> str:
    """`85.12 ± 0.31 % (3 seeds)`."""
    spread = "" if found["std"] is None else f" ± {found['std']:.2f}"
    return f"{found['mean']:.2f}{spread} % ({found['seeds']} seed{'s' * (found['seeds'] > 1)})"


def looked_at(numbers: Sequence[int]) -> str:
    """How often the validation split was used, in words."""
    if len(numbers) == 1:
        return "looked at for this one only"
    return f"looked at for {len(numbers)} configurations in the course of the sweep"
