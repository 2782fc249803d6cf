"""What a run shows in the terminal: a header, one live line, a row an epoch, and where everything lies."""

from __future__ import annotations

import shlex
import threading
import time
from types import TracebackType
from typing import Any

import rich.console
from ray.util.queue import Empty, Queue
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from diffvit.config import VARIANT_NAMES, RunConfig
from diffvit.data.datasets import Dataset
from diffvit.data.order import TrainPlan
from diffvit.training.notes import SKIPPED_FILE, LineFile

_LINE_EVERY_SECONDS = 5.0
"""Between progress lines where the terminal cannot redraw one."""
_SKIPPED_SHOWN = 10
_COLUMNS = (
    ("epoch", 6),
    ("step", 8),
    ("train loss", 11),
    ("train top-1", 12),
    ("val loss", 9),
    ("val top-1", 10),
    ("val top-5", 10),
    ("images/s", 9),
    ("data wait", 10),
)


class Console:
    """Shows what the workers put into `progress`, from a thread of its own, as long as the `with` block runs."""

    def __init__(self, config: RunConfig, dataset: Dataset, plan: TrainPlan, progress: Queue) -> None:
        self._config, self._dataset, self._plan, self._progress = config, dataset, plan, progress
        self._console = rich.console.Console(highlight=False, soft_wrap=True)
        self._live = Live(Text("starting workers …"), console=self._console, transient=True, auto_refresh=False)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show, name="console", daemon=True)
        self._last_line = time.monotonic()
        self._folder = config.location.partition("?")[0]
        self._images, self._skipped = LineFile(config.location, SKIPPED_FILE), 0

    def __enter__(self) -> Console:
        self._print_header()
        if self._console.is_terminal:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        self._images.flush()
        self._live.stop()

    def _print_header(self) -> None:
        model, scale = self._config.model, self._config.scale
        heads = f"{model.num_heads} head{'s' * (model.num_heads > 1)}"
        device = "GPU" if scale.gpu else "CPU"
        workers = scale.workers if isinstance(scale.workers, int) else "{} to {}".format(*scale.workers)
        self._console.print(
            f"[bold]{escape(self._config.name)}[/]: {VARIANT_NAMES[model.variant]}, {model.embed_dim} wide, "
            f"{model.depth} blocks, {heads}, {model.image_size} px in patches of {model.patch_size}"
        )
        self._console.print(
            f"{len(self._dataset.train):,} training and {len(self._dataset.val):,} validation images, "
            f"{len(self._dataset.classes)} classes; {workers} worker{'s' * (scale.max_workers > 1)} on {device}, "
            f"{self._plan.epochs} epochs of {self._plan.steps_per_epoch} steps"
        )
        watch = f"watch:  tensorboard --logdir {shlex.quote(self._folder.rpartition('/')[0])}"
        self._console.print(watch, style="dim", markup=False)
        self._console.print("".join(f"{name:>{width}}" for name, width in _COLUMNS), style="bold")

    def _show(self) -> None:
        while True:
            stopping = self._stop.is_set()
            try:
                kind, fields = self._progress.get(block=not stopping, timeout=0.5)
            except Empty:
                if stopping:
                    return
                self._images.flush_when_due()
                continue
            except Exception:  # the cluster is going down; the run's own error says why
                return
            show = {"step": self._show_step, "epoch": self._show_epoch, "skipped": self._show_skipped}
            show.get(kind, self._show_warning)(fields)

    def _show_step(self, fields: dict[str, Any]) -> None:
        line = (
            f"epoch {fields['epoch']}/{self._plan.epochs}  step {fields['step']}/{self._plan.total_steps}  "
            f"loss {fields['loss']:.3f}  {fields['images_per_second']:,.0f} images/s  "
            f"ETA {format_duration(fields['eta_seconds'])}"
        )
        if self._console.is_terminal:
            self._live.update(Text(line), refresh=True)
        elif time.monotonic() - self._last_line >= _LINE_EVERY_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(line)

    def _show_epoch(self, fields: dict[str, Any]) -> None:
        cells = (
            f"{fields['epoch']}",
            f"{fields['step']}",
            f"{fields['train_loss']:.3f}",
            f"{fields['train_top1']:.2f} %",
            f"{fields['loss']:.3f}",
            f"{fields['top1']:.2f} %",
            f"{fields['top5']:.2f} %",
            f"{fields['images_per_second']:,.0f}",
            f"{100 * fields['data_wait_fraction']:.0f} %",
        )
        self._console.print("".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True)))

    def _show_skipped(self, fields: dict[str, Any]) -> None:
        for image in self._images.add(fields["images"]):
            self._skipped += 1
            if self._skipped <= _SKIPPED_SHOWN:
                self._console.print(f"skipped {image}", style="yellow", markup=False)
            elif self._skipped == _SKIPPED_SHOWN + 1:
                more = f"more are skipped; see {self._folder}/{SKIPPED_FILE}"
                self._console.print(more, style="yellow", markup=False)

    def _show_warning(self, fields: dict[str, Any]) -> None:
        self._console.print(fields["message"], style="yellow", markup=False)


def print_results(location: str, results: dict[str, Any]) -> None:
    """Say how the run at `location`, a path or a URL, ended and where everything lies."""
    folder = location.partition("?")[0]
    storage, _, name = folder.rpartition("/")
    console = rich.console.Console(highlight=False, soft_wrap=True)
    best, last = results["best"], results["last"]
    console.print(
        f"[bold]{escape(name)} {results['status']}[/]: "
        f"top-1 {last['top1']:.2f} % after the last epoch ({last['epoch']}), best {best['top1']:.2f} % "
        f"(epoch {best['epoch']}); {_duration(results)}"
    )
    if results["skipped_images"]:
        skipped = f"{results['skipped_images']} images were skipped: {folder}/{SKIPPED_FILE}"
        console.print(skipped, style="yellow", markup=False)
    rows = {
        "speed": _speed(results),
        "results": f"{folder}/results.json",
        "best checkpoint": f"{folder}/{best['checkpoint']}",
        "last checkpoint": f"{folder}/{last['checkpoint']}",
        "curves": f"tensorboard --logdir {shlex.quote(storage)}",
    }
    for title, value in rows.items():
        console.print(f"  {title:<16} {value}", markup=False)


def _duration(results: dict[str, Any]) -> str:
    """Of a run in one piece, or of its last sitting and of all training."""
    wall = format_duration(results["wall_seconds"])
    if not results.get("interruptions"):
        return f"{wall} in all"
    return f"{wall} since it was last started, {format_duration(results['train_seconds'])} of training in all"


def _speed(results: dict[str, Any]) -> str:
    """Of the last epoch."""
    text = f"{results['images_per_second']:,.0f} images/s"
    if "flops_per_second" in results:  # not in the results of an earlier version
        text += f", {format_flops(results['flops_per_second'])}"
    if results.get("utilisation"):
        text += f", {100 * results['utilisation']:.1f} % of the bf16 peak of {results['device']}"
    return text


def format_flops(per_second: float) -> str:
    """In GFLOP/s, or TFLOP/s from 1,000 of them."""
    giga = per_second / 1e9
    return f"{giga:,.1f} GFLOP/s" if giga < 1000 else f"{giga / 1000:,.1f} TFLOP/s"


def format_duration(seconds: float) -> str:
    """As 1h02m, or 2m03s below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s"
