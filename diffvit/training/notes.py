"""What a run tells in lines, each once: images that it left out, and what it has to say where no console hears it."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from diffvit.storage import Storage, StorageError

SKIPPED_FILE = "skipped.txt"
MESSAGES_FILE = "messages.txt"
_WRITE_SECONDS = 10.0


class LineFile:
    """A file of the run at `location`, a path or a URL; written anew now and then, when its storage takes it."""

    def __init__(self, location: str, name: str) -> None:
        self._storage, self._name = Storage(location, retry_seconds=0), name
        self._known: dict[str, None] = {}
        self._written = 0
        self._due = 0.0

    def add(self, lines: Iterable[str]) -> list[str]:
        """Those of `lines` that are new, each on a line of its own; they are written down soon."""
        new = [line for line in dict.fromkeys(map(_folded, lines)) if line not in self._known]
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
            lines = dict.fromkeys([*_read(self._storage, self._name), *self._known])
            self._storage.write(self._name, "".join(line + "\n" for line in lines).encode(), durable=False)
            self._written = len(self._known)


class Notes:
    """Hears a run that no console shows: an arm of a comparison, a trial."""

    def __init__(self, location: str) -> None:
        self._skipped, self._messages = LineFile(location, SKIPPED_FILE), LineFile(location, MESSAGES_FILE)
        self._hearing = threading.Lock()  # the thread that writes checkpoints warns too
        self.messages: list[str] = []
        """Of this sitting, each once."""

    def publish(self, kind: str, fields: dict[str, Any]) -> None:
        """As `diffvit.training.tracking.Publish`; what the storage does not take now is written down later."""
        with self._hearing:
            if kind == "skipped":
                self._skipped.add(fields["images"])
            elif "message" in fields:
                self.messages += self._messages.add([fields["message"]])
            self._skipped.flush_when_due()
            self._messages.flush_when_due()

    def close(self) -> None:
        """Write down what is not yet, if the storage takes it."""
        with self._hearing:
            self._skipped.flush()
            self._messages.flush()


def read_messages(location: str) -> list[str]:
    """What the run at `location` had to say; nothing where its storage does not answer."""
    with suppress(OSError, StorageError):
        return _read(Storage(location, retry_seconds=0), MESSAGES_FILE)
    return []


def _folded(text: str) -> str:
    return re.sub(r"\s*[\r\n]\s*", " ", text)


def _read(storage: Storage, name: str) -> list[str]:
    return (storage.read_or_none(name) or b"").decode().splitlines()
