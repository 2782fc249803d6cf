"""Accuracy by class, and the picture of which class is taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from diffvit.analysis.panels import take_literally

_NAMED_CLASSES = 30
"""More than these are not written at the axes."""

Counts = npt.NDArray[np.int64]


def per_class(confusion: Counts, classes: Sequence[str]) -> list[dict[str, Any]]:
    """For each class with images: how many, top-1 (recall) and precision in percent, and what it is most taken for.

    Args:
        confusion: (C, C), rows the true class, columns the predicted one.
        classes: C names.
    """
    rows = []
    for label, name in enumerate(classes):
        images, predicted = int(confusion[label].sum()), int(confusion[:, label].sum())
        if not images:
            continue
        others = np.delete(confusion[label], label)
        taken_for = int(np.delete(np.arange(len(classes)), label)[others.argmax()]) if others.any() else None
        rows.append(
            {
                "class": name,
                "images": images,
                "top1": 100 * int(confusion[label, label]) / images,
                "precision": 100 * int(confusion[label, label]) / predicted if predicted else None,
                "most_taken_for": classes[taken_for] if taken_for is not None else None,
            }
        )
    return rows


def confusion_figure(confusion: Counts, classes: Sequence[str]) -> Figure:
    """Share of each true class (row) that is predicted as each class (column)."""
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = min(max(len(classes) * 0.4, 4), 12)
    figure = Figure(figsize=(side + 1.5, side))
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if len(classes) <= _NAMED_CLASSES:
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 12:
        for row, column in np.argwhere(confusion > 0):
            shade = "black" if shares[row, column] > 0.6 else "white"
            axes.text(column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", color=shade, size=8)
    figure.colorbar(image, ax=axes, label="share of the true class")
    take_literally(figure)
    figure.tight_layout()
    return figure
