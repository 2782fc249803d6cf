"""Work on numbered parts, spread over the cluster as Ray Data tasks."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.data import DataContext

from diffvit.storage import Storage, StorageError

STORE_ERRORS = (OSError, StorageError)

Report = Callable[[str, int, int], None]
"""Hears of progress: (what is being done, parts done, parts in all)."""


def map_anywhere(
    work: Callable[[Any, int], str], shared: Any, numbers: list[int], places: Sequence[Storage] = ()
) -> Iterator[str]:
    """`work(shared, number)` for each number, one task each, in whatever order they end; `shared` goes out once.

    `places` are what the work reads and writes; the driver sees them.

    Raises:
        StorageError: a store stayed away, a disk failed, or a node does not see one of the places.
    """
    if not numbers:
        return
    DataContext.get_current().enable_progress_bars = False
    reference = ray.put(shared)

    def call(row: dict[str, Any]) -> dict[str, Any]:
        try:
            require_seen(places)
            return {"result": work(fetch(reference), int(row["item"])), "error": ""}
        except STORE_ERRORS as error:  # as a value, for Ray Data loses what an exception was
            return {"result": "", "error": str(error)}

    for row in ray.data.from_items(numbers, override_num_blocks=len(numbers)).map(call).iter_rows():
        if row["error"]:
            raise StorageError(row["error"])
        yield str(row["result"])


def require_seen(places: Iterable[Storage]) -> None:
    """Check that this node has the local folders among `places`.

    Raises:
        StorageError: it lacks one, and would take every image in it for lost.
    """
    for place in places:
        if not place.is_remote and not Path(place.path()).is_dir():
            raise StorageError(
                f"{place.uri} is not on the node {socket.gethostname()}: a folder that a cluster reads or writes must "
                "be on a disk that all its nodes share; or use an object store, or one node"
            )


def fetch(reference: Any) -> Any:
    """What the driver put there, for a task or an actor of Ray Data.

    To unpickle it is to import torch, which an interrupt leaves half imported. Ray cancels tasks by interrupts and
    uses their processes again: the next task there would fail for ever.

    Raises:
        RuntimeError: this node cannot unpack it. As it comes from Ray, Ray Data would try again for ever, and silently.
    """
    try:
        with _interrupts_wait():
            return ray.get(reference)
    except ray.exceptions.RaySystemError as error:
        raise RuntimeError(f"a node lacks what the task needs: {error}") from None


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """An interrupt that comes meanwhile is raised afterwards, unless an error is."""
    if threading.current_thread() is not threading.main_thread():  # others are not interrupted
        yield
        return
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        signal.raise_signal(signal.SIGINT)
