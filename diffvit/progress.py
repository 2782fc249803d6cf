"""What the jobs that only go through images show in the terminal: a bar, and what came out."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import rich.console
import rich.progress
from rich.table import Table

from diffvit.data.shards import INFO_NAME, QUARANTINE_NAME, DatasetInfo

_CLASSES_SHOWN = 20
_EXTENSIONS_SHOWN = 8
_LINE_EVERY_SECONDS = 10.0
"""Between lines where the terminal cannot redraw one."""


class Progress:
    """A bar for each thing that is done; lines now and then where the terminal cannot redraw."""

    def __init__(self) -> None:
        self._console = rich.console.Console(highlight=False, soft_wrap=True)
        self._bars = rich.progress.Progress(
            rich.progress.TextColumn("{task.description:<10}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
        )
        self._tasks: dict[str, rich.progress.TaskID] = {}
        self._last_line = 0.0
        self._seen: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, what: str, done: int, total: int) -> None:
        """`done` of `total` parts of `what`."""
        self._seen[what] = (self._seen.get(what, (done, done))[0], done)
        if self._console.is_terminal:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=total)
            self._bars.update(self._tasks[what], completed=done)
        elif done == total or time.monotonic() - self._last_line >= _LINE_EVERY_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(f"{what:<10} {done:,} of {total:,}")

    def done(self, what: str) -> int:
        """Parts of `what` done since it was first shown: without those that an earlier call had done."""
        first, last = self._seen.get(what, (0, 0))
        return last - first


def print_dataset(out: str, info: DatasetInfo, seconds: float, packed: int) -> None:
    """What a prepared data set holds, and what was left out; `packed` images of it in the `seconds` of this call."""
    console = rich.console.Console(highlight=False, soft_wrap=True, markup=False)  # names may have brackets
    images = sum(split.images for split in info.splits.values())
    shards = [shard for split in info.splits.values() for shard in split.shards]
    counts = info.splits["train"].class_counts
    empty = [name for name, count in zip(info.classes, counts, strict=True) if not count]
    table = Table(show_header=False, box=None)
    rows = {
        "data set": f"{out.rstrip('/')}/{INFO_NAME}",
        "images": f"{images:,}: " + ", ".join(f"{split.images:,} {name}" for name, split in info.splits.items()),
        "classes": f"{len(info.classes):,}"
        + (f", {len(empty)} of them without a training image: {', '.join(empty)}" if empty else ""),
        "size": f"{sum(shard.bytes for shard in shards) / 2**20:,.1f} MiB in {len(shards)} shards",
        "quarantined": f"{info.quarantined:,}" + (f" ({QUARANTINE_NAME} says why)" if info.quarantined else ""),
        "ignored": _counts(info.ignored),
        "took": f"{seconds:,.0f} s" + (f", {packed / seconds:,.0f} images/s" if packed else ""),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value, style="yellow" if name == "quarantined" and info.quarantined else "")
    console.print(table)


def _counts(ignored: dict[str, int]) -> str:
    """'7 files that are no images: 5 .txt, 2 .heic', the most frequent first."""
    if not ignored:
        return ""
    ranked = sorted(ignored.items(), key=lambda item: -item[1])
    named = ", ".join(f"{count:,} {extension}" for extension, count in ranked[:_EXTENSIONS_SHOWN])
    return f"{sum(ignored.values()):,} files that are no images: {named}" + (", …" * (len(ranked) > _EXTENSIONS_SHOWN))


def print_predictions(out: str, results: dict[str, Any]) -> None:
    """How many images were predicted and, where the truth is known, how well."""
    console = rich.console.Console(highlight=False, soft_wrap=True, markup=False)  # names may have brackets
    console.print(f"{results['images']:,} images predicted, in {out.rstrip('/')}/predictions", style="bold")
    if results["skipped"]:
        console.print(f"{results['skipped']:,} of them cannot be used; `reason` says why", style="yellow")
    if results.get("ignored"):
        console.print(f"ignored: {_counts(results['ignored'])}", style="yellow")
    if results.get("without_split"):
        others = results["without_split"]
        console.print(f"{others:,} others left out: the source does not say their split", style="yellow")
    if unknown := results.get("unknown_classes"):
        named = ", ".join([*unknown][:_CLASSES_SHOWN]) + (", …" * (len(unknown) > _CLASSES_SHOWN))
        console.print(f"{sum(unknown.values()):,} are of classes that the model does not know: {named}", style="yellow")
    if not results["labelled"]:
        return
    top5 = f", top-5 {results['top5']:.2f} %" if "top5" in results else ""
    console.print(f"top-1 {results['top1']:.2f} %{top5} of {results['labelled']:,} with a class")
    table = Table("class", "images", "top-1", "precision", "most taken for", box=None)
    ranked = sorted(results["classes"], key=lambda row: float(row["top1"]))
    for row in ranked[:_CLASSES_SHOWN]:
        precision = "" if row["precision"] is None else f"{row['precision']:.1f} %"
        cells = (f"{row['images']:,}", f"{row['top1']:.1f} %", precision, row["most_taken_for"] or "")
        table.add_row(row["class"], *cells)
    console.print(table)
    if len(ranked) > _CLASSES_SHOWN:
        console.print(f"the {_CLASSES_SHOWN} weakest of {len(ranked)} classes; predictions.json has all of them")
