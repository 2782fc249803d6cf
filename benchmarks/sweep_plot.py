"""What the searches of `sweep.py` had found by the time they had spent so much, as one picture."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

_STYLES = (("#0072B2", "-"), ("#009E73", ":"), ("#CC79A7", "-."), ("#D55E00", "--"))
"""Okabe and Ito's colours, told apart by every kind of colour vision; dashes tell them apart in grey."""
_RC = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
_BANDS = (0, 3)
"""Of the methods, those that are compared: their standard error is drawn."""

Curves = Mapping[str, npt.NDArray[np.float64]]
"""(searches, epochs of the budget) by method."""


def draw(path: Path, panels: Mapping[str, Curves]) -> None:
    """Write a PNG: a panel by title, in it the mean over searches of each method against the epochs trained."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=100)
        all_axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
        for axes, (title, curves) in zip(all_axes, panels.items(), strict=True):
            for number, (name, found) in enumerate(curves.items()):
                colour, dashes = _STYLES[number]
                epochs, mean = np.arange(1, found.shape[1] + 1), found.mean(axis=0)
                axes.plot(epochs, mean, color=colour, linestyle=dashes, label=name)
                if number in _BANDS and len(found) > 1:
                    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
                    axes.fill_between(epochs, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
            axes.axvline(found.shape[1] / 3, color="0.5", linewidth=0.8)
            axes.annotate("a third", (found.shape[1] / 3, 0.02), xycoords=axes.get_xaxis_transform(), xytext=(3, 0),
                          textcoords="offset points", fontsize=8, color="0.3")  # fmt: skip
            axes.set(title=title, xlabel="epochs trained, all trials together")
            low = min(found[:, found.shape[1] // 8].mean() for found in curves.values())
            high = max(found.mean(axis=0).max() for found in curves.values())
            axes.set_ylim(low - 0.2, high + 0.5)
        all_axes[0].set_ylabel("top-1 %, mean of the searches")
        all_axes[0].legend(loc="lower right", frameon=False, fontsize=8)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
    with Image.open(drawn) as picture:  # few colours make a small file
        picture.convert("RGB").quantize(64).save(path, optimize=True)
