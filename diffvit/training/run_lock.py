"""One run, one owner: the second call with the same name is refused while the first lives.

The lock is a file in the run's folder, created in one step (`diffvit.training.lock_file`), which its owner writes again
every few seconds. Nobody's clock is trusted: an owner on another host lives if its file changes while we look. One on
this host lives if its process does. So a killed owner holds the name for half a minute at most.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from diffvit.storage import StorageError
from diffvit.training.lock_file import lock_file

LOCK_NAME = "run.lock"
_BEAT_SECONDS = 5.0
_SILENT_SECONDS = 30.0
"""An owner that is not heard of for so long is gone."""


@dataclass(frozen=True)
class Owner:
    """Who holds a run, and the number of times it has said so."""

    id: str
    host: str
    pid: int
    born: str
    beat: int = 0

    @classmethod
    def of_this_process(cls) -> Owner:
        return cls(uuid.uuid4().hex, _host(), os.getpid(), _born(os.getpid()))

    @property
    def is_gone(self) -> bool:
        """Whether it was on this host and has ended; a process of the same number that was born later is another."""
        return self.host == _host() and bool(self.born) and _born(self.pid) != self.born


class RunLock:
    """Holds the run in `folder` as long as the `with` block runs.

    Raises:
        ValueError: somebody else holds it, or the folder cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self._storage, _, self._name = str(folder).partition("?")[0].rstrip("/").rpartition("/")
        self._file, self._me = lock_file(folder, LOCK_NAME), Owner.of_this_process()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def __enter__(self) -> RunLock:
        try:
            while not self._file.swap(None, _content(self._me)):
                left_behind = self._watch()
                if left_behind is not None and self._file.swap(left_behind, _content(self._me)):
                    break
        except (OSError, StorageError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"storage {self._storage} cannot be written: {reason}") from None
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        self._thread.join()
        with suppress(OSError, StorageError):  # left behind in a store that is away; soon it is nobody's
            if self._holder() == self._me.id:
                self._file.delete()

    def _watch(self) -> str | None:
        """What stands in a lock whose owner is gone; None where there is no lock any more."""
        content = self._file.read()
        owner = _parse(content or "")
        deadline = time.monotonic() + _SILENT_SECONDS
        while content is not None and not (owner and owner.is_gone) and time.monotonic() < deadline:
            is_here = owner is not None and owner.host == _host() and bool(owner.born)
            now = content if is_here else self._file.read()
            if is_here or now not in (content, None):
                who = f"process {owner.pid} on {owner.host.split()[0]}" if owner else "another process"
                raise ValueError(
                    f"run {self._name!r} is being worked on by {who}; wait for it, end it, or choose another --name"
                )
            content = now
            time.sleep(_BEAT_SECONDS / 10)
        return content

    def _beat(self) -> None:
        beat = 0
        while not self._released.wait(_BEAT_SECONDS):
            beat += 1
            with suppress(OSError, StorageError):  # a store that is away for a while is no reason to end
                if self._holder() not in (self._me.id, None):
                    _end_this_process()  # we were silent for too long, and the run has another owner
                    return
                self._file.write(_content(replace(self._me, beat=beat)))

    def _holder(self) -> str | None:
        owner = _parse(self._file.read() or "")
        return owner.id if owner else None


def _end_this_process() -> None:
    """As Ctrl-C does, which a shell's background jobs ignore."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    os.kill(os.getpid(), signal.SIGTERM if ignored else signal.SIGINT)


def _content(owner: Owner) -> str:
    return json.dumps(asdict(owner))


def _parse(content: str) -> Owner | None:
    try:
        return Owner(**json.loads(content))
    except (ValueError, TypeError):
        return None


def _host() -> str:
    """Name, boot and process namespace: where two processes agree on it, one can see whether the other lives."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode():x}"


def _born(pid: int) -> str:
    """When a process started, in the kernel's ticks; empty where it cannot be told, or there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
