"""The figures of a comparison, drawn from what `compare.json` holds and from nothing else."""

from __future__ import annotations

from functools import partial
from typing import Any

from matplotlib.axes import Axes

from diffvit.analysis.attention_figures import boxes, compositions, head_figures, lambdas, similarity
from diffvit.analysis.panels import FigureRow, Result, arm_numbers, arm_style, draw_lines, make_panel
from diffvit.analysis.robustness import STRENGTHS


def draw(result: Result) -> list[FigureRow]:
    """Every figure that the result has data for."""
    rows = [
        accuracy(result),
        learning_curves(result),
        robustness(result),
        *similarity(result),
        head_figures(result),
        compositions(result),
        boxes(result),
        lambdas(result),
    ]
    return [row for row in rows if row.panels]


def accuracy(result: Result) -> FigureRow:
    """Top-1 of each run, and the intervals of the differences."""
    arms, numbers = result["arms"], arm_numbers(result)
    means = ", ".join(f"{name} {arm['top1']['mean']:.2f} %" for name, arm in arms.items())
    panels = [make_panel(partial(_dots, arms=arms), title="top-1 by run", x="", y="top-1 (%)", text=f"Means: {means}")]
    found = {name: arm["top1_difference"] for name, arm in arms.items() if arm["top1_difference"]}
    if found:
        text = "; ".join(
            f"{name} {d['difference']:+.2f} ({d['low']:+.2f} to {d['high']:+.2f})" for name, d in found.items()
        )
        panels.append(
            make_panel(
                partial(_intervals, found=found, numbers=numbers),
                title=f"difference to {result['baseline']}, 95 % interval",
                x="percentage points of top-1",
                y="",
                text=text,
            )
        )
    return FigureRow(
        "accuracy",
        "Accuracy",
        "A point is a run and the line its arm's mean; an interval that crosses zero means that the arm is not shown "
        "to differ from the baseline.",
        panels,
    )


def _dots(axes: Axes, arms: dict[str, Any]) -> None:
    for number, arm in enumerate(arms.values()):
        style = arm_style(number) | {"linestyle": "none"}
        seeds = arm["top1"]["per_seed"]
        axes.plot([number] * len(seeds), seeds, **style)
        axes.hlines(arm["top1"]["mean"], number - 0.25, number + 0.25, color=style["color"])
    axes.set_xticks(range(len(arms)), list(arms))
    axes.margins(x=0.2, y=0.15)


def _intervals(axes: Axes, found: dict[str, dict[str, float]], numbers: dict[str, int]) -> None:
    for place, (name, interval) in enumerate(found.items()):
        style = arm_style(numbers[name])
        axes.hlines(place, interval["low"], interval["high"], color=style["color"], linewidth=3)
        axes.plot(interval["difference"], place, color=style["color"], marker=style["marker"], markersize=8)
    axes.axvline(0, color="0.4", linewidth=1)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)


def learning_curves(result: Result) -> FigureRow:
    """Validation top-1 and both losses by step, where the runs recorded them."""
    wanted = {
        "val/top1": ("validation top-1", "top-1 (%)"),
        "train/loss": ("training loss", "loss"),
        "val/loss": ("validation loss", "loss"),
    }
    panels = []
    for tag, (title, y) in wanted.items():
        if any(tag in curves for arm in result["arms"].values() for curves in arm["curves"].values()):
            panels.append(make_panel(partial(_by_step, arms=result["arms"], tag=tag), title=title, x="step", y=y))
    return FigureRow(
        "curves",
        "Learning curves",
        "A line is a run and its colour the arm: arms whose bundles of lines overlap learn alike.",
        panels,
    )


def _by_step(axes: Axes, arms: dict[str, Any], tag: str) -> None:
    for number, (name, arm) in enumerate(arms.items()):
        style = arm_style(number) | {"marker": "", "linewidth": 1.2, "alpha": 0.85}
        drawn = [curves[tag] for curves in arm["curves"].values() if tag in curves]
        for i, points in enumerate(drawn):
            axes.plot(*zip(*points, strict=True), label=name if i == 0 else None, **style)
    axes.legend(frameon=False, fontsize=9)


def robustness(result: Result) -> FigureRow:
    """Top-1 by the strength of each corruption."""
    units = {
        "noise": "standard deviation over the full range",
        "blur": "sigma over the image's side",
        "occlusion": "share of patches covered",
    }
    panels = []
    for kind, strengths in STRENGTHS.items():
        x = (0.0, *strengths)
        series = {name: (x, [s["mean"] for s in arm["robustness"][kind]]) for name, arm in result["arms"].items()}
        paint = partial(draw_lines, series=series, numbers=arm_numbers(result))
        panels.append(make_panel(paint, title=kind, x=units[kind], y="top-1 (%)"))
    return FigureRow(
        "robustness",
        "Robustness",
        "From left to right images get worse: the line that falls less, from the same height, is the more robust arm "
        f"(mean over seeds, {result['robustness_images']:,} images).",
        panels,
    )
