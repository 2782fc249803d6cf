"""One part of the images that a model predicts: read and decoded in a task, predicted and written by an actor.

Letters: n images in the part, C channels, S side of the model's input.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from diffvit.config import AugmentConfig, ModelConfig, PredictConfig, ScaleConfig
from diffvit.data.claim import STAGING
from diffvit.data.images import ImageError, decode_image, eval_transform, normalize
from diffvit.data.packing import read_entries_content
from diffvit.data.sources import places_of
from diffvit.data.tables import write_table
from diffvit.data.tasks import STORE_ERRORS, fetch, require_seen
from diffvit.models.saved import SavedModel
from diffvit.storage import Storage
from diffvit.training.precision import numbers

PARTS = "predictions"

_PREDICTION_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("class", pa.string()),
        ("predicted", pa.string()),
        ("top_classes", pa.list_(pa.string())),
        ("top_probabilities", pa.list_(pa.float32())),
        ("reason", pa.string()),  # why there is no prediction
    ]
)


@dataclass(frozen=True)
class Job:
    """What every task and actor needs; sent once to each node. The weights go to the actors only.

    Part i holds the predictions for the entries from `ends[i]` to `ends[i + 1]`.
    """

    config: PredictConfig
    model: ModelConfig
    augment: AugmentConfig
    entries: pa.Table
    target: Storage
    ends: list[int]

    @property
    def parts(self) -> int:
        return len(self.ends) - 1

    def part(self, number: int) -> pa.Table:
        """The entries of a part."""
        return self.entries[self.ends[number] : self.ends[number + 1]]


def cut_parts(lengths: Sequence[int], most_images: int, most_bytes: int) -> list[int]:
    """0 and where each part of images of so many bytes ends; it grows while it stays within both (at least one image).

    A task may have read all of its images from a store before it decodes the first.
    """
    ends, held = [0], 0
    for number, length in enumerate(lengths):
        images = number - ends[-1]
        if images == most_images or (images and held + length > most_bytes):
            ends.append(number)
            held = 0
        held += length
    return [*ends, len(lengths)]


def part_name(number: int) -> str:
    return f"{PARTS}/part-{number:06d}.parquet"


def load_part(job: Job, number: int) -> dict[str, Any]:
    """The pixels that the model takes, uint8 (n, C, S, S), and why those that are missing are.

    Raises:
        StorageError: a store stayed away, or this node does not see the images.
    """
    model = job.model
    transform = eval_transform(job.augment, model.image_size)
    entries = job.part(number)
    require_seen([job.target.child(STAGING), *places_of(entries)])
    images = np.zeros((entries.num_rows, model.in_channels, model.image_size, model.image_size), np.uint8)
    reasons: list[str | None] = [None] * entries.num_rows
    for place, content in enumerate(read_entries_content(entries, job.config.max_image_bytes)):
        try:
            if isinstance(content, ImageError):
                raise content
            images[place] = transform(decode_image(content, model.in_channels, job.config.max_pixels)).numpy()
        except ImageError as error:
            reasons[place] = str(error)
    return {"number": number, "pixels": images, "reasons": json.dumps(reasons)}


class Predictor:
    """Holds the model; an actor of the Ray Data job."""

    def __init__(self, job: Any, saved: Any) -> None:
        self._job: Job = fetch(job)
        self._saved: SavedModel = fetch(saved)
        self._device = torch.device("cuda" if self._job.config.gpu else "cpu")
        self._in_bf16 = numbers(ScaleConfig(), self._device) == "bf16"
        self._model = self._saved.model.to(self._device).eval()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"images": 0 if row["error"] else self._predict(row), "error": row["error"]}
        except STORE_ERRORS as error:
            return {"images": 0, "error": str(error)}

    def _predict(self, row: dict[str, Any]) -> int:
        """Write one part; how many images it has."""
        number, reasons = int(row["number"]), json.loads(row["reasons"])
        probabilities = self._probabilities(row["pixels"])
        k = min(self._job.config.top_k, probabilities.shape[1])
        top = probabilities.topk(k, dim=1)
        names = np.array(self._saved.classes)[top.indices.numpy()]
        entries = self._job.part(number)
        bad = [reason is not None for reason in reasons]
        columns: dict[str, Any] = {
            "key": entries["key"],
            "split": entries["split"],
            "class": entries["class_name"],
            "predicted": [None if b else str(row[0]) for b, row in zip(bad, names, strict=True)],
            "top_classes": [None if b else row.tolist() for b, row in zip(bad, names, strict=True)],
            "top_probabilities": [None if b else row for b, row in zip(bad, top.values.tolist(), strict=True)],
            "reason": reasons,
        }
        write_table(self._job.target, part_name(number), pa.table(columns, schema=_PREDICTION_SCHEMA))
        return len(reasons)

    @torch.inference_mode()
    def _probabilities(self, images: Any) -> torch.Tensor:
        """(n, classes) in float32 on the CPU."""
        saved, parts = self._saved, []
        for batch in torch.from_numpy(np.array(images)).split(self._job.config.batch_size):
            pixels = normalize(batch.to(self._device), saved.mean, saved.std)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._in_bf16):
                logits = self._model(pixels)
            parts.append(logits.float().softmax(dim=1).cpu())
        return torch.cat(parts)
