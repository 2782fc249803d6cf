"""The peer of benchmarks/time_to_accuracy.py is the one that it names, and its arithmetic is right."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module("time_to_accuracy")
    sys.path.remove(folder)


def test_the_peer_has_the_published_size_and_rates(benchmark: Any) -> None:
    model = benchmark.PeerViT(10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 210_058
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    rates = [benchmark.peer_lr(epoch) for epoch in (0, 9, 10, 105, 200)]
    assert rates == pytest.approx([5e-5, 5e-4, 5e-4, (5e-4 + 1e-5) / 2, 1e-5])


def test_the_peers_crops_are_shifts_and_mirrors_of_the_image(benchmark: Any) -> None:
    torch.manual_seed(0)
    image = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    image[0, 0, 10, 3] = 200
    varied = benchmark.augmented(image.expand(300, -1, -1, -1))
    places = {tuple(place) for place in varied.nonzero()[:, 2:].tolist()}
    assert len(varied.nonzero()) == 300
    assert places == {(y, x) for y in range(8, 13) for x in [*range(1, 6), *range(22, 27)]}


def test_seconds_to_the_target(benchmark: Any) -> None:
    curve = [(10.0, 80.0), (20.0, 90.0), (30.0, 89.0)]
    assert benchmark.seconds_to(curve, 90.0) == 20.0
    assert benchmark.seconds_to(curve, 90.1) is None
    curves = {"diffvit": [curve, [(30.0, 91.0)]], "s-chh's ViT": [[(50.0, 90.0)], [(100.0, 90.5)]]}
    options = benchmark.Options(data_path="x", seeds=(3, 5))
    assert peer_row(benchmark.table(curves, options)) == ["50.0", "100.0", "75.0", "35.4", "3.00"]
    curves["s-chh's ViT"][0] = [(60.0, 89.0), (120.0, 89.9)]  # gave up
    assert peer_row(benchmark.table(curves, options)) == [">120.0", "100.0", ">110.0", "-", ">4.40"]
    curves["diffvit"][0] = [(10.0, 80.0)]
    assert peer_row(benchmark.table(curves, options))[-1] == "-"


def peer_row(shown: Any) -> list[str]:
    header, *cells = [list(column.cells)[1] for column in shown.columns]
    assert header == "s-chh's ViT"
    return cells
