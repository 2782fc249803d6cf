"""Arms compared on the same images: everything that `compare.json` holds, in one pass over the validation set.

Letters: S runs (seeds) of an arm, L layers, H heads, n images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from diffvit.analysis.arms import Arms, check_arms, differences
from diffvit.analysis.boxes import look_at_boxes
from diffvit.analysis.compositions import compose
from diffvit.analysis.measure import RunMeasures
from diffvit.analysis.regroup import Group, regroup
from diffvit.analysis.robustness import CORRUPTIONS, corrupt
from diffvit.analysis.similarity import RunKey, Similarity
from diffvit.analysis.speed import inference_speed, training_speed
from diffvit.analysis.statistics import calibration_error, mean_and_std, paired_bootstrap, seed_interval
from diffvit.data.batches import Batch
from diffvit.data.boxes import BoxedSplit
from diffvit.models.flops import training_flops
from diffvit.training.precision import has_bf16

FORMAT_VERSION = 1
_OBJECT_FIGURES = ("inside_mass", "inside_lift")
_BOX_FIGURES = {"inside_mass": "box_mass", "inside_lift": "box_lift"}
_SEVERITIES = (1, 2, 3)


@dataclass(frozen=True)
class CompareOptions:
    """How much is measured.

    Accuracy and calibration see every image; for the rest some that `seed` draws serve, counted in whole batches.
    """

    batch_size: int = 64
    """Images at once; CKA's estimate is unbiased from 4 on, more only make it less noisy."""
    similarity_images: int = 2048
    """Images for CKA."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward passes for CKA; auto: bf16 where the device computes in it itself. Everything else is float32."""
    noise_images: int = 512
    """Images, compositions made of them, and images with boxes, for the figures of attention."""
    robustness_images: int = 2048
    """Images that are made worse, in nine ways."""
    resamples: int = 2000
    """Bootstrap resamples of an interval."""
    speed_rounds: int = 20
    """Times each arm takes its turn in the measurement of speed."""
    boxes: str = ""
    """CSV file of key,x0,y0,x1,y1: boxes around the objects of validation images, in pixels; empty for none."""
    seed: int = 0
    """Of the images that are drawn, noise, occlusion, compositions and resamples; not of any model."""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 4), ("resamples", 100), ("speed_rounds", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("similarity_images", "noise_images", "robustness_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def compare(
    arms: Arms,
    batches: Iterable[Batch],
    options: CompareOptions | None = None,
    device: torch.device | None = None,
    progress: Callable[[int], None] | None = None,
    boxes: BoxedSplit | None = None,
) -> dict[str, Any]:
    """Everything there is to say about the arms, as what JSON can hold. The first arm is the baseline.

    Args:
        arms: finished runs by arm; see `check_arms` for what must agree. Their models are moved to `device` and left
            in evaluation mode.
        batches: the validation set, read once, in random order: in batches of one class every model would look alike.
        options: how much to measure; None for the defaults.
        device: where the models run; None for the CPU.
        progress: called after each group with the number of images seen.
        boxes: the images with boxes; read until `options.noise_images` of them have been looked at.

    Raises:
        ValueError: arms that cannot be compared, or fewer than 4 images that could be read.
    """
    options, device = options or CompareOptions(), device or torch.device("cpu")
    # pairs of runs are those of one seed, in whatever order the runs were named
    arms = {arm: sorted(runs, key=lambda run: run.seed) for arm, runs in arms.items()}
    check_arms(arms)
    in_bf16 = options.precision == "bf16" or (options.precision == "auto" and has_bf16(device))
    measures = {(arm, run.seed): RunMeasures(run, device, in_bf16) for arm, runs in arms.items() for run in runs}
    similarity, seen = Similarity(), 0
    first: Group | None = None
    for number, group in enumerate(regroup(batches, options.batch_size)):
        first = first or group
        _measure_group(measures, similarity, group, number, seen, options)
        seen += len(group.labels)
        if progress is not None:
            progress(seen)
    assert first is not None  # regroup raises where there is nothing
    baseline, anyone = next(iter(arms)), next(iter(measures.values()))
    models = {arm: measures[arm, runs[0].seed].model for arm, runs in arms.items()}
    pixels = anyone.pixels(first.images)
    speed = inference_speed(models, pixels, options.speed_rounds)
    training = training_speed(models, pixels, options.speed_rounds)
    result = {
        "format_version": FORMAT_VERSION,
        "baseline": baseline,
        "images": seen,
        "similarity_images": similarity.images,
        "similarity_precision": "bf16" if in_bf16 else "fp32",
        "noise_images": anyone.noise.images,
        "boxes": look_at_boxes(list(measures.values()), boxes, options.noise_images, options.batch_size, options.seed),
        "robustness_images": anyone.answers(f"{CORRUPTIONS[0]} 1").shape[1],
        "speed_batch": len(first.labels),
        "device": str(device),
        "options": dataclasses.asdict(options),
        "arms": {
            arm: _arm(arm, arms, measures, options) | {"speed": speed[arm], "training_speed": training[arm]}
            for arm in arms
        },
        "cka": similarity.compute(),
    }
    plain: dict[str, Any] = _plain(result)
    return plain


def _measure_group(
    measures: dict[RunKey, RunMeasures],
    similarity: Similarity,
    group: Group,
    number: int,
    seen: int,
    options: CompareOptions,
) -> None:
    for measure in measures.values():
        measure.answer(group.images, group.labels)
    looking = seen < options.noise_images
    if seen < options.similarity_images or looking:
        found = {key: measure.represent(group) for key, measure in measures.items()}
        if seen < options.similarity_images:
            similarity.update({key: representations for key, (representations, _) in found.items()})
        if looking:
            for key, measure in measures.items():
                measure.look(group, found[key][1])
    patch_size = max(measure.model.config.patch_size for measure in measures.values())
    seed = options.seed + number  # others for every group, the same for every run
    if looking:
        made = compose(group.images, patch_size, seed)
        for measure in measures.values():
            measure.look_at_compositions(made)
    if seen < options.robustness_images:
        for kind in CORRUPTIONS:
            for severity in _SEVERITIES:
                images = corrupt(group.images, kind, severity, patch_size=patch_size, seed=seed)
                for measure in measures.values():
                    measure.answer(images, group.labels, f"{kind} {severity}")


def _arm(arm: str, arms: Arms, measures: dict[RunKey, RunMeasures], options: CompareOptions) -> dict[str, Any]:
    """What `compare.json` says of one arm."""
    runs, baseline = arms[arm], next(iter(arms))
    mine = [measures[arm, run.seed] for run in runs]
    base = [measures[baseline, run.seed] for run in arms[baseline]]
    answers = [measure.answers() for measure in mine]
    parameters = sum(p.numel() for p in mine[0].model.parameters())
    same_seeds = [run.seed for run in runs] == [run.seed for run in arms[baseline]]
    return {
        "variant": runs[0].config.model.variant,
        "seeds": [run.seed for run in runs],
        "sources": [run.source for run in runs],
        "parameters": parameters,
        "parameters_to_baseline": parameters / sum(p.numel() for p in base[0].model.parameters()),
        "training_flops_per_image": training_flops(runs[0].config.model, runs[0].config.init.train),
        "num_heads": runs[0].config.model.num_heads,
        "differences": differences(arms[baseline][0], runs[0]),
        "top1": mean_and_std([100 * a[0].mean() for a in answers]),
        "top1_difference": None if arm == baseline else _difference(mine, base, same_seeds, options),
        "calibration_error": mean_and_std([calibration_error(a[1], a[0]) for a in answers]),
        "negative_log_likelihood": mean_and_std([a[2].mean() for a in answers]),
        "robustness": _robustness(mine),
        "high_norm_share": mean_and_std([measure.high_norm_share for measure in mine]),
        "noise": _noise(mine),
        "curves": {str(run.seed): {name: list(points) for name, points in run.curves.items()} for run in runs},
    }


def _difference(
    mine: list[RunMeasures], base: list[RunMeasures], same_seeds: bool, options: CompareOptions
) -> dict[str, Any]:
    correct, expected = (np.stack([measure.answers()[0] for measure in side]) for side in (mine, base))
    over_seeds = seed_interval(correct.mean(1), expected.mean(1), same_seeds=same_seeds)
    interval = paired_bootstrap(
        correct, expected, same_seeds=same_seeds, resamples=options.resamples, seed=options.seed
    )
    return {
        "paired_by_seed": same_seeds,
        "over_seeds": over_seeds and [100 * bound for bound in over_seeds],
    } | {k: 100 * v for k, v in dataclasses.asdict(interval).items()}


def _robustness(mine: list[RunMeasures]) -> dict[str, list[dict[str, Any]]]:
    """Top-1 in percent for severities 0 (the same images as they are) to 3."""
    count = mine[0].answers(f"{CORRUPTIONS[0]} 1").shape[1]
    keys = {kind: ["clean", *(f"{kind} {severity}" for severity in _SEVERITIES)] for kind in CORRUPTIONS}
    return {
        kind: [mean_and_std([100 * measure.answers(key)[0, :count].mean() for measure in mine]) for key in names]
        for kind, names in keys.items()
    }


def _noise(mine: list[RunMeasures]) -> dict[str, dict[str, Any]]:
    """`per_head` (S, L, H) by figure; `per_layer` its mean over seeds and heads (of what is largest: the largest head).

    `overall` is the mean over layers of each seed.
    """
    found = [
        measure.noise.compute()
        | {k: v for k, v in measure.composed.compute().items() if k in _OBJECT_FIGURES}
        | {_BOX_FIGURES[k]: v for k, v in measure.boxed.compute().items() if k in _BOX_FIGURES}
        for measure in mine
    ]
    result: dict[str, dict[str, Any]] = {}
    for name in found[0]:
        per_head = torch.stack([figures[name] for figures in found])
        by_layer = per_head.amax(dim=2) if name.startswith("largest") else per_head.nanmean(dim=2)
        result[name] = {
            "per_head": per_head.tolist(),
            "per_layer": by_layer.nanmean(dim=0).tolist(),
            "overall": mean_and_std(by_layer.nanmean(dim=1).tolist()),
        }
    return result


def _plain(value: Any) -> Any:
    """The same with None for NaN, which JSON does not know, and lists for tuples."""
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
    return value
