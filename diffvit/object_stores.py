"""How S3 and Google's storage are opened through pyarrow: with few tries of their own, and few requests."""

from __future__ import annotations

from datetime import timedelta
from functools import lru_cache
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
from pyarrow import fs

_S3_ATTEMPTS = 3
_GCS_RETRIES = timedelta(seconds=5)
_OPEN_OBJECTS = 16_384
"""More than ImageNet has shards (about 2,200), of which a random order reads any at any time. An open object
takes less than a kilobyte, and no connection that is kept."""


class StorageError(RuntimeError):
    """A store that stayed away, or refused; not the fault of a single image."""


@lru_cache
def file_system(uri: str) -> tuple[fs.FileSystem, str]:
    """File system of pyarrow for an s3://, gs:// or gcs:// URI, and the folder's path in it."""
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)  # asks S3 for the bucket's region, unless the URI says it
    except pa.ArrowInvalid as error:
        raise StorageError(f"{uri} cannot be opened: {error}") from None
    return _s3(uri, filesystem) or _gcs(uri) or filesystem, path.rstrip("/")


def _s3(uri: str, known: fs.FileSystem) -> fs.FileSystem | None:
    """S3 with fewer tries of its own than it has from a URI (a minute and a half of them), because `_retried` has some.

    And with small files written by one request instead of three. None where the URI is more than this understands.
    """
    parts = urlsplit(uri)
    options = dict(parse_qsl(parts.query))
    if parts.scheme != "s3" or not set(options) <= {"region", "endpoint_override", "scheme"}:
        return None
    return fs.S3FileSystem(
        **{**options, "region": known.region or None},
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_S3_ATTEMPTS),
        allow_delayed_open=True,
    )


def _gcs(uri: str) -> fs.FileSystem | None:
    """Google's store with tries of its own for seconds, not a quarter of an hour, because `_retried` has some."""
    parts = urlsplit(uri)
    options = dict(parse_qsl(parts.query))
    if parts.scheme == "s3" or not set(options) <= {"endpoint_override", "scheme", "project_id"}:
        return None
    return fs.GcsFileSystem(anonymous=parts.username == "anonymous", retry_time_limit=_GCS_RETRIES, **options)


@lru_cache(maxsize=_OPEN_OBJECTS)
def open_object(uri: str, name: str) -> pa.NativeFile:
    """Kept open, because opening an object asks the store for its size."""
    filesystem, root = file_system(uri)
    file = opened_file(filesystem, f"{root}/{name}")
    if isinstance(filesystem, fs.GcsFileSystem):  # has begun to download the whole of it, and would wait with the rest
        file.seek(max(file.size() - 1, 0))
    return file


def opened_file(filesystem: fs.FileSystem, path: str) -> pa.NativeFile:
    """Raises OSError too where gs:// gives a file that is closed already, because its content did not come."""
    file = filesystem.open_input_file(path)
    if file.closed:
        raise OSError(f"{path} was found, but its content did not come")
    return file
