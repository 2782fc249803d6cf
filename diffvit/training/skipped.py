"""`skipped.txt`: the images that training and evaluation left out, each once a sitting, with the reason."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress

from diffvit.storage import Storage, StorageError

SKIPPED_FILE = "skipped.txt"
_WRITE_SECONDS = 10.0


class SkippedImages:
    """The list of the run at `location`, a path or a URL; written anew now and then, when its storage takes it."""

    def __init__(self, location: str) -> None:
        self._storage = Storage(location, retry_seconds=0)
        self._known: dict[str, None] = {}
        self._written = 0
        self._due = 0.0

    def add(self, images: Iterable[str]) -> list[str]:
        """Those of `images` that are new; they are written down soon."""
        new = [image for image in dict.fromkeys(images) if image not in self._known]
        self._known |= dict.fromkeys(new)
        self.flush_when_due()
        return new

    def flush_when_due(self) -> None:
        """Write down what is not yet, unless that was just done."""
        if time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        """Write down what is not yet, if the disk or the store takes it."""
        if self._written == len(self._known):
            return
        self._due = time.monotonic() + _WRITE_SECONDS
        with suppress(OSError, StorageError):
            try:
                earlier = self._storage.read(SKIPPED_FILE).decode().splitlines()
            except FileNotFoundError:
                earlier = []
            lines = dict.fromkeys([*earlier, *self._known])
            self._storage.write(SKIPPED_FILE, "".join(line + "\n" for line in lines).encode(), durable=False)
            self._written = len(self._known)
