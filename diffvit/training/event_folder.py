"""Where TensorBoard's events of a run are written: its own folder or, as objects cannot be appended to, one beside it.

The events of a run in an object store are written to this machine's disk and copied whole: every half minute, before
each checkpoint, and at the end. So what a checkpoint's run has shown is in the store before the checkpoint is; and
nothing is needed beyond `diffvit.storage`, which knows retries and both stores.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack, suppress
from pathlib import Path

from diffvit.scratch import scratch_folder
from diffvit.storage import Storage, StorageError

TENSORBOARD_FOLDER = "tensorboard"
_COPY_SECONDS = 30.0


class EventFolder:
    """`path` is the folder to write to; it is gone after `close` where it is not the run's own."""

    def __init__(self, run: str) -> None:
        self._storage = Storage(run, retry_seconds=0).child(TENSORBOARD_FOLDER)
        self._copied: dict[str, int] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._stack = ExitStack()
        if not self._storage.is_remote:
            self.path = Path(self._storage.path())
            return
        self.path = self._stack.enter_context(scratch_folder())
        self._thread = threading.Thread(target=self._copy_now_and_then, name="events", daemon=True)
        self._thread.start()

    def copy(self) -> None:
        """Bring the store up to date; nothing to do for a run on a disk.

        Raises:
            StorageError: the store is away.
        """
        with self._lock:
            if not self._storage.is_remote or self._closed.is_set():
                return
            for file in sorted(self.path.iterdir()):
                content = file.read_bytes()
                if self._copied.get(file.name) != len(content):  # events are only ever appended
                    self._storage.write(file.name, content)
                    self._copied[file.name] = len(content)

    def close(self) -> None:
        """Copy what is still missing if the store is there, and delete the folder beside the run's."""
        with suppress(StorageError):
            self.copy()
        self._closed.set()
        with self._lock:
            self._stack.close()

    def _copy_now_and_then(self) -> None:
        while not self._closed.wait(_COPY_SECONDS):
            with suppress(StorageError):
                self.copy()
