"""TensorBoard's events of a run: kept in memory, and brought into the run's folder when its storage takes them.

So training neither waits for a disk or a store nor fails with it, and what could not be written is written later. A
file on a disk is appended to, every few seconds, and its readers go on where they were; an object is written anew. Both
also just before each checkpoint, so that what a checkpoint's run has shown is there before the checkpoint is.
"""

from __future__ import annotations

import io
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from diffvit.storage import Storage, StorageError

TENSORBOARD_FOLDER = "tensorboard"
_DISK_SECONDS, _STORE_SECONDS = 5.0, 30.0
"""Between two times that what is new is brought there."""


class EventLog:
    """The events of one sitting of the run at `run`, a path or a URL."""

    def __init__(self, run: str, first_step: int) -> None:
        """What a cut run has shown from step `first_step` on is not shown any more: it will be written again."""
        self._storage = Storage(run, retry_seconds=0).child(TENSORBOARD_FOLDER)
        self._name = f"events.out.tfevents.{time.time_ns() // 1000}.{socket.gethostname()}.{os.getpid()}"
        self._content = io.BytesIO()
        self._records, self._adding = RecordWriter(self._content), threading.Lock()
        self._copied, self._copying = 0, threading.Lock()
        self._closed = threading.Event()
        self._add(Event(step=first_step, file_version="brain.Event:2"))
        self._add(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
        self._thread = threading.Thread(target=self._copy_now_and_then, name="events", daemon=True)
        self._thread.start()

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self._add(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)])))

    def add_figure(self, tag: str, figure: Figure, step: int) -> None:
        png = io.BytesIO()
        figure.savefig(png, format="png")
        width, height = (round(inches * figure.dpi) for inches in figure.get_size_inches())
        image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png.getvalue())
        self._add(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, image=image)])))

    def copy(self) -> None:
        """Bring what is new into the run's folder.

        Raises:
            OSError, StorageError: the disk or the store is away or full.
        """
        with self._copying:
            if self._storage.is_remote:
                content = self._content_from(0)
                if len(content) > self._copied:
                    self._storage.write(self._name, content)
                    self._copied = len(content)
                return
            path = Path(self._storage.path(self._name))
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                done = file.tell()  # and not what was asked for: a disk that gets full takes a part of it
                while content := self._content_from(done):
                    done += file.write(content)

    def close(self) -> None:
        """Copy what is still missing if the storage takes it."""
        self._closed.set()
        self._thread.join()
        with suppress(OSError, StorageError):
            self.copy()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        with self._adding:
            self._records.write(event.SerializeToString())

    def _content_from(self, start: int) -> bytes:
        with self._adding:
            return bytes(self._content.getbuffer()[start:])

    def _copy_now_and_then(self) -> None:
        while not self._closed.wait(_STORE_SECONDS if self._storage.is_remote else _DISK_SECONDS):
            with suppress(OSError, StorageError):
                self.copy()
