"""`skipped.txt`: the images that training and evaluation left out, each once a sitting, with the reason."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from diffvit.storage import Storage, StorageError

SKIPPED_FILE = "skipped.txt"
_WRITE_SECONDS = 10.0


class SkippedImages:
    """The list of the run at `location`, a path or a URL. In an object store it is written anew, now and then."""

    def __init__(self, location: str) -> None:
        self._storage = Storage(location, retry_seconds=0)
        self._known: dict[str, None] = {}
        self._written = 0
        self._due = 0.0

    def add(self, images: Iterable[str]) -> list[str]:
        """Those of `images` that are new; they are written down."""
        new = [image for image in dict.fromkeys(images) if image not in self._known]
        self._known |= dict.fromkeys(new)
        if not self._storage.is_remote:
            with Path(self._storage.path(SKIPPED_FILE)).open("a") as file:
                file.writelines(image + "\n" for image in new)
        elif time.monotonic() >= self._due:
            self.flush()
        return new

    def flush(self) -> None:
        """Write down what is not yet, if the store is there."""
        if not self._storage.is_remote or self._written == len(self._known):
            return
        self._due = time.monotonic() + _WRITE_SECONDS
        with suppress(StorageError):
            try:
                earlier = self._storage.read(SKIPPED_FILE).decode().splitlines()
            except FileNotFoundError:
                earlier = []
            lines = dict.fromkeys([*earlier, *self._known])
            self._storage.write(SKIPPED_FILE, "".join(line + "\n" for line in lines).encode())
            self._written = len(self._known)
