"""The pieces that figures are made of: panels, small enough for a phone, in rows.

A panel is a picture of its own, so that a page can put panels below each other where it is narrow. Colours: Okabe and
Ito's, told apart by the colour-blind; arms also differ in line and marker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, MaxNLocator

Result = Mapping[str, Any]
"""What `compare` returns."""

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_PANEL_INCHES = (4.2, 3.1)


@dataclass(frozen=True)
class Panel:
    """One picture; `text` says in words what it shows, for those who do not see it."""

    text: str
    figure: Figure


@dataclass(frozen=True)
class FigureRow:
    """Panels with a title and one sentence on how to read them; `name` serves for files."""

    name: str
    title: str
    how_to_read: str
    panels: list[Panel]


def make_panel(
    paint: Callable[[Axes], None], *, title: str, x: str, y: str, text: str | None = None, log: bool = False
) -> Panel:
    """A panel with axes that `paint` fills."""
    figure = Figure(figsize=_PANEL_INCHES, layout="constrained")
    axes = figure.subplots()
    paint(axes)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    if log:
        axes.set_yscale("log")
        for each in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            each(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    if x == "layer":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    take_literally(figure)
    return Panel(text or f"{title}: {y} by {x}", figure)


def take_literally(figure: Figure) -> None:
    """Have a `$` in the name of a run or a class stand for itself: between two of them matplotlib reads a formula."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)


def arm_style(number: int) -> dict[str, Any]:
    """Colour, line and marker of arm `number`, from 0."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _LINES[number % len(_LINES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 4,
    }


def arm_numbers(result: Result) -> dict[str, int]:
    return {arm: number for number, arm in enumerate(result["arms"])}


def draw_lines(
    axes: Axes, series: Mapping[str, tuple[Sequence[float], Sequence[float | None]]], numbers: Mapping[str, int]
) -> None:
    """One line (x, y) for each name, in the style of its number; None leaves a gap."""
    for name, (x, y) in series.items():
        axes.plot(x, np.array(y, dtype=float), label=name, **arm_style(numbers[name]))
    if series:
        axes.legend(frameon=False, fontsize=9)
