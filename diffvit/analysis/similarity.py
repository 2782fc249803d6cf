"""CKA between all layers of all runs of all arms, in one pass, and what to hold it against.

Two networks of one architecture that differ in nothing but the seed are not the same either. Their similarity is the
*floor*: only an arm that is less like another arm than like itself under other seeds has changed its representation.

Letters: L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffvit.analysis.cka import CKA

RunKey = tuple[str, int]
"""Arm and seed."""
Representations = Mapping[str, Mapping[str, Tensor]]
"""`{stream: {layer: (n, D)}}` of one run, as `diffvit.analysis.features.representations` gives them."""


class Similarity:
    """One CKA a stream, over every layer of every run that has the stream."""

    def __init__(self) -> None:
        self._cka: dict[str, CKA] = {}

    @property
    def images(self) -> int:
        return max((cka.images for cka in self._cka.values()), default=0)

    def update(self, by_run: Mapping[RunKey, Representations]) -> None:
        """Add a batch: what every run makes of the same images."""
        streams = dict.fromkeys(stream for found in by_run.values() for stream in found)
        for stream in streams:
            layers = {
                f"{arm}/{seed}/{layer}": activation
                for (arm, seed), found in by_run.items()
                for layer, activation in found.get(stream, {}).items()
            }
            self._cka.setdefault(stream, CKA()).update(layers, layers)

    def compute(self) -> list[dict[str, Any]]:
        """One record for each stream, pair of arms and kind, values averaged over the pairs of runs.

        `kind`: 'within' (a run's layers with each other), 'floor' (one arm, two seeds) or 'across' (two arms, two seeds
        as the floor has them: runs of one seed start from partly the same weights and see the same order; pairs of one
        seed only where there are no others). `matrix` (La, Lb), layers of `arm_a` by those of `arm_b`; `same_depth`
        (L), its diagonal, and `same_depth_by_pair`, its mean for each pair of runs, both None where depths differ;
        `pairs`, how many.
        """
        return [record for stream, cka in self._cka.items() for record in _records(stream, cka)]


def _records(stream: str, cka: CKA) -> Iterator[dict[str, Any]]:
    matrix = cka.compute()
    rows: dict[RunKey, list[int]] = {}
    for i, name in enumerate(cka.layers_a):
        arm, seed, _ = name.rsplit("/", 2)
        rows.setdefault((arm, int(seed)), []).append(i)
    pairs: dict[tuple[str, str, str], list[Tensor]] = {}
    runs = list(rows)
    seeds = {arm: {seed for name, seed in runs if name == arm} for arm, _ in runs}
    for i, (arm_a, seed_a) in enumerate(runs):
        for arm_b, seed_b in runs[i:]:
            kind = "across" if arm_a != arm_b else "within" if seed_a == seed_b else "floor"
            if kind == "across" and seed_a == seed_b and seeds[arm_a] | seeds[arm_b] != {seed_a}:
                continue
            block = matrix[rows[arm_a, seed_a]][:, rows[arm_b, seed_b]]
            pairs.setdefault((kind, arm_a, arm_b), []).append(block)
    for (kind, arm_a, arm_b), blocks in pairs.items():
        mean = torch.stack(blocks).nanmean(0)
        square = mean.shape[0] == mean.shape[1]
        yield {
            "stream": stream,
            "kind": kind,
            "arm_a": arm_a,
            "arm_b": arm_b,
            "pairs": len(blocks),
            "matrix": mean.tolist(),
            "same_depth": mean.diagonal().tolist() if square else None,
            "same_depth_by_pair": [b.diagonal().nanmean().item() for b in blocks] if square else None,
        }
