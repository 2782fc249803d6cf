"""A run's folder read back for a comparison: its last checkpoint, its config and what it wrote to TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path

from diffvit.analysis.arms import FinishedRun
from diffvit.analysis.curves import Curves, read_curves
from diffvit.config import from_json
from diffvit.data.fingerprint import known_images
from diffvit.models.vit import VisionTransformer
from diffvit.models.weights import load_weights
from diffvit.storage import Storage


def load_run(folder: Path) -> FinishedRun:
    """The run in `<storage>/<name>` with the weights of its *last* checkpoint.

    Not of its best: that was chosen by its accuracy on the images that the comparison is made on.

    Raises:
        ValueError: no run, one that is not finished, or a damaged checkpoint.
    """
    try:
        results = json.loads((folder / "results.json").read_text())
        config = from_json((folder / "config.json").read_text(), str(folder / "config.json"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is not a finished run: it has no {Path(str(error.filename)).name}") from None
    if results["status"] != "finished":
        raise ValueError(
            f"only finished runs can be compared, {folder} is {results['status']}; run the command that made it again"
        )
    checkpoint = folder / results["last"]["checkpoint"]
    model = VisionTransformer(config.model)
    load_weights(model, checkpoint)
    curves: Curves
    try:
        curves = read_curves(folder / "tensorboard")
    except FileNotFoundError:  # somebody tidied up; figures of what was recorded leave the run out
        curves = {}
    return FinishedRun(config.seed, model, config, curves, known_images(Storage(str(folder))))
