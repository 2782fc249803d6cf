"""What the whole of a run will take, from what a rehearsal measured. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

from diffvit.config import RunConfig
from diffvit.data.order import TrainPlan
from diffvit.training.rehearsal import Measured
from diffvit.training.tracking import draws_attention

BOTTLENECK_SHARE = 0.1
"""Share of the step from which waiting for images or for other workers is the bottleneck, else computing is."""

_SETTLED_SECONDS = 30.0
"""The stream takes about so long until it has its usual speed."""


@dataclass(frozen=True)
class Forecast:
    """Seconds of the whole run, without interruptions."""

    startup_seconds: float
    """Until the steps have their usual speed."""
    training_seconds: float
    evaluation_seconds: float
    saving_seconds: float
    """Training waiting for checkpoints, and drawing."""

    @property
    def total_seconds(self) -> float:
        return self.startup_seconds + self.training_seconds + self.evaluation_seconds + self.saving_seconds

    def cost(self, nodes: int, price_per_hour: float) -> float:
        """In the price's currency."""
        return self.total_seconds / 3600 * nodes * price_per_hour


def predict(
    config: RunConfig, plan: TrainPlan, val_images: int, measured: Measured, startup_seconds: float
) -> Forecast:
    """The forecast for a run whose start-up took `startup_seconds` in the rehearsal.

    Evaluation is taken to grow with the number of images, every step to take as long as those that were timed.
    """
    training = plan.total_steps * measured.step_seconds
    drawings = sum(draws_attention(epoch, plan.epochs) for epoch in range(1, plan.epochs + 1))
    checkpoints = float(plan.epochs)
    if config.checkpoint.every_steps:
        checkpoints += plan.total_steps // config.checkpoint.every_steps
    if config.checkpoint.every_minutes:  # since the last one, whatever that was for
        checkpoints *= 1 + training / checkpoints // (60 * config.checkpoint.every_minutes)
    return Forecast(
        startup_seconds=startup_seconds + measured.filling_seconds,
        training_seconds=training,
        evaluation_seconds=plan.epochs * measured.evaluation_seconds * val_images / measured.evaluation_images,
        saving_seconds=checkpoints * measured.snapshot_seconds + drawings * measured.drawing_seconds,
    )


def bottleneck(measured: Measured) -> tuple[str, str]:
    """What to make faster first, and by which rule."""
    shares = {
        "data": measured.wait_seconds / measured.step_seconds,
        "communication": measured.communication_seconds / measured.step_seconds,
    }
    name, share = max(shares.items(), key=lambda item: item[1])
    if share > BOTTLENECK_SHARE:
        return name, f"{100 * share:.1f} % of the step, more than {100 * BOTTLENECK_SHARE:.0f} %"
    return "compute", f"neither data nor communication takes more than {100 * BOTTLENECK_SHARE:.0f} % of the step"


def caveat(measured: Measured) -> str:
    """What to say of a forecast whose steps were timed while the stream still started; nothing of others."""
    timed = measured.steps * measured.step_seconds
    if timed >= _SETTLED_SECONDS:
        return ""
    return (
        f"; timed for {timed:.0f} s only, while the stream starts, so perhaps far too long: try more --rehearse-steps"
    )
