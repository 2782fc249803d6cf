"""The figures of a sweep's report, as SVG: made from its records, readable in grey and at the width of a phone."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diffvit.search.records import Candidate, Record, ranked
from diffvit.search.space import LOG_SCALE

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#8C8C8C"  # Okabe and Ito: told apart by every kind of colour vision
_SCALE = colormaps["cividis"]
_CATEGORIES = ("variant", "num_heads", "patch_size")
_WIDTH, _HEIGHT = 4.4, 3.1  # inches: at the width of a phone the text stays readable
_STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "diffvit"}


@dataclass(frozen=True)
class Scale:
    """Where the values of a varied field lie on an axis from 0 to 1."""

    name: str
    values: tuple[Any, ...]

    def place(self, value: Any) -> float:
        """Categories evenly; numbers in proportion, on a log scale where the search's is; 'depth' above constants."""
        if self.name in _CATEGORIES:
            return self._distinct.index(value) / max(len(self._distinct) - 1, 1)
        if isinstance(value, str):
            return 1.0
        low, high = self._transformed(min(self._numbers)), self._transformed(max(self._numbers))
        share = (self._transformed(value) - low) / (high - low) if high > low else 0.5
        return share * (0.85 if len(self._numbers) < len(self.values) else 1.0)

    def ticks(self) -> list[tuple[float, str]]:
        """(place, label) of a few values, the lowest and the highest among them."""
        if self.name in _CATEGORIES:
            return [(self.place(value), str(value)) for value in self._distinct]
        words = [(1.0, "depth")] if len(self._numbers) < len(self.values) else []
        if not self._numbers:
            return words
        low, high = min(self._numbers), max(self._numbers)
        middle = math.sqrt(low * high) if self.name in LOG_SCALE else (low + high) / 2
        return [*((self.place(x), f"{x:.2g}") for x in dict.fromkeys((low, middle, high))), *words]

    @property
    def _numbers(self) -> list[float]:
        return [value for value in self.values if not isinstance(value, str)]

    @property
    def _distinct(self) -> list[Any]:
        return sorted(set(self.values))

    def _transformed(self, value: float) -> float:
        return math.log(value) if self.name in LOG_SCALE else value


def parallel_coordinates(records: Sequence[Record], columns: Sequence[str]) -> str:
    """A line a trial through the values it had, to what it reached."""
    usable = [run for run in records if run.counts and run.best_top1 is not None]
    top1 = [run.best_top1 or 0.0 for run in usable]
    colours, heights = Normalize(min(top1), max(top1)), Normalize(min(top1), max(top1))
    scales = [Scale(name, tuple(run.values[name] for run in usable if name in run.values)) for name in columns]
    figure, axes = _figure()
    for run, reached in sorted(zip(usable, top1, strict=True), key=lambda pair: pair[1]):
        points = [
            (x, scale.place(run.values[scale.name])) for x, scale in enumerate(scales) if scale.name in run.values
        ]
        points.append((len(scales), float(heights(reached))))
        colour = _SCALE(1 - 0.95 * float(colours(reached)))
        axes.plot(*_columns(points), color=colour, linestyle="-" if run.status == "finished" else ":", linewidth=1.6)
    for x, scale in enumerate(scales):
        _write_ticks(axes, x, scale.ticks())
    _write_ticks(axes, len(scales), [(0.0, f"{min(top1):.1f}"), (1.0, f"{max(top1):.1f}")])
    names = [name.replace("_", "\n") for name in columns]  # side by side they would run into each other
    axes.set_xticks(range(len(scales) + 1), [*names, "top-1 %"])
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.12)
    return _svg(figure)


def slices(records: Sequence[Record], columns: Sequence[str]) -> dict[str, str]:
    """For each varied field, its value against what the trials reached."""
    usable = [run for run in records if run.counts]
    figures = {}
    for name in columns:
        having = [run for run in usable if name in run.values]
        if not having:
            continue
        scale = Scale(name, tuple(run.values[name] for run in having))
        figure, axes = _figure(width=3.8, height=2.7)
        for status, face in (("finished", _BLUE), ("stopped", "none")):
            points = [(scale.place(r.values[name]), r.best_top1 or 0.0) for r in having if r.status == status]
            if points:
                axes.scatter(*_columns(points), facecolor=face, edgecolor=_BLUE, s=28, label=status)
        axes.set_xticks([place for place, _ in scale.ticks()], [label for _, label in scale.ticks()])
        axes.set_xlabel(name)
        axes.set_ylabel("best top-1 %")
        figures[name] = _svg(figure)
    return figures


