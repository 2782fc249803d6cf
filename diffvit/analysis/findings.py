"""What a comparison shows and what it does not, in sentences; the rules by which they are chosen are in them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from diffvit.analysis.panels import Result

FEW_SEEDS = 5
_SAME_SIZE = 0.01
_STREAM = "patch mean"
_NAMES = {
    "entropy_1_relative": "entropy of the first map",
    "high_norm_mass": "attention on high-norm tokens",
    "distance_pixels": "attention distance",
    "head_similarity": "similarity of heads",
    "largest_logit": "largest logit",
    "largest_activation": "largest activation",
    "inside_lift": "attention on the object",
    "box_lift": "attention in the boxes",
}


def findings(result: Result) -> list[str]:
    """Sentences on accuracy, representations and attention of every arm beside the baseline, then the caveats."""
    others = [name for name in result["arms"] if name != result["baseline"]]
    found = [_accuracy(result, name) for name in others]
    found += [_representations(result, name) for name in others]
    found += [sentence for name in others for sentence in _attention(result, name)]
    return found + list(_caveats(result, others))


def signed(value: float, digits: int = 2) -> str:
    """'+0.62' or '−0.15', with a minus sign and not a hyphen, which a line may be broken at."""
    return f"{value:+.{digits}f}".replace("-", "−")


def _accuracy(result: Result, name: str) -> str:
    """That an arm is better or worse is said only where images and seeds, and seeds by Student's t, both show it."""
    baseline, found = result["baseline"], result["arms"][name]["top1_difference"]
    difference = f"{signed(found['difference'])} points"
    interval = f"95 % interval {signed(found['low'])} to {signed(found['high'])}"
    better = "more" if found["difference"] > 0 else "less"
    over_images = not found["low"] <= 0 <= found["high"]
    if found["over_seeds"] is None:
        if over_images:
            runs = f"one of the two has a single run, so this is of runs and not of arms: {difference}, {interval}"
            return f"{name}, as trained here, is {better} accurate than {baseline}; {runs} over images."
        return f"{name} is not shown to differ from {baseline} in top-1: {difference}, {interval}."
    low, high = found["over_seeds"]
    by_seeds = f"{signed(low)} to {signed(high)} over seeds by Student's t"
    if over_images and not low <= 0 <= high:
        return f"{name} is {better} accurate than {baseline}: {difference} of top-1, {interval}, {by_seeds}."
    return f"{name} is not shown to differ from {baseline} in top-1: {difference}, {interval}, {by_seeds}."


def _representations(result: Result, name: str) -> str:
    """Arms differ where every pair of their runs is less alike than every two seeds of either."""
    baseline = result["baseline"]
    across = _by_pair(result, "across", {baseline, name})
    floors = {arm: _by_pair(result, "floor", {arm}) for arm in (baseline, name)}
    if not across:
        deep = {
            arm: len(record["matrix"])
            for record in result["cka"]
            for arm in (baseline, name)
            if (record["stream"], record["kind"], record["arm_a"]) == (_STREAM, "within", arm)
        }
        if len({*deep.values()}) > 1:
            return f"{name} and {baseline} have other depths: their layers are not compared one by one."
        return f"{name} and {baseline} are not compared by CKA: activations of one do not differ between images."
    value = f"CKA {_mean(across):.2f} at the same depth ({_STREAM})"
    if not all(floors.values()):
        single = any(len(result["arms"][arm]["seeds"]) == 1 for arm in floors)
        why = "an arm of one seed has no floor" if single else "runs of an arm that do not differ are no floor"
        return f"{name} and {baseline} have {value}; {why} to hold that against."
    floor = " and ".join(f"{_mean(pairs):.2f} in {arm}" for arm, pairs in floors.items())
    lowest = min(value for pairs in floors.values() for value in pairs)
    if max(across) < lowest:
        counts = [len(result["arms"][arm]["seeds"]) for arm in (baseline, name)]
        ways = math.comb(sum(counts), counts[0]) / (2 if counts[0] == counts[1] else 1)
        return (
            f"Layers of {name} and {baseline} are less alike than two seeds of either: {value}, seeds {floor}; "
            f"with so many runs chance alone does that in up to {_percent(1 / ways)} of cases."
        )
    return f"Layers of {name} and {baseline} are not shown to differ by more than the seed: {value}, seeds {floor}."


def _by_pair(result: Result, kind: str, arms: set[str]) -> list[float]:
    for record in result["cka"]:
        if (record["stream"], record["kind"], {record["arm_a"], record["arm_b"]}) == (_STREAM, kind, arms):
            return [value for value in record["same_depth_by_pair"] or [] if value is not None]
    return []


def _attention(result: Result, name: str) -> Iterator[str]:
    """Figures in which all runs of one arm lie on one side of all runs of the other."""
    mine, base = result["arms"][name], result["arms"][result["baseline"]]
    if len(mine["seeds"]) < 2 or len(base["seeds"]) < 2:
        return
    apart, mixed, by_chance = [], [], 0.0
    for figure, words in _NAMES.items():
        if figure not in mine["noise"] or figure not in base["noise"]:
            continue
        ours, theirs = (_seeds(arm, figure) for arm in (mine, base))
        if not ours or not theirs or not any(ours + theirs):  # as mass on high-norm tokens where there are none
            continue
        if min(ours) > max(theirs) or max(ours) < min(theirs):
            apart.append(f"{words} ({_mean(ours):.3g} against {_mean(theirs):.3g})")
            by_chance = max(by_chance, 2 / math.comb(len(ours + theirs), len(ours)))
        else:
            mixed.append(words)
    if apart:
        yield (
            f"Every run of {name} lies on one side of every run of {result['baseline']} in {', '.join(apart)}; "
            f"with so many runs chance alone does that to {_percent(by_chance)} of such figures."
        )
    if mixed:
        yield f"Runs of {name} and {result['baseline']} overlap in {', '.join(mixed)}."


def _caveats(result: Result, others: list[str]) -> Iterator[str]:
    for name in others:
        arm = result["arms"][name]
        excess = arm["parameters_to_baseline"] - 1
        if abs(excess) > _SAME_SIZE:
            size = f"{100 * abs(excess):.1f} % {'more' if excess > 0 else 'fewer'} parameters"
            yield f"{name} has {size} than {result['baseline']}, which may be part of any difference."
        if arm["differences"]["also"]:
            fields = "; ".join(f"{k} ({old} there, {new} here)" for k, (old, new) in arm["differences"]["also"].items())
            yield f"{name} differs from {result['baseline']} not in attention alone: {fields}."
    fewest = min(len(arm["seeds"]) for arm in result["arms"].values())
    if fewest == 1:
        yield "An arm with a single run says nothing about how much a run varies: its intervals hold images alone."
    elif fewest < FEW_SEEDS:
        yield f"{fewest} seeds an arm are few: intervals over so few runs come out too narrow."


def _seeds(arm: dict[str, Any], figure: str) -> list[float]:
    return [value for value in arm["noise"][figure]["overall"]["per_seed"] if value is not None]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "less than 1 %"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
