"""One shard of a prepared data set from its entries: read, check, count, write. Any process can pack any shard.

Letters: C channels.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from pydantic import TypeAdapter

from diffvit.data.images import ImageError, decode_image, read_picture
from diffvit.data.shards import INDEX_SCHEMA, ShardInfo, write_shard
from diffvit.data.tables import read_table, write_table
from diffvit.storage import MACHINE_ERRORS, Storage, StorageError

_READ_THREADS = 16
_LOSSY_FORMATS = ("JPEG", "MPO", "WEBP", "AVIF", "JPEG2000")


@dataclass(frozen=True)
class Limits:
    """What an image may be, and whether a smaller copy of it is kept."""

    max_pixels: int
    max_bytes: int
    max_side: int | None


@dataclass
class PackedShard:
    """What packing one shard found; kept beside the shard, so that a shard is never packed twice.

    `sums` and `square_sums`: per channel, of each image's mean and mean square of pixels in [0, 1].
    """

    shard: ShardInfo | None = None
    quarantined: list[tuple[str, str]] = field(default_factory=list)
    sums: list[float] = field(default_factory=lambda: [0.0] * 3)
    square_sums: list[float] = field(default_factory=lambda: [0.0] * 3)
    all_grey: bool = True
    width: tuple[int, int, int] = (2**31, 0, 0)
    """Smallest, sum, largest."""
    height: tuple[int, int, int] = (2**31, 0, 0)


_PACKED = TypeAdapter(PackedShard)


def pack_shard(entries: pa.Table, labels: list[int], storage: Storage, name: str, limits: Limits) -> PackedShard:
    """Write the shard `name` with the entries that are good images.

    Raises:
        StorageError: the source or the target is away.
        OSError: the disk or the machine failed.
    """
    packed = PackedShard()
    images, kept_labels, keys = [], [], []
    contents = read_entries_content(entries, limits.max_bytes)
    for key, label, content in zip(entries["key"].to_pylist(), labels, contents, strict=True):
        try:
            image = _checked(content, limits, packed)
        except ImageError as error:
            packed.quarantined.append((key, str(error)))
            continue
        images.append(image)
        kept_labels.append(label)
        keys.append(key)
    if images:
        packed.shard, offsets = write_shard(storage, name, images, kept_labels, keys)
        lengths = [len(image) for image in images]
        zeros = np.zeros(len(images), np.int32)
        index = pa.table([zeros, offsets, pa.array(lengths, pa.int32()), kept_labels, keys], schema=INDEX_SCHEMA)
        write_table(storage, _index_part(name), index)
    storage.write(_summary(name), _PACKED.dump_json(packed))
    return packed


def read_packed(storage: Storage, name: str) -> PackedShard | None:
    """What an earlier attempt found in the shard `name`; None where it has yet to be packed."""
    content = storage.read_or_none(_summary(name))
    if content is None:
        return None
    packed = _PACKED.validate_json(content)
    if packed.shard is not None and storage.size(name) != packed.shard.bytes:
        return None
    return packed


def read_index_part(storage: Storage, name: str) -> pa.Table:
    """The rows of INDEX_SCHEMA of one shard, its number left at 0."""
    return read_table(storage, _index_part(name), INDEX_SCHEMA)


def read_entries_content(entries: pa.Table, max_bytes: int) -> Iterator[bytes | ImageError]:
    """The encoded image of each entry, in order; an ImageError where it has a reason, is longer, or is cut short.

    Raises:
        StorageError: the source is away, or a file that it had when it was listed.
        OSError: the disk or the machine failed.
    """

    def read(row: dict[str, Any]) -> bytes | ImageError:
        if row["reason"] is not None:
            return ImageError(row["reason"])
        if row["length"] > max_bytes:
            return ImageError(f"{row['length']} bytes, more than max_image_bytes = {max_bytes}")
        storage = Storage(row["location"])
        try:
            content = storage.read_range(row["file"], row["offset"], row["length"])
        except (FileNotFoundError, NotADirectoryError):  # all of a disk may be gone, and come back
            shown = storage.uri.partition("?")[0]
            raise StorageError(
                f"{row['file']} was in {shown} when that was listed and is gone: bring it back and run the same "
                "command, or begin anew with another --out"
            ) from None
        except OSError as error:
            if error.errno in MACHINE_ERRORS:
                raise
            return ImageError(f"cannot be read: {error.strerror or error}")
        return content if len(content) == row["length"] else ImageError("its file is cut short")

    rows = entries.select(["location", "file", "offset", "length", "reason"]).to_pylist()
    if any("://" in row["location"] for row in rows):
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            yield from pool.map(read, rows)
    else:
        yield from map(read, rows)


def _checked(content: bytes | ImageError, limits: Limits, packed: PackedShard) -> bytes:
    """The image to keep, after it was decoded once and counted.

    Raises:
        ImageError: it cannot be used.
    """
    if isinstance(content, ImageError):
        raise content
    decoded = decode_image(content, 3, limits.max_pixels)
    if limits.max_side is not None and max(decoded.shape[1:]) > limits.max_side:
        content = _smaller(content, limits.max_pixels, limits.max_side)
        decoded = decode_image(content, 3, limits.max_pixels)
    _count(decoded, packed)
    return content


def _smaller(content: bytes, max_pixels: int, max_side: int) -> bytes:
    """The image with its longer side at `max_side`, upright, in 8 bits; JPEG at quality 95 where its format loses
    something already, PNG where it does not or there is an alpha channel.
    """
    picture, format = read_picture(content, max_pixels)
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    lossy = format in _LOSSY_FORMATS and b"VP8L" not in content  # the mark of lossless WebP
    smaller = io.BytesIO()
    if lossy and picture.mode in ("L", "RGB"):
        picture.save(smaller, "JPEG", quality=95)
    else:
        picture.save(smaller, "PNG")
    return smaller.getvalue()


def _count(decoded: torch.Tensor, packed: PackedShard) -> None:
    """Add one image (3, height, width) to the statistics."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    for channel, pixels in enumerate(decoded.flatten(1)):
        shares = torch.bincount(pixels, minlength=256).double() / pixels.numel()  # without a copy of it in floats
        packed.sums[channel] += float(shares @ levels)
        packed.square_sums[channel] += float(shares @ levels**2)
    packed.all_grey = packed.all_grey and bool((decoded[0] == decoded[1]).all() and (decoded[0] == decoded[2]).all())
    height, width = decoded.shape[1:]
    packed.width = (min(packed.width[0], width), packed.width[1] + width, max(packed.width[2], width))
    packed.height = (min(packed.height[0], height), packed.height[1] + height, max(packed.height[2], height))


def _index_part(name: str) -> str:
    return f".staging/shards/{name}.index"


def _summary(name: str) -> str:
    return f".staging/shards/{name}.json"
