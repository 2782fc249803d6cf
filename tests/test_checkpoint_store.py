"""Which checkpoints are kept, and what a reader sees of a store that is being written."""

from __future__ import annotations

import pytest

from diffvit.training.checkpoint_store import Entry, kept_steps


def entries(*top1_by_epoch: float, steps_between: int = 0) -> list[Entry]:
    """An evaluated checkpoint every 10 steps, each an epoch, and `steps_between` others after each."""
    found = []
    for number, top1 in enumerate(top1_by_epoch, start=1):
        found.append(Entry(10 * number, {"epoch": number, "top1": top1}))
        found += [Entry(10 * number + k, {"epoch": number + 1}) for k in range(1, steps_between + 1)]
    return found


@pytest.mark.parametrize(
    ("found", "keep_last", "every_epochs", "kept"),
    [
        ([], 2, None, set()),
        (entries(50.0), 3, None, {10}),
        (entries(50, 70, 60, 65), 1, None, {20, 40}),
        (entries(50, 70, 60, 65), 2, None, {20, 30, 40}),
        (entries(50, 70, 70, 65), 1, None, {20, 40}),  # of equals the first
        (entries(50, 70, 60, 65, steps_between=2), 2, None, {20, 41, 42}),
        (entries(50, 90, 60, 65, 61, 62, 63, steps_between=1), 1, 3, {20, 30, 60, 71}),
    ],
)
def test_the_last_the_best_and_every_so_many_epochs(
    found: list[Entry], keep_last: int, every_epochs: int | None, kept: set[int]
) -> None:
    assert kept_steps(found, keep_last, every_epochs) == kept
