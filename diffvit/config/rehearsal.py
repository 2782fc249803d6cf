"""A rehearsal of a run: a few steps, to learn what the whole of it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffvit.config.checks import require


@dataclass(frozen=True)
class RehearsalOptions:
    """Whether to train, or only to find out what training would take."""

    rehearse: bool = False
    """Train a few steps, on synthetic images where there are no others yet, and predict time, memory and cost of the
    run; nothing of it is kept."""
    rehearse_steps: int | None = None
    """Steps of a rehearsal, the first 10 of which warm up; None: 50."""
    price_per_hour: float | None = None
    """Price of one node for one hour, in any currency: a rehearsal then predicts the cost of the run."""

    def __post_init__(self) -> None:
        require(
            self.rehearse_steps is None or (self.rehearse and self.rehearse_steps >= 2),
            f"rehearse_steps must be at least 2, and needs --rehearse; got {self.rehearse_steps}",
        )
        require(
            self.price_per_hour is None or 0 <= self.price_per_hour < math.inf,
            f"price_per_hour must not be negative, nor infinite, got {self.price_per_hour}",
        )
        require(
            self.price_per_hour is None or self.rehearse,
            f"price_per_hour is for --rehearse, which is missing; got {self.price_per_hour}",
        )
