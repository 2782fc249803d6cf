"""Which steps count as poisoned, and when there are too many."""

from __future__ import annotations

import torch

from diffvit.training.health import Health


def add(health: Health, *norms: float) -> None:
    for norm in norms:
        health.add(torch.tensor(norm))


def test_counts_and_forgets_after_ten_good_steps() -> None:
    health = Health(max_skipped_steps=1)
    assert health.read(0) == 0
    add(health, 1.0, float("nan"), *[2.0] * 9)
    assert health.read(11) == 1
    assert (health.counted, health.last_poisoned, health.is_sick) == (1, 2, False)
    add(health, 3.0)  # the tenth
    assert health.read(12) == 0
    assert health.counted == 0
    add(health, float("inf"), *[1.0] * 9, float("nan"))
    assert health.read(23) == 2
    assert (health.counted, health.last_poisoned, health.is_sick) == (2, 23, True)
    health.cure()
    assert (health.counted, health.is_sick) == (0, False)
