"""Records of runs that never were, for the tests of what a sweep makes of them."""

from __future__ import annotations

from typing import Any

from diffvit.search.records import Record


def record(number: int, *top1: float, status: str = "finished", **fields: Any) -> Record:
    history = tuple(
        {"epoch": epoch, "top1": value, "top5": 100.0, "loss": 1.0, "train_loss": 1.0}
        | {"train_seconds": 2.5 * epoch, "at": 100.0 * number + epoch}
        for epoch, value in enumerate(top1, start=1)
    )
    defaults = {"role": "trial", "seed": 0, "values": {"lr": 0.001 * (number + 1)}, "config": "{}"}
    return Record(number, **{**defaults, "status": status, "history": history, **fields})
