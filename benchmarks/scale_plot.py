"""The predictions of `scale.py` as one picture: speed under its ceilings, and what time costs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scale_model import Prediction

_STYLES = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", ":"), ("#CC79A7", "D", "-."))
"""Okabe and Ito's colours, told apart by every kind of colour vision; marker and dashes tell them apart in grey."""

_RC = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def draw(path: Path, runs: Mapping[str, Sequence[Prediction]], ceilings: Mapping[str, float]) -> None:
    """Write a PNG: lines of at most four `runs` by name, and horizontal `ceilings` in images/s."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(9, 3.7), layout="constrained", dpi=100)
        speed, cost = figure.subplots(1, 2)
        for number, (name, predictions) in enumerate(runs.items()):
            colour, marker, dashes = _STYLES[number]
            style: dict[str, Any] = {
                "color": colour,
                "marker": marker,
                "linestyle": dashes,
                "markersize": 4,
                "label": name,
            }
            speed.plot([p.gpus for p in predictions], [p.images_per_second for p in predictions], **style)
            cost.plot([p.hours for p in predictions], [p.dollars for p in predictions], **style)
            if number in (0, len(runs) - 1):  # those between lie close to the first
                for p in (predictions[0], predictions[len(predictions) // 3], predictions[-1]):
                    at = (p.hours, p.dollars)
                    cost.annotate(f"{p.gpus}", at, xytext=(-4, 5), textcoords="offset points", fontsize=8, ha="right")
        _draw_ceilings(speed, ceilings)
        speed.set_xscale("log", base=2)
        speed.set(xlabel="GPUs", ylabel="images/s", yscale="log", title="speed, and what caps it")
        speed.xaxis.set_major_formatter("{x:.0f}")
        cost.set(xlabel="hours", ylabel="$", xscale="log", yscale="log", title="90 epochs; the numbers are GPUs")
        cost.legend(loc="upper right", frameon=False, fontsize=8)
        figure.suptitle("Prediction, not a measurement: ViT-S/16 on ImageNet", fontsize=10)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
    with Image.open(drawn) as picture:  # few colours make a small file
        picture.convert("RGB").quantize(64).save(path, optimize=True)


def _draw_ceilings(axes: Axes, ceilings: Mapping[str, float]) -> None:
    for name, images_per_second in ceilings.items():
        axes.axhline(images_per_second, color="0.5", linewidth=0.8)
        style: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "fontsize": 8, "color": "0.3"}
        axes.annotate(name, (1, images_per_second), xycoords=axes.get_yaxis_transform(), xytext=(0, 2), **style)
