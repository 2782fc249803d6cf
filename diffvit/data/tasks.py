"""Work on numbered parts, spread over the cluster as Ray Data tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.data
from ray.data import DataContext

Report = Callable[[str, int, int], None]
"""Hears of progress: (what is being done, parts done, parts in all)."""


def map_anywhere(work: Callable[[Any, int], str], shared: Any, numbers: list[int]) -> Iterator[str]:
    """`work(shared, number)` for each number, one task each, in whatever order they end; `shared` goes out once."""
    if not numbers:
        return
    DataContext.get_current().enable_progress_bars = False
    reference = ray.put(shared)

    def call(row: dict[str, Any]) -> dict[str, Any]:
        return {"result": work(fetch(reference), int(row["item"]))}

    for row in ray.data.from_items(numbers, override_num_blocks=len(numbers)).map(call).iter_rows():
        yield str(row["result"])


def fetch(reference: Any) -> Any:
    """What the driver put there, for a task or an actor of Ray Data.

    Raises:
        RuntimeError: this node cannot unpack it. As it comes from Ray, Ray Data would try again for ever, and silently.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RaySystemError as error:
        raise RuntimeError(f"a node lacks what the task needs: {error}") from None
