"""What a trained model says of any source of images, each image exactly once, over the whole cluster.

<out>/predictions/part-*.parquet   key, split, class (where known), predicted, top_classes, top_probabilities, reason
<out>/predictions.json             counts, top-1, top-5, accuracy by class
<out>/confusion.png                where the source has classes that the model knows, 2,000 at most

Images are decoded in tasks and predicted by actors that hold the model; each part is written when it is whole, so the
same call goes on where an earlier one was cut.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data import DataContext

from diffvit.analysis.confusion import confusion_figure, per_class
from diffvit.cluster.waiting import can_grow, room_for, wait_for_nodes
from diffvit.config import PredictConfig, ScaleConfig
from diffvit.data.claim import STAGING, claim, given_back, identity_of, release, reopen, require_outside, require_same
from diffvit.data.indexing import find_units, with_absolute_paths
from diffvit.data.prepare import collect_entries
from diffvit.data.sources import BESIDE, ignored_in, read_labels
from diffvit.data.tables import read_table
from diffvit.data.tasks import STORE_ERRORS, Report, fetch
from diffvit.manifest import WEIGHTS_NAME
from diffvit.models.saved import SavedModel, load_saved
from diffvit.prediction import PARTS, Job, Predictor, cut_parts, load_part, part_name
from diffvit.storage import Storage, StorageError

RESULTS_NAME = "predictions.json"
_PICTURED_CLASSES = 2000
"""More than these would be less than a pixel each, and the picture takes hundreds of MiB to draw."""
_PART_IMAGES = 512
_PART_BYTES = 128 * 2**20
"""Of the files of a part, and of the pixels that the model takes of them."""


def predict(config: PredictConfig, report: Report) -> dict[str, Any]:
    """Predict every image that `config` names, on the connected cluster; the content of `predictions.json`.

    Raises:
        ValueError: no such checkpoint or images, or `out` lies in these or holds something else.
        StorageError: a store stayed away; the same call goes on from there.
    """
    config = with_absolute_paths(config)
    require_outside(config.out, config.images)
    target = Storage(config.out)
    saved = load_saved(config.checkpoint)
    units = find_units(config.images, config)
    skipped = ("out", "download", "workers", "gpu", "batch_size", "checkpoint")
    options = {name: value for name, value in asdict(config).items() if name not in skipped}
    labels = read_labels(config.labels)
    identity = identity_of({**options, "weights_sha256": saved.manifest["sha256"][WEIGHTS_NAME]}, units, labels)
    finished = _finished(target, identity)
    if finished is not None:
        release(target)
        return finished
    require_resources(config)
    claim(target, identity)
    with given_back(target):
        entries = collect_entries(units, config, labels, target.child(STAGING), report)
        _require_split(config, entries)
    left_out = {"ignored": dict(ignored_in(entries)), "without_split": 0}
    if config.split:
        left_out["without_split"] = entries["split"].null_count
        entries = entries.filter(pc.equal(entries["split"], config.split))
    job = Job(config, saved.config, saved.augment, entries.combine_chunks(), target, _ends(config, saved, entries))
    _predict_parts(job, saved, report)
    results = _summarise(job, saved, identity, left_out)
    release(target)
    return results


def _require_split(config: PredictConfig, entries: pa.Table) -> None:
    there = sorted({*entries["split"].to_pylist()} - {None, BESIDE})
    if config.split and config.split not in there:
        told = f"there are {', '.join(there)}" if there else "the source does not say any"
        raise ValueError(f"{config.images} holds no images of split {config.split!r}; {told}")
    if not entries.num_rows:
        raise ValueError(f"{config.images} holds no images")


def require_resources(config: PredictConfig) -> None:
    """Check that the nodes can hold the copies of the model and leave a CPU for decoding; first wait for those to come.

    Raises:
        ValueError: they cannot; says what would do. (Ray would wait for ever.)
    """
    what = "GPU" if config.gpu else "CPU"
    bundles = [{what: 1.0}] * config.workers + [{"CPU": 1.0}]
    if can_grow():
        wait_for_nodes(bundles, 60 * ScaleConfig().wait_minutes, print)
    if room_for(bundles) < len(bundles):
        have = ray.cluster_resources()
        raise ValueError(
            f"workers = {config.workers} copies of the model need a {what} each, and decoding a CPU; the cluster has "
            f"{have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs"
        )


def _ends(config: PredictConfig, saved: SavedModel, entries: pa.Table) -> list[int]:
    """Where the parts end that tasks can hold in memory."""
    read = [0 if length > config.max_image_bytes else max(length, 0) for length in entries["length"].to_pylist()]
    fit = _PART_BYTES // (saved.config.in_channels * saved.config.image_size**2)
    return cut_parts(read, max(min(fit, _PART_IMAGES), 1), _PART_BYTES)


def _finished(target: Storage, identity: dict[str, Any]) -> dict[str, Any] | None:
    content = target.read_or_none(RESULTS_NAME)
    if content is None:
        return None
    results: dict[str, Any] = json.loads(content)
    require_same(results["options"], identity, f"out = {target.uri!r} holds predictions made")
    there = target.sizes(PARTS)
    if any(part_name(number) not in there for number in range(results.get("parts", 0))):  # lost since
        reopen(target, identity, RESULTS_NAME)
        return None
    return results


def _predict_parts(job: Job, saved: SavedModel, report: Report) -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = False
    there, images = job.target.sizes(PARTS), job.entries.num_rows
    todo = [number for number in range(job.parts) if part_name(number) not in there]
    done = images - sum(job.part(number).num_rows for number in todo)
    report("predicting", done, images)
    if not todo:
        return
    reference, model = ray.put(job), ray.put(saved)

    def load(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return load_part(fetch(reference), int(row["item"])) | {"error": ""}
        except STORE_ERRORS as error:  # as a value, for Ray Data loses what an exception was
            return {"number": int(row["item"]), "pixels": np.zeros(0, np.uint8), "reasons": "", "error": str(error)}

    decoded = ray.data.from_items(todo, override_num_blocks=len(todo)).map(load)
    gpus = 1 if job.config.gpu else 0
    predicted = decoded.map(
        Predictor,
        fn_constructor_args=(reference, model),
        concurrency=job.config.workers,
        num_gpus=gpus,
        num_cpus=0 if gpus else 1,
    )
    for row in predicted.iter_rows():
        if row["error"]:
            raise StorageError(row["error"])
        done += int(row["images"])
        report("predicting", done, images)


def _summarise(job: Job, saved: SavedModel, identity: dict[str, Any], left_out: dict[str, Any]) -> dict[str, Any]:
    """Count what the parts say and write the results.

    `left_out`: `ignored` files that are no images, by extension; images `without_split`, where --split asks for one and
    the source does not say theirs.
    """
    target, images = job.target, job.entries.num_rows
    known = {name: label for label, name in enumerate(saved.classes)}
    confusion = np.zeros((len(known), len(known)), np.int64)
    seen = skipped = labelled = top5 = 0
    unknown: Counter[str] = Counter()
    for name in [part_name(number) for number in range(job.parts)]:  # killed writers may have left others
        table = read_table(target, name)
        seen += table.num_rows
        columns = (table[column].to_pylist() for column in ("class", "predicted", "top_classes"))
        for true, predicted, top in zip(*columns, strict=True):
            if predicted is None:
                skipped += 1
            elif true in known:
                labelled += 1
                top5 += true in top[:5]
                confusion[known[true], known[predicted]] += 1
            elif true is not None:
                unknown[true] += 1
    if seen != images:
        raise RuntimeError(f"{seen} predictions for {images} images")
    results: dict[str, Any] = {"images": images, "skipped": skipped, "labelled": labelled}
    results |= {name: counted for name, counted in left_out.items() if counted}
    results |= {"unknown_classes": dict(unknown)} if unknown else {}
    if labelled:
        results["top1"] = 100 * int(confusion.trace()) / labelled
        if job.config.top_k >= min(5, len(known)):  # else nobody knows
            results["top5"] = 100 * top5 / labelled
        results["classes"] = per_class(confusion, saved.classes)
        if len(known) <= _PICTURED_CLASSES:
            picture = io.BytesIO()
            confusion_figure(confusion, saved.classes).savefig(picture, format="png", dpi=110)
            target.write("confusion.png", picture.getvalue())
    results |= {"parts": job.parts, "step": saved.manifest["step"], "options": identity}
    target.write(RESULTS_NAME, json.dumps(results, indent=2).encode() + b"\n")
    return results
