"""Figures of what happens inside: similarity of layers, attention by layer, lambda."""

from __future__ import annotations

from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from diffvit.analysis.panels import FigureRow, Panel, Result, arm_numbers, arm_style, draw_lines, make_panel

_WITHOUT = "without high-norm tokens"
_MATRIX_STREAM = "patch mean"
_HEAD_FIGURES = {
    "entropy_1_relative": ("entropy of the first map", "share of log N", False),
    "entropy_2_relative": ("entropy of the second map", "share of log N", False),
    "negative_share": ("negative weight", "share of |A|", False),
    "high_norm_mass": ("attention on high-norm tokens", "share of |A|", False),
    "distance_pixels": ("mean attention distance", "pixels", False),
    "head_similarity": ("similarity of heads", "cosine of maps", False),
    "largest_logit": ("largest attention logit", "|q k' / sqrt K|", True),
    "largest_activation": ("largest activation", "|x|", True),
}


def similarity(result: Result) -> list[FigureRow]:
    """CKA at the same depth beside its floor, for each stream, and whole matrices of one stream."""
    records = result["cka"]
    streams = list(dict.fromkeys(r["stream"] for r in records))
    if not any(arm["high_norm_share"]["mean"] for arm in result["arms"].values()):
        streams = [s for s in streams if not s.endswith(_WITHOUT)]  # nothing was left out: the same lines again
    panels = []
    for stream in streams:
        lines = [r for r in records if r["stream"] == stream and r["kind"] != "within" and r["same_depth"]]
        if lines:
            paint = partial(_same_depth, lines=lines, numbers=arm_numbers(result))
            panels.append(make_panel(paint, title=stream, x="layer", y="CKA"))
    kinds = ("within", "floor", "across")
    matrices = [_matrix(r) for kind in kinds for r in records if (r["stream"], r["kind"]) == (_MATRIX_STREAM, kind)]
    return [
        FigureRow(
            "cka",
            "Are the representations alike?",
            "Grey lines compare two arms, coloured ones an arm with itself under other seeds (the floor): only where "
            "grey lies below colour do the arms differ by more than the seed makes them differ.",
            panels,
        ),
        FigureRow(
            "cka_matrices",
            f"Every layer with every layer ({_MATRIX_STREAM})",
            "Bright is alike: a bright diagonal means that the same depth does the same work, a bright block that "
            "neighbouring layers hardly change what they are handed.",
            matrices,
        ),
    ]


def _same_depth(axes: Axes, lines: list[dict[str, Any]], numbers: dict[str, int]) -> None:
    greys = iter((("0.15", "-"), ("0.4", "--"), ("0.6", "-."), ("0.5", ":")) * len(lines))
    for line in lines:
        y = np.array(line["same_depth"], dtype=float)
        if line["kind"] == "floor":
            axes.plot(y, label=f"{line['arm_a']}, two seeds", linewidth=1.2, **arm_style(numbers[line["arm_a"]]))
        else:
            colour, dashes = next(greys)
            axes.plot(y, label=f"{line['arm_a']} – {line['arm_b']}", color=colour, linestyle=dashes, linewidth=2)
    axes.set_ylim(min(0, axes.get_ylim()[0]), 1.05)
    axes.legend(frameon=False, fontsize=8)


def _matrix(record: dict[str, Any]) -> Panel:
    a, b = record["arm_a"], record["arm_b"]
    kind = {"floor": f"{a}, two seeds", "within": f"{a}, one run", "across": f"{a} – {b}"}[record["kind"]]

    def paint(axes: Axes) -> None:
        image = axes.imshow(np.array(record["matrix"], dtype=float), cmap="viridis", vmin=0, vmax=1, origin="lower")
        axes.figure.colorbar(image, ax=axes, label="CKA")

    return make_panel(paint, title=kind, x=f"layer of {b}", y=f"layer of {a}", text=f"CKA of all layers, {kind}")


def head_figures(result: Result) -> FigureRow:
    """Each figure of attention noise by layer."""
    return FigureRow(
        "attention",
        "What attention does, layer by layer",
        "The first layer is on the left; a line is an arm's mean over heads and seeds (of the largest logit and "
        "activation, the largest head), and how far its runs lie apart is in the table below.",
        [panel for name in _HEAD_FIGURES for panel in _by_layer(result, name, *_HEAD_FIGURES[name])],
    )


def compositions(result: Result) -> FigureRow:
    """Attention on objects pasted on clutter."""
    return FigureRow(
        "compositions",
        "Does attention find the object?",
        "Objects cut from the middle of images lie on clutter made of other images, so it is known which patches are "
        "theirs: a lift of 1 is what looking blindly would give, 2 is twice the attention that the area accounts for.",
        _by_layer(result, "inside_lift", "attention on the object", "times its area", False),
    )


def boxes(result: Result) -> FigureRow:
    """Attention in the boxes that were given."""
    return FigureRow(
        "boxes",
        "Does attention find what was boxed?",
        "Somebody drew boxes around the objects: a lift of 1 is what looking blindly would give, 2 is twice the "
        "attention that the boxes' area accounts for.",
        _by_layer(result, "box_lift", "attention in the boxes", "times their area", False),
    )


def _by_layer(result: Result, name: str, title: str, unit: str, log: bool) -> list[Panel]:
    series = {
        arm: (range(len(found["noise"][name]["per_layer"])), found["noise"][name]["per_layer"])
        for arm, found in result["arms"].items()
        if name in found["noise"]
    }
    if not any(value for _, values in series.values() for value in values):
        return []  # None where there is nothing to compare, 0 where no token is high
    return [
        make_panel(
            partial(draw_lines, series=series, numbers=arm_numbers(result)), title=title, x="layer", y=unit, log=log
        )
    ]


def lambdas(result: Result) -> FigureRow:
    """Lambda over depth for every differential arm, and over training where runs recorded it."""
    panels = _by_layer(result, "effective_lambda", "lambda over depth", "mean over tokens and heads", False)
    for name, arm in result["arms"].items():
        seed, curves = next(iter(arm["curves"].items()), ("", {}))
        recorded = {tag: points for tag, points in sorted(curves.items()) if tag.startswith("lambda/")}
        if recorded:
            paint = partial(_over_training, recorded=recorded)
            panels.append(make_panel(paint, title=f"{name}, seed {seed}: over training", x="step", y="lambda"))
    return FigureRow(
        "lambda",
        "How much is subtracted",
        "Lambda is what the second map is multiplied by before it is subtracted: 0 would be plain attention.",
        panels,
    )


def _over_training(axes: Axes, recorded: dict[str, list[list[float]]]) -> None:
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(recorded)))
    for number, (tag, points) in enumerate(recorded.items()):
        ends = number in (0, len(recorded) - 1)
        label = f"layer {int(tag.rsplit('_', 1)[1])}" if ends else None
        axes.plot(*zip(*points, strict=True), color=colours[number], linewidth=1.2, label=label)
    axes.legend(frameon=False, fontsize=9)
