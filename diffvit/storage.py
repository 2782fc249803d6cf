"""A folder on a local disk, s3:// or gs://, with the few operations that data sets and runs need. Nothing of Ray.

A reader never sees half a file: local files are written beside and renamed, objects appear when they are whole.
When a store is away, operations are tried again with back-off, for `RETRY_SECONDS` in all unless told otherwise, before
they fail.

Credentials come from where the SDKs look for them (environment, profile, instance role), never from the URI.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from diffvit.object_stores import StorageError, file_system, open_object, opened_file

__all__ = ["MACHINE_ERRORS", "RETRY_SECONDS", "UNFINISHED_SUFFIX", "Storage", "StorageError", "absolute", "sync"]

_REMOTE_SCHEMES = ("s3", "gs", "gcs")
RETRY_SECONDS = 60.0
_COPIED_BYTES = 8 * 2**20
_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.5, 15.0
MACHINE_ERRORS = (
    errno.EIO,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.ENODEV,
)
"""Numbers of errors of a read that another try may not meet: no reason to leave an image out for good."""
UNFINISHED_SUFFIX = ".unfinished"
"""Of the file that `write` makes beside a local one; left behind where the process was killed meanwhile."""
_PERMANENT = (
    "ACCESS_DENIED",
    "NO_SUCH_BUCKET",
    "NoSuchBucket",
    "' not found",  # Arrow's word for the bucket, where it asks for its region
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    ": Permanent error",  # Google's word for what no second try will change
)

P = ParamSpec("P")
T = TypeVar("T")


def absolute(location: str) -> str:
    """The same place for a process in another working directory; a URI stays as it is."""
    return location if "://" in location else str(Path(location).expanduser().absolute())


def _retried(operation: Callable[P, T]) -> Callable[P, T]:
    """Try a method of `Storage` again while a remote store is away.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: the store refused, or stayed away for too long.
    """

    @wraps(operation)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        storage: Any = args[0]
        patience = RETRY_SECONDS if storage.retry_seconds is None else storage.retry_seconds
        deadline, delay = time.monotonic() + patience, _FIRST_DELAY_SECONDS
        while True:
            try:
                return operation(*args, **kwargs)
            except FileNotFoundError:
                raise
            except OSError as error:
                if not storage.is_remote:
                    raise
                if any(word in str(error) for word in _PERMANENT):
                    raise StorageError(f"{storage.uri} refuses: {_reason(error)}") from None
                if time.monotonic() + delay > deadline:
                    raise StorageError(f"{storage.uri} is away, tried for {patience:.0f} s: {_reason(error)}") from None
            except pa.ArrowException as error:  # what Arrow has no OSError for, as credentials that cannot be read
                raise StorageError(f"{storage.uri} refuses: {_reason(error)}") from None
            time.sleep(delay)
            delay = min(2 * delay, _LONGEST_DELAY_SECONDS)

    return call


def _reason(error: Exception) -> str:
    """What a store said, without the page of details that Google's appends."""
    return str(error).partition(" error_info={")[0]


