"""What a run wrote to TensorBoard, as plain lists."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curves = dict[str, list[tuple[int, float]]]
"""(step, value) by name, in the order of steps."""


def read_curves(folder: Path) -> Curves:
    """Every scalar below `folder`; where a run was cut and continued, what was written last for a step.

    Raises:
        FileNotFoundError: there are no TensorBoard events.
    """
    if not any(folder.glob("events.out.tfevents.*")):
        raise FileNotFoundError(f"{folder} holds no TensorBoard events")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: sorted({event.step: float(event.value) for event in events.Scalars(name)}.items())
        for name in events.Tags()["scalars"]
    }