def importance(shares: dict[str, float]) -> str:
    """A bar a parameter, the most important on top."""
    figure, axes = _figure(height=0.5 + 0.4 * len(shares))
    names = list(reversed(shares))
    bars = axes.barh(names, [shares[name] for name in names], color=_BLUE)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_xlim(0, 1.1)
    axes.set_xlabel("share of importance")
    return _svg(figure)


def learning_curves(records: Sequence[Record]) -> str:
    """Top-1 by epoch: the best trial, those that came to their end, and those that ASHA stopped."""
    figure, axes = _figure()
    best = ranked(records, ["top1"])[0]
    for run in records:
        if not run.history:
            continue
        is_best = run.number == best.number
        colour = _ORANGE if is_best else _BLUE if run.status == "finished" else _GREY
        points = [(entry["epoch"], entry["top1"]) for entry in run.history]
        axes.plot(
            *_columns(points),
            color=colour,
            linewidth=2.4 if is_best else 1.0,
            linestyle="-" if run.status == "finished" else "--",
            marker="o",
            markersize=4 if is_best else 2.5,
            zorder=3 if is_best else 2 if run.status == "finished" else 1,
            label=f"best, {run.number:04d}" if is_best else None,
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel("top-1 %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return _svg(figure)


def best_so_far(records: Sequence[Record]) -> tuple[list[int], list[float]]:
    """Epochs trained over all trials, and the best top-1 seen by then, in the order in which they happened."""
    entries = sorted((entry["at"], entry["top1"]) for run in records for entry in run.history)
    best = 0.0
    found = [best := max(best, top1) for _, top1 in entries]
    return list(range(1, len(entries) + 1)), found


def budget(records: Sequence[Record]) -> str:
    """What was spent against what was found."""
    figure, axes = _figure()
    spent, found = best_so_far(records)
    axes.step(spent, found, where="post", color=_BLUE, linewidth=2)
    axes.set_xlabel("epochs trained, all trials together")
    axes.set_ylabel("best top-1 % so far")
    return _svg(figure)


def finalists(found: Sequence[Candidate]) -> str:
    """Top-1 of every seed of every finalist, and their means."""
    figure, axes = _figure(height=0.9 + 0.45 * len(found))
    for place, candidate in enumerate(reversed(found)):
        axes.scatter(candidate.top1, [place] * len(candidate.top1), facecolor="none", edgecolor=_BLUE, s=36)
        axes.scatter([candidate.mean], [place], marker="|", color=_ORANGE, s=300, linewidth=3)
    axes.set_yticks(range(len(found)), [f"{candidate.number:04d}" for candidate in reversed(found)])
    axes.set_xlabel("top-1 % after the last epoch; bar: mean")
    axes.margins(y=0.3)
    return _svg(figure)


def pareto(records: Sequence[Record]) -> str:
    """Accuracy against the time of one image; the front joined by a line."""
    figure, axes = _figure()
    usable = [run for run in records if run.counts and run.latency_ms is not None]
    front = [_point(run) for run in ranked(usable, ["top1", "latency"])]
    axes.scatter(*_columns([_point(run)[:2] for run in usable]), color=_GREY, s=22)
    axes.plot(*_columns(sorted(point[:2] for point in front)), color=_ORANGE, marker="o", linewidth=1.5)
    for ms, top1, name in front:
        axes.annotate(name, (ms, top1), xytext=(3, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("ms an image")
    axes.set_ylabel("best top-1 %")
    return _svg(figure)


def _point(run: Record) -> tuple[float, float, str]:
    return run.latency_ms or 0.0, run.best_top1 or 0.0, f"{run.number:04d}"


def _columns(points: Sequence[tuple[float, ...]]) -> tuple[list[float], list[float]]:
    """Two lists of what came in pairs."""
    return [point[0] for point in points], [point[1] for point in points]


def _figure(width: float = _WIDTH, height: float = _HEIGHT) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots()


def _write_ticks(axes: Axes, x: float, ticks: Sequence[tuple[float, str]]) -> None:
    axes.axvline(x, color="black", linewidth=0.8)
    for place, label in ticks:
        axes.annotate(label, (x, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9,
                      bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1})  # fmt: skip


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
