"""A comparison on disk: `compare.json`, its figures, and `report.html`, one page that needs nothing beside it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from diffvit.analysis.findings import findings, signed
from diffvit.analysis.panels import FigureRow, Panel, Result
from diffvit.analysis.statistics import mean_and_std
from diffvit.config import VARIANT_NAMES
from diffvit.storage import Storage

RESULT_NAME = "compare.json"
REPORT_NAME = "report.html"
FIGURES_FOLDER = "figures"

_NOISE_ROWS = {
    "entropy_1": ("entropy of the first map, nats", 2),
    "entropy_2": ("entropy of the second map, nats", 2),
    "negative_share": ("negative weight, share of |A|", 3),
    "high_norm_mass": ("attention on high-norm tokens, share of |A|", 3),
    "distance_pixels": ("mean attention distance, pixels", 2),
    "inside_lift": ("attention on the object, times its area", 2),
    "box_lift": ("attention in the boxes, times their area", 2),
    "box_mass": ("attention in the boxes, share of |A|", 3),
    "head_similarity": ("similarity of heads, cosine", 2),
    "effective_lambda": ("effective lambda", 3),
    "largest_logit": ("largest logit, mean over layers", 1),
    "largest_activation": ("largest activation, mean over layers", 1),
    "largest_activation_to_rms": ("… over root mean square", 1),
}


@dataclass(frozen=True)
class Image:
    """A picture and what it shows in words."""

    text: str
    svg: bytes

    @property
    def source(self) -> str:
        """For an `img` that brings its picture along."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode()


@dataclass(frozen=True)
class DrawnRow:
    """A `FigureRow` as pictures."""

    name: str
    title: str
    how_to_read: str
    images: list[Image]


def write_result(result: Result, folder: Path) -> None:
    """Write `compare.json` into `folder`, whole or not at all."""
    Storage(str(folder)).write(RESULT_NAME, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())


def write_report(result: Result, drawn: Sequence[FigureRow], folder: Path) -> Path:
    """Write `figures/*.svg` and `report.html` into `folder`, which is a comparison's; returns the page's path.

    `drawn` are the figures of `result` (`diffvit.analysis.figures.draw`); those of an earlier one are deleted.
    """
    rows = [DrawnRow(row.name, row.title, row.how_to_read, [_svg(panel) for panel in row.panels]) for row in drawn]
    (folder / FIGURES_FOLDER).mkdir(parents=True, exist_ok=True)
    for figure in (folder / FIGURES_FOLDER).glob("*_*.svg"):
        if figure.stem.rpartition("_")[2].isdecimal():
            figure.unlink()
    for row in rows:
        for number, image in enumerate(row.images):
            (folder / FIGURES_FOLDER / f"{row.name}_{number}.svg").write_bytes(image.svg)
    page = folder / REPORT_NAME
    page.write_text(render(result, rows), encoding="utf-8")
    return page


def render(result: Result, rows: Sequence[DrawnRow]) -> str:
    """The page as a string; every value that is filled in is escaped."""
    environment = Environment(
        loader=PackageLoader("diffvit.analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"spread": spread, "signed": signed}
    arms: dict[str, Any] = result["arms"]
    return environment.get_template("report.html").render(
        result=result,
        arms=arms,
        findings=findings(result),
        variants=VARIANT_NAMES,
        noise_rows={
            name: shown for name, shown in _NOISE_ROWS.items() if any(name in arm["noise"] for arm in arms.values())
        },
        worsened={name: _worsened(arm) for name, arm in arms.items()},
        rows=rows,
    )


def spread(values: dict[str, Any], digits: int, times: float = 1) -> str:
    """'84.30 ± 0.21' (no line is broken behind ±) of what `mean_and_std` gives, and the mean alone of a single run."""
    if values["mean"] is None:
        return "–"
    mean = f"{times * values['mean']:.{digits}f}"
    return mean if values["std"] is None else f"{mean} ±\u00a0{times * values['std']:.{digits}f}"


def _worsened(arm: dict[str, Any]) -> dict[str, Any]:
    """Each run's mean top-1 over the kinds and severities of corruption."""
    values = [severity["per_seed"] for kind in arm["robustness"].values() for severity in kind[1:]]
    return mean_and_std([sum(run) / len(run) for run in zip(*values, strict=True)])


def _svg(panel: Panel) -> Image:
    """SVG stays sharp at any width. Without its date, so that the same result gives the same page."""
    buffer = io.BytesIO()
    panel.figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Image(panel.text, buffer.getvalue())
