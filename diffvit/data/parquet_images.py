"""Images in a Parquet column, as Hugging Face stores them: a struct of `bytes` and `path`, or plain binary.

Class names come from the `huggingface` metadata of the file where it has them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from diffvit.config import SourceOptions
from diffvit.data.sources import Entry, Staging, Unit, open_original, split_of_file

_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class")
_BATCH_ROWS, _BATCH_BYTES = 64, 32 * 2**20
"""Rows that are unpacked at once: at most so many, and as many as stay under so many bytes (at least one)."""
_BUFFER_BYTES = 8 * 2**20
"""Read at once of a column; without a bound Arrow reads all that a row group has of it."""


def index_parquet(unit: Unit, options: SourceOptions, staging: Staging) -> Iterator[Entry]:
    """Entries of one file; every image is copied to staging, because Parquet may compress or split it."""
    (name,) = unit.files
    with open_original(unit) as file:
        parquet = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES)
        schema = parquet.schema_arrow
        image, label = _columns(schema, options, name)
        classes = _class_names(schema, label)
        own_key = "key" in schema.names and pa.types.is_string(schema.field("key").type)
        columns = [image, *([label] if label else []), *(["key"] if own_key else [])]
        number = 0
        for batch in parquet.iter_batches(batch_size=_rows_at_once(parquet.metadata), columns=columns):
            for row in batch.to_pylist():
                content, path = _image_of(row[image])
                key = (row["key"] if own_key else None) or (
                    f"{name}/{number:07d}" + (f"/{PurePosixPath(path).name}" if path else "")
                )
                number += 1
                found = _label_of(row[label] if label else None)
                class_name = _class_of(found, classes)
                if content is None:
                    yield Entry(key, name, reason="no image bytes")
                    continue
                if classes and class_name is not None and class_name not in classes:
                    reason = f"label {class_name} is none of the {len(classes)} classes that the file declares"
                    yield Entry(key, name, split=split_of_file(name), reason=reason)
                    continue
                own = found if class_name is not None and type(found) is int and found < 2**63 else None
                yield Entry(key, split=split_of_file(name), class_name=class_name, label=own, **staging.add(content))


def _rows_at_once(metadata: pq.FileMetaData) -> int:
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    largest_row = max((group.total_byte_size / group.num_rows for group in groups if group.num_rows), default=0.0)
    return max(min(int(_BATCH_BYTES / max(largest_row, 1.0)), _BATCH_ROWS), 1)


def _columns(schema: pa.Schema, options: SourceOptions, name: str) -> tuple[str, str | None]:
    def holds_images(field: pa.Field) -> bool:
        if pa.types.is_struct(field.type):
            return bool(field.type.get_field_index("bytes") >= 0)
        return bool(pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type))

    def names_classes(column: str) -> bool:
        return column in schema.names and not pa.types.is_nested(schema.field(column).type)

    for option, asked in (("image_column", options.image_column), ("label_column", options.label_column)):
        if asked and asked not in schema.names:
            raise ValueError(f"{option} must be a column of {name}, got {asked!r}; there are {', '.join(schema.names)}")
    candidates = [field.name for field in schema if holds_images(field)]
    named = [column for column in _IMAGE_COLUMNS if column in candidates]
    image = options.image_column or (candidates[0] if len(candidates) == 1 else next(iter(named), ""))
    if not image:
        raise ValueError(
            f"{name} must have a column of encoded images (binary, or a struct with 'bytes'); it has "
            f"{', '.join(schema.names)}; name it with --image-column"
        )
    label = options.label_column or next((column for column in _LABEL_COLUMNS if names_classes(column)), None)
    return image, label


def _class_names(schema: pa.Schema, label: str | None) -> list[str] | None:
    if b"classes" in (schema.metadata or {}):  # the embedded sample's
        names: list[str] = json.loads(schema.metadata[b"classes"])
        return names
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _label_of(value: object) -> object:
    """As pandas writes it where rows have none: numbers as floats, and NaN or an empty text for none.

    Raises:
        ValueError: it is no number and no text.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, list | dict):
        raise ValueError(f"labels must be numbers or text, got {value!r}; name another column with --label-column")
    if isinstance(value, float):
        return None if not math.isfinite(value) else int(value) if value.is_integer() else value
    return None if isinstance(value, str) and not value.strip() else value


def _class_of(label: object, classes: list[str] | None) -> str | None:
    """Hugging Face marks unlabelled images with -1."""
    if label is None or label == -1:
        return None
    if classes is not None and isinstance(label, int) and 0 <= label < len(classes):
        return classes[label]
    return str(label)


def _image_of(value: bytes | dict[str, object] | None) -> tuple[bytes | None, str]:
    if isinstance(value, dict):
        content = value.get("bytes")
        return (content if isinstance(content, bytes) else None), str(value.get("path") or "")
    return value, ""