@dataclass(frozen=True)
class Storage:
    """A folder; names are relative to it, with `/`.

    Raises:
        ValueError: the URI has another scheme, or credentials in it.
    """

    uri: str
    retry_seconds: float | None = None
    """How long an absent store is waited for; 0: not at all; None: `RETRY_SECONDS`."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.uri) if "://" in self.uri else None
        if parts is None:
            return
        if parts.scheme not in _REMOTE_SCHEMES:
            raise ValueError(
                f"a location must be a path or a URI of {', '.join(f'{s}://' for s in _REMOTE_SCHEMES)}; "
                f"got {parts.scheme}://"
            )
        anonymous = parts.scheme != "s3" and parts.username == "anonymous"  # pyarrow's word for a public bucket
        named = (parts.username and not anonymous) or parts.password
        if named or "secret_key" in parts.query or "access_key" in parts.query:
            raise ValueError(
                f"{parts.scheme}://…/{parts.path.lstrip('/')} carries credentials; leave them to the environment "
                "(AWS_ACCESS_KEY_ID, a profile, an instance role), where they reach no log and no checkpoint"
            )
        if not parts.hostname:
            raise ValueError(f"{self.uri!r} names no bucket")

    @property
    def is_remote(self) -> bool:
        return "://" in self.uri

    def child(self, name: str) -> Storage:
        """The folder `name` below this one."""
        head, mark, query = self.uri.partition("?") if self.is_remote else (self.uri, "", "")
        return Storage(f"{head.rstrip('/')}/{name}{mark}{query}", self.retry_seconds)

    def path(self, name: str = "") -> str:
        """What pyarrow calls `name`; on a local disk an absolute path."""
        root = self._opened()[1]
        return f"{root}/{name}" if name else root

    @property
    def filesystem(self) -> fs.FileSystem:
        return self._opened()[0]

    @_retried
    def _opened(self) -> tuple[fs.FileSystem, str]:
        return file_system(self.uri) if self.is_remote else (fs.LocalFileSystem(), absolute(self.uri))

    @_retried
    def read(self, name: str) -> bytes:
        with opened_file(self.filesystem, self.path(name)) as file:
            content: bytes = file.read()
        return content

    def read_or_none(self, name: str) -> bytes | None:
        """The same; None where there is no such file."""
        try:
            return self.read(name)
        except (FileNotFoundError, NotADirectoryError):
            return None

    @_retried
    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes of a file from `offset` on; fewer where the file ends. Safe to call from many threads."""
        if self.is_remote:
            content: bytes = open_object(self.uri, name).read_at(length, offset)
            return content
        with open(self.path(name), "rb", buffering=0) as file:  # noqa: PTH123, the plain call is twice as fast
            return os.pread(file.fileno(), length, offset)

    @_retried
    def write(self, name: str, content: bytes | pa.Buffer, *, durable: bool = True) -> None:
        """Write the whole file or nothing. One that is not `durable` may be lost when a local disk loses power."""
        path = self.path(name)
        if self.is_remote:
            try:
                with self.filesystem.open_output_stream(path, compression=None) as file:  # else by the name's ending
                    file.write(content)
            except FileNotFoundError:  # from gs://; s3:// has a word of its own for it
                raise StorageError(f"{self.uri} names a bucket that does not exist") from None
            return
        _write_local(Path(path), content, durable)

    def sweep(self) -> None:
        """Delete what processes that were killed in `write` left beside the files of a local folder, at any depth."""
        if not self.is_remote:
            for path in Path(self.path()).rglob(f".*{UNFINISHED_SUFFIX}"):
                if path.is_file() and not path.is_symlink():
                    path.unlink(missing_ok=True)

    @_retried
    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to `target` on a local disk, however large it is."""
        with (
            self.filesystem.open_input_stream(self.path(name), compression=None) as source,
            target.open("wb") as copy,
        ):
            shutil.copyfileobj(source, copy, _COPIED_BYTES)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        stamp = self.stamp(name)
        return None if stamp is None else stamp[0]

    @_retried
    def stamp(self, name: str) -> tuple[int, int] | None:
        """Bytes of a file and the time of its last change in nanoseconds; None where there is none."""
        info = self.filesystem.get_file_info(self.path(name))
        return (int(info.size), int(info.mtime_ns or 0)) if info.type == fs.FileType.File else None

    def sizes(self, folder: str = "") -> dict[str, int]:
        """`{name: bytes}` of every file below `folder`, sorted by name."""
        return {name: size for name, (size, _) in self.stamps(folder).items()}

    @_retried
    def stamps(self, folder: str = "") -> dict[str, tuple[int, int]]:
        """As `sizes`, with the time of the last change in nanoseconds."""
        root = self.path()
        return {
            info.path[len(root) + 1 :]: (int(info.size), int(info.mtime_ns or 0)) for info in self._files_below(folder)
        }

    @_retried
    def names(self, folder: str = "") -> list[str]:
        """What lies in `folder` itself, files and folders, sorted."""
        if isinstance(self.filesystem, fs.GcsFileSystem):  # whose list leaves out folders that nobody made as such
            start = len(self.path(folder)) + 1
            return sorted({info.path[start:].partition("/")[0] for info in self._files_below(folder)})
        selector = fs.FileSelector(self.path(folder), allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def _files_below(self, folder: str) -> list[fs.FileInfo]:
        selector = fs.FileSelector(self.path(folder), recursive=True, allow_not_found=True)
        files = (info for info in self.filesystem.get_file_info(selector) if info.type == fs.FileType.File)
        return sorted(files, key=lambda info: info.path)

    @_retried
    def delete(self, name: str) -> None:
        """Delete a file; one that is not there is no error."""
        with suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path(name))

    @_retried
    def delete_folder(self, name: str) -> None:
        """Delete `name` with all that is below; a folder that is not there is no error."""
        if self.filesystem.get_file_info(self.path(name)).type == fs.FileType.Directory:
            with suppress(FileNotFoundError):  # gs:// has emptied a folder that nobody made, and misses it
                self.filesystem.delete_dir(self.path(name))


def _write_local(path: Path, content: bytes | pa.Buffer, durable: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            raise StorageError(f"the disk of {path.parent} is full: {path.name} was not written") from None
        raise


def sync(path: Path) -> None:
    """Bring a local file's content, or a folder's list of names, to the disk, where losing power leaves it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
