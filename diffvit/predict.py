"""What a trained model says of any source of images, each image exactly once, over the whole cluster.

<out>/predictions/part-*.parquet   key, split, class (where known), predicted, top_classes, top_probabilities, reason
<out>/predictions.json             counts, top-1, top-5, accuracy by class
<out>/confusion.png                where the source has classes that the model knows

Images are decoded in tasks and predicted by actors that hold the model; each part is written when it is whole, so the
same call goes on where an earlier one was cut.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from ray.data import DataContext

from diffvit.analysis.confusion import confusion_figure, per_class
from diffvit.config import AugmentConfig, PredictConfig
from diffvit.data.claim import STAGING, claim, identity_of, release, require_same
from diffvit.data.images import ImageError, decode_image, eval_transform, normalize
from diffvit.data.indexing import find_units
from diffvit.data.packing import read_entries_content
from diffvit.data.prepare import collect_entries
from diffvit.data.tasks import Report, fetch
from diffvit.manifest import WEIGHTS_NAME, sha256_of
from diffvit.models.fetched import on_disk
from diffvit.models.saved import SavedModel, load_saved
from diffvit.models.weights import find_checkpoint
from diffvit.storage import Storage

RESULTS_NAME = "predictions.json"
_PART_IMAGES = 512
_PARTS = "predictions"

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


def predict(config: PredictConfig, report: Report) -> dict[str, Any]:
    """Predict every image that `config` names, on the connected cluster; the content of `predictions.json`.

    Raises:
        ValueError: no such checkpoint or images, or `out` holds something else.
        StorageError: a store stayed away; the same call goes on from there.
    """
    target = Storage(config.out)
    with on_disk(config.checkpoint) as found:
        checkpoint = find_checkpoint(found)
        saved, weights = load_saved(checkpoint), sha256_of(checkpoint / WEIGHTS_NAME)
    units = find_units(config.images, config)
    skipped = ("out", "download", "workers", "gpu", "batch_size", "checkpoint")
    options = {name: value for name, value in asdict(config).items() if name not in skipped}
    identity = identity_of({**options, "weights_sha256": weights}, units)
    finished = _finished(target, identity)
    if finished is not None:
        return finished
    claim(target, identity)
    entries = collect_entries(units, config, target.child(STAGING), report)
    if config.split:
        entries = entries.filter(pc.equal(entries["split"], config.split))
    if not entries.num_rows:
        raise ValueError(f"{config.images} holds no images" + (f" of split {config.split!r}" if config.split else ""))
    _predict_parts(config, saved, entries.combine_chunks(), target, report)
    results = _summarise(saved, entries.num_rows, identity, target)
    release(target)
    return results


def _finished(target: Storage, identity: dict[str, Any]) -> dict[str, Any] | None:
    try:
        results: dict[str, Any] = json.loads(target.read(RESULTS_NAME))
    except (FileNotFoundError, NotADirectoryError):
        return None
    require_same(results["options"], identity, f"out = {target.uri!r} holds predictions made")
    return results


def _part_name(number: int) -> str:
    return f"{_PARTS}/part-{number:06d}.parquet"


def _predict_parts(
    config: PredictConfig, saved: SavedModel, entries: pa.Table, target: Storage, report: Report
) -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = False
    parts = -(-entries.num_rows // _PART_IMAGES)
    there = target.sizes(_PARTS)
    todo = [number for number in range(parts) if _part_name(number) not in there]
    done = sum(len(entries[n * _PART_IMAGES : (n + 1) * _PART_IMAGES]) for n in range(parts) if n not in set(todo))
    report("predicting", done, entries.num_rows)
    if not todo:
        return
    job = ray.put(_Job(config, saved, entries, target))

    def load(row: dict[str, Any]) -> dict[str, Any]:
        return _load_part(fetch(job), int(row["item"]))

    decoded = ray.data.from_items(todo, override_num_blocks=len(todo)).map(load)
    gpus = 1 if config.gpu else 0
    predicted = decoded.map(
        _Predictor, fn_constructor_args=(job,), concurrency=config.workers, num_gpus=gpus, num_cpus=0 if gpus else 1
    )
    for row in predicted.iter_rows():
        done += int(row["images"])
        report("predicting", done, entries.num_rows)


@dataclass(frozen=True)
class _Job:
    """What every task and actor needs; sent once to each node."""

    config: PredictConfig
    saved: SavedModel
    entries: pa.Table
    target: Storage


def _load_part(job: _Job, number: int) -> dict[str, Any]:
    model = job.saved.config
    augment = AugmentConfig(eval_crop_ratio=job.saved.eval_crop_ratio, interpolation=job.saved.interpolation)
    transform = eval_transform(augment, model.image_size)
    entries = job.entries[number * _PART_IMAGES : (number + 1) * _PART_IMAGES]
    images = np.zeros((entries.num_rows, model.in_channels, model.image_size, model.image_size), np.uint8)
    reasons = entries["reason"].to_pylist()
    for place, content in enumerate(read_entries_content(entries)):
        try:
            if isinstance(content, ImageError):
                raise content
            images[place] = transform(decode_image(content, model.in_channels, job.config.max_pixels)).numpy()
        except ImageError as error:
            reasons[place] = reasons[place] or str(error)
    return {"number": number, "pixels": images, "reasons": json.dumps(reasons)}


class _Predictor:
    """Holds the model; an actor of the Ray Data job."""

    def __init__(self, job: Any) -> None:
        self._job: _Job = fetch(job)
        self._device = torch.device("cuda" if self._job.config.gpu else "cpu")
        self._model = self._job.saved.model.to(self._device).eval()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number, reasons = int(row["number"]), json.loads(row["reasons"])
        probabilities = self._probabilities(row["pixels"])
        k = min(self._job.config.top_k, probabilities.shape[1])
        top = probabilities.topk(k, dim=1)
        names = np.array(self._job.saved.classes)[top.indices.numpy()]
        entries = self._job.entries[number * _PART_IMAGES : (number + 1) * _PART_IMAGES]
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
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, schema=_PREDICTION_SCHEMA), sink)
        self._job.target.write(_part_name(number), sink.getvalue())
        return {"images": len(reasons)}

    @torch.inference_mode()
    def _probabilities(self, images: Any) -> torch.Tensor:
        """(n, classes) in float32 on the CPU."""
        saved, parts = self._job.saved, []
        for batch in torch.from_numpy(np.array(images)).split(self._job.config.batch_size):
            pixels = normalize(batch.to(self._device), saved.mean, saved.std)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
                logits = self._model(pixels)
            parts.append(logits.float().softmax(dim=1).cpu())
        return torch.cat(parts)


def _summarise(saved: SavedModel, images: int, identity: dict[str, Any], target: Storage) -> dict[str, Any]:
    """Count what the parts say and write the results."""
    known = {name: label for label, name in enumerate(saved.classes)}
    confusion = np.zeros((len(known), len(known)), np.int64)
    seen = skipped = labelled = top5 = 0
    for name in target.sizes(_PARTS):
        table = pq.read_table(pa.BufferReader(target.read(name)))
        seen += table.num_rows
        columns = (table[column].to_pylist() for column in ("class", "predicted", "top_classes"))
        for true, predicted, top in zip(*columns, strict=True):
            if predicted is None:
                skipped += 1
            elif true in known:
                labelled += 1
                top5 += true in top[:5]
                confusion[known[true], known[predicted]] += 1
    if seen != images:
        raise RuntimeError(f"{seen} predictions for {images} images")
    results: dict[str, Any] = {"images": images, "skipped": skipped, "labelled": labelled}
    if labelled:
        results |= {"top1": 100 * int(confusion.trace()) / labelled, "top5": 100 * top5 / labelled}
        results["classes"] = per_class(confusion, saved.classes)
        picture = io.BytesIO()
        confusion_figure(confusion, saved.classes).savefig(picture, format="png", dpi=110)
        target.write("confusion.png", picture.getvalue())
    results |= {"step": saved.manifest["step"], "options": identity}
    target.write(RESULTS_NAME, json.dumps(results, indent=2).encode() + b"\n")
    return results
