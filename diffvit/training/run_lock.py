"""One run, one owner: the second call with the same name is refused while the first lives.

The lock is a file in the run's folder, created in one step on any file system that several hosts share, which its owner
writes again every few seconds. Nobody's clock is trusted: an owner on another host lives if its file changes while we
look. One on this host lives if its process does. So a killed owner holds the name for half a minute at most.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

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

    def __init__(self, folder: Path) -> None:
        self._path, self._me = folder / LOCK_NAME, Owner.of_this_process()
        self._asked = time.monotonic()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def __enter__(self) -> RunLock:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create(self._path):
                left_behind = self._watch()
                if left_behind is not None and self._take_over(left_behind):
                    break
        except OSError as error:
            storage = self._path.parent.parent
            raise ValueError(f"storage {storage} cannot be written: {error.strerror or error}") from None
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        self._thread.join()
        if self._holder() == self._me.id:
            self._path.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        """Write ourselves to `path`, where there is nothing yet. A link is made in one step, on NFS too."""
        mine = self._write_aside(self._me)
        try:
            os.link(mine, path)
        except FileExistsError:
            return False
        finally:
            mine.unlink()
        return True

    def _write_aside(self, owner: Owner) -> Path:
        path = self._path.with_name(f".{LOCK_NAME}.{self._me.id}")
        path.write_text(json.dumps(asdict(owner)))
        return path

    def _watch(self) -> str | None:
        """What stands in a lock whose owner is gone; None where there is no lock any more."""
        content = self._read()
        owner = _parse(content or "")
        deadline = time.monotonic() + _SILENT_SECONDS
        while content is not None and not (owner and owner.is_gone) and time.monotonic() < deadline:
            is_here = owner is not None and owner.host == _host() and bool(owner.born)
            now = content if is_here else self._read()
            if is_here or now not in (content, None):
                who = f"process {owner.pid} on {owner.host.split()[0]}" if owner else "another process"
                raise ValueError(
                    f"run {self._path.parent.name!r} is being worked on by {who}; wait for it, end it, or choose "
                    "another --name"
                )
            content = now
            time.sleep(_BEAT_SECONDS / 10)
        return content

    def _take_over(self, left_behind: str) -> bool:
        """Take the place of a dead owner, if nobody was faster; of those who want to, one at a time may try."""
        turn = self._path.with_name(f".{LOCK_NAME}.turn")
        if not self._create(turn):
            time.sleep(_BEAT_SECONDS / 10)
            if time.monotonic() - self._asked > 3 * _SILENT_SECONDS:  # whose turn it was is gone too
                turn.unlink(missing_ok=True)
            return False
        try:
            if self._read() != left_behind:
                return False
            self._write_aside(self._me).replace(self._path)
        finally:
            turn.unlink()
        return True

    def _beat(self) -> None:
        beat = 0
        while not self._released.wait(_BEAT_SECONDS):
            beat += 1
            with suppress(OSError):  # a store that is away for a while is no reason to end
                if self._holder() not in (self._me.id, None):
                    os.kill(os.getpid(), signal.SIGINT)  # we were silent for too long, and the run has another owner
                    return
                self._write_aside(Owner(**{**asdict(self._me), "beat": beat})).replace(self._path)

    def _read(self) -> str | None:
        try:
            return self._path.read_text()
        except FileNotFoundError:
            return None

    def _holder(self) -> str | None:
        owner = _parse(self._read() or "")
        return owner.id if owner else None


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
