"""How fast models are beside each other: they take turns, so that what else the machine does falls on all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Pass = Callable[[nn.Module, Tensor], None]
"""What is timed."""


def inference_speed(models: Mapping[str, nn.Module], images_BCSS: Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    """`images_per_second` (median) and `ratio_to_first` of each model's time to the first's in the same round.

    `ratio_to_first` has the `median` and the quartiles `low` and `high` over rounds; above 1 is slower. The order of
    the models rotates. One round before is not counted.

    Args:
        models: in evaluation mode, on the device of the images.
        images_BCSS: normalised.
        rounds: times each model is measured; 2 or more.
    """
    return _take_turns(models, images_BCSS, rounds, _forward)


def training_speed(models: Mapping[str, nn.Module], images_BCSS: Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    """As `inference_speed`, of a forward and a backward pass in float32; no step is taken and no gradient is left."""
    found = _take_turns(models, images_BCSS, rounds, _forward_and_backward)
    for model in models.values():
        model.zero_grad(set_to_none=True)
    return found


@torch.no_grad()
def _forward(model: nn.Module, images: Tensor) -> None:
    model(images)


def _forward_and_backward(model: nn.Module, images: Tensor) -> None:
    model(images).square().sum().backward()


def _take_turns(models: Mapping[str, nn.Module], images: Tensor, rounds: int, run: Pass) -> dict[str, dict[str, Any]]:
    names = list(models)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            taken = _seconds(models[name], images, run)
            if number >= 0:
                seconds[name].append(taken)
    return {name: _result(seconds[name], seconds[names[0]], len(images)) for name in names}


def _seconds(model: nn.Module, images: Tensor, run: Pass) -> float:
    started = time.perf_counter()
    run(model, images)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - started


def _result(mine: list[float], base: list[float], images: int) -> dict[str, Any]:
    low, median, high = statistics.quantiles([m / b for m, b in zip(mine, base, strict=True)], n=4, method="inclusive")
    return {
        "images_per_second": images / statistics.median(mine),
        "ratio_to_first": {"median": median, "low": low, "high": high},
    }
