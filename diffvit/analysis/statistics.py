"""What a few runs on a finite set of images say: spread over seeds, intervals of a difference, calibration.

Letters: S runs (seeds) of an arm, n images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

CALIBRATION_BINS = 15

_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; the last serves for more, which is wide enough."""


@dataclass(frozen=True)
class Interval:
    """A difference and the 95 % interval around it."""

    difference: float
    low: float
    high: float


def mean_and_std(values: Sequence[float]) -> dict[str, float | list[float] | None]:
    """`per_seed`, `mean` and the sample's standard deviation `std`, None for a single value; NaN counts in neither."""
    there = [float(v) for v in values if not math.isnan(v)]
    spread = float(np.std(there, ddof=1)) if len(there) > 1 else None
    mean = float(np.mean(there)) if there else math.nan
    return {"per_seed": [float(v) for v in values], "mean": mean, "std": spread}


def paired_bootstrap(
    arm: Values, baseline: Values, *, same_seeds: bool, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The difference of two means over runs and images, with a percentile interval of 95 %.

    Each resample draws n images with replacement, the *same* ones for both arms (that is the pairing: what is hard
    about an image is hard for both), and S runs of each arm with replacement; where `same_seeds`, the same seeds for
    both arms, because runs of one seed saw their images in the same order. Over two or three runs the interval is
    narrower than the truth: few draws cannot show how far a run may fall.

    Args:
        arm: (S, n), what is averaged of each run and image.
        baseline: (S', n), of the same images in the same order.
        same_seeds: row i of both belongs to the same seed; then S = S'.
        resamples: how often is drawn.
        seed: of the draws.

    Raises:
        ValueError: other numbers of images, or of runs where `same_seeds`.
    """
    if arm.shape[1] != baseline.shape[1] or (same_seeds and len(arm) != len(baseline)):
        raise ValueError(
            f"pairs need the same images (and seeds), got {arm.shape[0]} runs x {arm.shape[1]} images "
            f"and {baseline.shape[0]} x {baseline.shape[1]}"
        )
    generator = np.random.default_rng(seed)
    n = arm.shape[1]
    differences = np.empty(resamples)
    for i in range(resamples):
        counts = np.bincount(generator.integers(0, n, n), minlength=n)
        runs = generator.integers(0, len(arm), len(arm))
        other_runs = runs if same_seeds else generator.integers(0, len(baseline), len(baseline))
        differences[i] = ((arm @ counts)[runs].mean() - (baseline @ counts)[other_runs].mean()) / n
    low, high = np.quantile(differences, (0.025, 0.975))
    return Interval(float(arm.mean() - baseline.mean()), float(low), float(high))


def seed_interval(arm: Values, baseline: Values, *, same_seeds: bool) -> tuple[float, float] | None:
    """Student's 95 % interval of the difference of two means over seeds alone; None where an arm has one seed.

    It knows how little few runs say, which the bootstrap does not: of equal arms of three runs that leaves zero out
    in up to one of four cases, where seeds differ by more than images do. Paired where `same_seeds`, else Welch's.

    Args:
        arm: (S,), one value a run.
        baseline: (S',), likewise.
        same_seeds: entry i of both belongs to the same seed; then S = S'.
    """
    if min(len(arm), len(baseline)) < 2:
        return None
    if same_seeds:
        freedom = len(arm) - 1.0
        error = float(np.std(arm - baseline, ddof=1)) / math.sqrt(len(arm))
    else:
        parts = [float(np.var(side, ddof=1)) / len(side) for side in (arm, baseline)]
        error = math.sqrt(sum(parts))
        below = sum(part**2 / (len(side) - 1) for part, side in zip(parts, (arm, baseline), strict=True))
        freedom = error**4 / below if below else min(len(arm), len(baseline)) - 1.0
    reach = error * _STUDENT[min(max(int(freedom + 1e-9), 1), len(_STUDENT)) - 1]
    difference = float(arm.mean() - baseline.mean())
    return difference - reach, difference + reach


def calibration_error(confidence: Values, correct: Values, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error: sum_b n_b / n |mean confidence_b - accuracy_b|, in [0, 1].

    The bins hold equally many images (sorted by confidence), so that none is nearly empty. Fewer images than bins
    give a bin to each. Source: arXiv 1706.04599, with the bins of 1904.01685.

    Args:
        confidence: (n,), probability of the predicted class.
        correct: (n,), 1 where the prediction is right.
        bins: at most this many.
    """
    order = np.argsort(confidence, kind="stable")
    gaps = np.array_split((confidence - correct)[order], min(bins, len(order)))
    return float(sum(abs(gap.sum()) for gap in gaps) / len(order))
