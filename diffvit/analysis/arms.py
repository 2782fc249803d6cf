"""What is compared: arms, each some runs of one config under several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffvit.analysis.curves import Curves
from diffvit.config import RunConfig, differing_fields
from diffvit.data.fingerprint import SPLITS, Fingerprint
from diffvit.models.vit import VisionTransformer

_SAME_IMAGES = (
    *("model.image_size", "model.patch_size", "model.in_channels", "model.num_classes"),
    *("data.path", "data.val_fraction", "data.split_seed", "validation images"),
    *("augment.eval_crop_ratio", "augment.interpolation"),
)
"""What decides which pixels and labels a model is asked about, and to which patches masks refer."""
_EXPECTED = (
    *("model.variant", "model.num_heads", "seed"),
    *("model.lambda_init", "model.lambda_max", "model.head_norm"),
)
"""What arms differ in by intention."""


@dataclass(frozen=True)
class FinishedRun:
    """A trained model with what it was trained by and what it wrote meanwhile."""

    seed: int
    model: VisionTransformer
    config: RunConfig
    curves: Curves = field(default_factory=dict)
    images: Fingerprint | None = None
    """That it was begun with, where that is known."""
    source: str = ""
    """Where it lies."""


Arms = Mapping[str, Sequence[FinishedRun]]
"""By the name shown in the report."""


def differing(one: FinishedRun, other: FinishedRun) -> dict[str, tuple[Any, Any]]:
    """`{field: (one's, other's)}` for whatever decides a run's result: of the config, and of the images themselves.

    Where these are known, the place at which they lie does not count.
    """
    found = differing_fields(one.config, other.config)
    precisions = one.config.scale.precision, other.config.scale.precision
    if len({*precisions}) > 1:  # a run may be continued in another one, but trained otherwise it is another arm
        found["scale.precision"] = precisions
    if one.images is not None and other.images is not None:
        found.pop("data.path", None)
        for split in SPLITS:
            ours, theirs = getattr(one.images, split), getattr(other.images, split)
            if ours != theirs:
                found[f"{split} images"] = (str(ours), str(theirs))
    return found


def check_arms(arms: Arms) -> None:
    """Make sure that a comparison of these arms says something.

    Raises:
        ValueError: no arm, an arm without runs, a seed twice in an arm, runs of an arm that differ in more than the
            seed, or arms that do not see the same images and classes.
    """
    if not arms or not all(arms.values()):
        raise ValueError(f"a comparison needs arms of at least one run each, got {_counts(arms)}")
    first_name, first = next((name, runs[0]) for name, runs in arms.items())
    for name, runs in arms.items():
        seeds = [run.seed for run in runs]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"the runs of an arm must have different seeds, got {seeds} in {name!r}")
        for run in runs[1:]:
            others = {k: v for k, v in differing(runs[0], run).items() if k != "seed"}
            if others:
                raise ValueError(
                    f"the runs of an arm must differ in nothing but the seed, got {_listed(others)} in {name!r}; "
                    "make it two arms"
                )
        unlike = {k: v for k, v in differing(first, runs[0]).items() if k in _SAME_IMAGES}
        if unlike:
            raise ValueError(
                f"all arms must be asked about the same images, got {_listed(unlike)} in {first_name!r} and {name!r}; "
                "compare runs of one data set, image size and way of evaluating"
            )


def differences(baseline: FinishedRun, run: FinishedRun) -> dict[str, dict[str, Any]]:
    """What sets a run apart from the baseline: `intended` by the comparison, and what `also` differs; old and new."""
    found = {k: list(v) for k, v in differing(baseline, run).items() if k != "seed"}
    return {
        "intended": {name: pair for name, pair in found.items() if name in _EXPECTED},
        "also": {name: pair for name, pair in found.items() if name not in _EXPECTED},
    }


def _listed(found: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name}: {old!r} and {new!r}" for name, (old, new) in found.items())


def _counts(arms: Arms) -> dict[str, int]:
    return {name: len(runs) for name, runs in arms.items()}
