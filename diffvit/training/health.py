"""Steps whose loss or gradient is not finite ("poisoned"): counted, and judged when there are too many.

Their update never reaches the weights: `skip_poisoned` tells the optimiser on the device, without waiting for it. The
norm is that of the gradient after it was reduced, so all ranks see the same and agree without asking each other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

CALM_STEPS = 10
"""Good steps in a row after which the poisoned ones before them no longer count."""


def skip_poisoned(optimizer: Optimizer, grad_norm: Tensor) -> None:
    """Make the next step of a fused optimiser change nothing, not even its moments, unless `grad_norm` is finite.

    What `GradScaler` does for an overflow in half precision.
    """
    optimizer.found_inf = grad_norm.isfinite().logical_not().float()  # type: ignore[attr-defined]


class Health:
    """The gradient norms of the steps, read now and then."""

    def __init__(self, max_skipped_steps: int) -> None:
        self._max_skipped_steps = max_skipped_steps
        self._unread: list[Tensor] = []
        self.calm = 0
        """Good steps since the last poisoned one."""
        self.counted = 0
        """Poisoned steps that still count."""
        self.last_poisoned: int | None = None
        """The last poisoned step."""

    @property
    def is_sick(self) -> bool:
        """Whether there were too many: what is wrong is the weights, and not a batch."""
        return self.counted > self._max_skipped_steps

    @property
    def complaint(self) -> str:
        """What is wrong, where there were too many."""
        return (
            f"the loss or its gradient is not finite at step {self.last_poisoned}, after {self.counted} such steps "
            f"with never {CALM_STEPS} good ones between them, more than the optim.max_skipped_steps = "
            f"{self._max_skipped_steps} that are left out"
        )

    def add(self, grad_norm: Tensor) -> None:
        self._unread.append(grad_norm)

    def read(self, step: int) -> int:
        """Judge the steps since the last call, up to `step`; how many of them were poisoned. Waits for the device."""
        if not self._unread:
            return 0
        finite = torch.stack(self._unread).isfinite().tolist()
        first = step - len(finite) + 1
        self._unread.clear()
        for place, good in enumerate(finite):
            if good:
                self.calm += 1
                self.counted = 0 if self.calm >= CALM_STEPS else self.counted
            else:
                self.calm = 0
                self.counted += 1
                self.last_poisoned = first + place
        return finite.count(False)

    def cure(self) -> None:
        """The weights were taken back to when they were good."""
        self.calm = self.counted = 0

    def state_dict(self) -> dict[str, int | None]:
        """What a run that goes on from here must know; everything up to here is read."""
        return {"calm": self.calm, "counted": self.counted, "last_poisoned": self.last_poisoned}

    def load_state_dict(self, saved: dict[str, int | None]) -> None:
        self.calm, self.counted = saved["calm"] or 0, saved["counted"] or 0
        self.last_poisoned = saved["last_poisoned"]
