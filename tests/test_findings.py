"""The sentences of a comparison, from results made by hand: what is claimed, and what is not."""

from __future__ import annotations

from typing import Any

import pytest

from diffvit.analysis.findings import findings

THREE = [0, 1, 2]


def arm(seeds: list[int], difference: dict[str, Any] | None = None, also: Any = None, **figures: Any) -> dict[str, Any]:
    return {
        "seeds": seeds,
        "top1_difference": difference,
        "parameters_to_baseline": 1.0,
        "differences": {"intended": {}, "also": also or {}},
        "noise": {name: {"overall": {"per_seed": values}} for name, values in figures.items()},
    }


def by(points: float, low: float, high: float, over_seeds: tuple[float, float] | None) -> dict[str, Any]:
    return {"difference": points, "low": low, "high": high, "over_seeds": over_seeds and list(over_seeds)}


def pairs(kind: str, one: str, other: str, *values: float | None, depth: int = 2) -> dict[str, Any]:
    made = {"stream": "patch mean", "kind": kind, "arm_a": one, "arm_b": other}
    return made | {"matrix": [[1.0] * depth] * depth, "same_depth_by_pair": list(values) or None}


def said(mine: dict[str, Any], base: dict[str, Any], cka: list[dict[str, Any]] | None = None) -> list[str]:
    alike = [pairs("floor", x, x, 0.9) for x in ("plain", "V1")] + [pairs("across", "plain", "V1", 0.9)]
    return findings({"baseline": "plain", "arms": {"plain": base, "V1": mine}, "cka": alike if cka is None else cka})


@pytest.mark.parametrize(
    ("seeds", "difference", "sentence"),
    [
        (
            THREE,
            by(0.55, 0.14, 0.98, (0.1, 1.0)),
            "V1 is more accurate than plain: +0.55 points of top-1, 95 % interval +0.14 to +0.98, +0.10 to +1.00 over "
            "seeds by Student's t.",
        ),
        (
            THREE,
            by(-0.55, -0.98, -0.14, (-1.0, -0.1)),
            "V1 is less accurate than plain: −0.55 points of top-1, 95 % interval −0.98 to −0.14, −1.00 to −0.10 over "
            "seeds by Student's t.",
        ),
        (
            THREE,
            by(0.55, 0.14, 0.98, (-0.05, 1.15)),
            "V1 is not shown to differ from plain in top-1: +0.55 points, 95 % interval +0.14 to +0.98, −0.05 to +1.15 "
            "over seeds by Student's t.",
        ),
        (
            THREE,
            by(0.55, -0.1, 0.98, (0.1, 1.0)),
            "V1 is not shown to differ from plain in top-1: +0.55 points, 95 % interval −0.10 to +0.98, +0.10 to +1.00 "
            "over seeds by Student's t.",
        ),
        (
            [0],
            by(-0.55, -0.98, -0.14, None),
            "V1, as trained here, is less accurate than plain; one of the two has a single run, so this is of runs and "
            "not of arms: −0.55 points, 95 % interval −0.98 to −0.14 over images.",
        ),
        (
            [0],
            by(0.55, -0.14, 0.98, None),
            "V1 is not shown to differ from plain in top-1: +0.55 points, 95 % interval −0.14 to +0.98.",
        ),
    ],
)
def test_better_or_worse_is_said_where_images_and_seeds_show_it(
    seeds: list[int], difference: dict[str, Any], sentence: str
) -> None:
    assert said(arm(seeds, difference), arm(seeds))[0] == sentence


@pytest.mark.parametrize(
    ("across", "seeds", "sentence"),
    [
        (
            [0.70, 0.79],
            THREE,
            "Layers of V1 and plain are less alike than two seeds of either: CKA 0.74 at the same depth (patch mean), "
            "seeds 0.85 in plain and 0.82 in V1; with so many runs chance alone does that in up to 10 % of cases.",
        ),
        (
            [0.70, 0.81],
            THREE,
            "Layers of V1 and plain are not shown to differ by more than the seed: CKA 0.76 at the same depth (patch "
            "mean), seeds 0.85 in plain and 0.82 in V1.",
        ),
        ([0.70, 0.79], [0, 1], "in up to 33 % of cases."),
        ([0.70, 0.79], [*range(8)], "in up to less than 1 % of cases."),
    ],
)
def test_layers_differ_where_no_pair_is_as_alike_as_two_seeds(
    across: list[float], seeds: list[int], sentence: str
) -> None:
    cka = [
        pairs("floor", "plain", "plain", 0.85, 0.85),
        pairs("floor", "V1", "V1", 0.80, 0.84),
        pairs("across", "plain", "V1", *across),
    ]
    found = said(arm(seeds, by(0, -1, 1, (-1, 1))), arm(seeds), cka)[1]
    assert found == sentence or (sentence.startswith("in up to") and found.endswith(sentence))


@pytest.mark.parametrize(
    ("seeds", "why"),
    [([0], "an arm of one seed has no floor"), ([0, 1], "runs of an arm that do not differ are no floor")],
)
def test_what_has_no_floor_is_not_held_against_it(seeds: list[int], why: str) -> None:
    cka = [
        pairs("floor", "plain", "plain", 0.85),
        pairs("floor", "V1", "V1", None),
        pairs("across", "plain", "V1", 0.7),
    ]
    found = said(arm(seeds, by(0, -1, 1, None)), arm([0, 1]), cka)[1]
    assert found == f"V1 and plain have CKA 0.70 at the same depth (patch mean); {why} to hold that against."


@pytest.mark.parametrize(
    ("mine", "base", "apart"),
    [
        ([0.3, 0.4, 0.5], [0.6, 0.7, 0.8], "10 %"),
        ([0.6, 0.7, 0.8], [0.3, 0.4, 0.5], "10 %"),
        ([0.6, 0.7, 0.8], [0.3, 0.4, 0.6], None),  # a tie is no side
        ([0.6, 0.7, 0.8], [0.3, 0.4, 0.65], None),
        ([0.6, 0.7, None], [0.3, 0.4, 0.5], "20 %"),  # two of three that have the figure
        ([0.1] * 6, [0.2] * 6, "less than 1 %"),
    ],
)
def test_a_side_is_one_on_which_all_runs_lie(mine: list[Any], base: list[Any], apart: str | None) -> None:
    found = said(
        arm(list(range(len(mine))), by(0, -1, 1, (-1, 1)), head_similarity=mine),
        arm(list(range(len(base))), head_similarity=base),
    )
    if apart is None:
        assert found[2] == "Runs of V1 and plain overlap in similarity of heads."
    else:
        assert found[2].startswith("Every run of V1 lies on one side of every run of plain in similarity of heads (")
        assert found[2].endswith(f"with so many runs chance alone does that to {apart} of such figures.")


def test_what_else_differs_is_a_caveat() -> None:
    mine = arm(THREE, by(0, -1, 1, (-1, 1)), also={"optim.lr": [0.1, 0.2]}) | {"parameters_to_baseline": 0.95}
    *_, size, other, few = said(mine, arm(THREE))
    assert size == "V1 has 5.0 % fewer parameters than plain, which may be part of any difference."
    assert other == "V1 differs from plain not in attention alone: optim.lr (0.1 there, 0.2 here)."
    assert few == "3 seeds an arm are few: intervals over so few runs come out too narrow."
