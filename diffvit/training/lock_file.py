"""A small file that many processes want to write, of which one may: on a disk, and in an object store.

Both offer the same four operations; `swap` is the one that decides. `diffvit.training.run_lock` tells who may hold it.
"""

from __future__ import annotations

import errno
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

from diffvit.storage import Storage, StorageError

_TURN_SECONDS = 90.0
"""Whoever has had the turn to swap a file for so long is gone."""
_POLL_SECONDS = 0.1
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_SETTLE_SECONDS = 2.0
"""How long a store that cannot refuse a write is watched for somebody else's."""

_TIMES: dict[str, Any] = {"connect_timeout": 5, "read_timeout": 10, "retries": {"total_max_attempts": 2}}


class LockFile(Protocol):
    """What both offer. Errors are OSError on a disk, StorageError in a store."""

    def read(self) -> str | None:
        """What it holds; None where there is none."""

    def swap(self, old: str | None, new: str) -> bool:
        """Write `new` if it still holds `old` (None: is not there); of many who try, one is told True."""

    def write(self, new: str) -> None:
        """Write `new` over what its owner, who calls this, wrote before."""

    def delete(self) -> None:
        """Delete it; it may be gone already."""


def lock_file(folder: str | Path, name: str) -> LockFile:
    """The lock `name` in `folder`, a path or a URL."""
    if "://" not in str(folder):
        return DiskLockFile(Path(folder) / name)
    return StoredLockFile(Storage(str(folder), retry_seconds=0), name)


class DiskLockFile:
    """On any file system that several hosts share: a link is made in one step, on NFS too."""

    def __init__(self, path: Path) -> None:
        self._path, self._id = path, uuid.uuid4().hex
        self._turn = path.with_name(f".{path.name}.turn")
        self._asked = time.monotonic()

    def read(self) -> str | None:
        try:
            return self._path.read_text()
        except FileNotFoundError:
            return None

    def swap(self, old: str | None, new: str) -> bool:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if old is None:
            return self._create(self._path, new)
        if not self._create(self._turn, new):  # of those who want to, one at a time may try
            time.sleep(_POLL_SECONDS)
            if time.monotonic() - self._asked > _TURN_SECONDS:
                self._turn.unlink(missing_ok=True)
            return False
        try:
            if self.read() != old:
                return False
            self.write(new)
        finally:
            self._turn.unlink()
        return True

    def write(self, new: str) -> None:
        self._write_aside(new).replace(self._path)

    def delete(self) -> None:
        self._path.unlink(missing_ok=True)

    def _create(self, path: Path, content: str) -> bool:
        mine = self._write_aside(content)
        try:
            os.link(mine, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_in_place(path, content)
        finally:
            mine.unlink()
        return True

    def _write_aside(self, content: str) -> Path:
        path = self._path.with_name(f".{self._path.name}.{self._id}")
        path.write_text(content)
        return path


def _create_in_place(path: Path, content: str) -> bool:
    """Where there are no hard links (exFAT, buckets that are mounted): for a moment its content is not whole."""
    try:
        with path.open("x") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


class StoredLockFile:
    """An object. S3 itself refuses a write whose condition does not hold, where boto3 is there to state it.

    Elsewhere (gs://, or no boto3) a swap reads, writes, waits, and reads again: the last writer has it. What that can
    lose: of two processes that want the name at the same moment, one that is held up between its read and its write for
    longer than it waits takes the name from one that believes to have it. Both then work, until the first looks at its
    lock again, a few seconds later, and ends. What both write meanwhile is the same, since a run is determined by its
    config; the log of interruptions may miss one.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name = storage, name
        self._conditional = _s3_client(storage)

    def read(self) -> str | None:
        content = self._storage.read_or_none(self._name)
        return None if content is None else content.decode()

    def swap(self, old: str | None, new: str) -> bool:
        if self._conditional is not None:
            return self._swap_if(old, new)
        if self.read() != old:
            return False
        self.write(new)
        time.sleep(_SETTLE_SECONDS)
        return self.read() == new

    def write(self, new: str) -> None:
        self._storage.write(self._name, new.encode())

    def delete(self) -> None:
        self._storage.delete(self._name)

    def _swap_if(self, old: str | None, new: str) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        bucket, _, key = self._storage.path(self._name).partition("/")
        place = {"Bucket": bucket, "Key": key}
        condition = {"IfNoneMatch": "*"}
        try:
            if old is not None:
                there = self._conditional.get_object(**place)
                if there["Body"].read().decode() != old:
                    return False
                condition = {"IfMatch": there["ETag"]}
            self._conditional.put_object(**place, Body=new.encode(), **condition)
        except ClientError as error:
            if error.response["Error"]["Code"] in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"):
                return self.read() == new  # it was written, and boto3, which had no answer, wrote it again
            raise StorageError(f"{self._storage.uri} refuses: {error}") from None
        except BotoCoreError as error:
            raise StorageError(f"{self._storage.uri} is away: {error}") from None
        return True


def _s3_client(storage: Storage) -> Any:
    """A boto3 client for the store that `storage` names; None where it is not S3, or boto3 is not there."""
    parts = urlsplit(storage.uri)
    if parts.scheme != "s3":
        return None
    with suppress(ImportError):
        import boto3
        from botocore.config import Config

        options = {name: values[0] for name, values in parse_qs(parts.query).items()}
        endpoint = options.get("endpoint_override")
        if endpoint and "://" not in endpoint:
            endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
        return boto3.client("s3", endpoint_url=endpoint, region_name=options.get("region"), config=Config(**_TIMES))
    return None
