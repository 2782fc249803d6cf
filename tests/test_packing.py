"""Packing a shard: what is kept, byte for byte, and what goes to quarantine, with its reason."""

from __future__ import annotations

import errno
import io
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffvit.data.packing import Limits, PackedShard, pack_shard, read_entries_content, read_index_part, read_packed
from diffvit.data.sources import ENTRY_SCHEMA
from diffvit.storage import Storage, StorageError

LIMITS = Limits(max_pixels=10_000, max_bytes=50_000, max_side=None)


def encoded(mode: str, format: str, size: tuple[int, int] = (30, 20), **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format, **options)
    return file.getvalue()


def pack(tmp_path: Path, files: dict[str, bytes], limits: Limits = LIMITS) -> tuple[PackedShard, Storage]:
    source = Storage(str(tmp_path / "in"))
    rows = []
    for name, content in files.items():
        source.write(name, content)
        rows.append({"key": name, "location": source.uri, "file": name, "offset": 0, "length": len(content)})
    target = Storage(str(tmp_path / "out"))
    table = pa.Table.from_pylist(rows, schema=ENTRY_SCHEMA)
    return pack_shard(table, list(range(len(rows))), target, "train/00000.parquet", limits), target


ANIMATED = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (10, 200)]


def animated() -> bytes:
    file = io.BytesIO()
    ANIMATED[0].save(file, "GIF", save_all=True, append_images=ANIMATED[1:])
    return file.getvalue()


GOOD = {
    "plain.jpg": encoded("RGB", "JPEG"),
    "progressive.jpg": encoded("RGB", "JPEG", progressive=True),
    "cmyk.jpg": encoded("CMYK", "JPEG"),
    "grey.jpg": encoded("L", "JPEG"),
    "palette.png": encoded("P", "PNG"),
    "alpha.png": encoded("RGBA", "PNG"),
    "bits16.png": encoded("I;16", "PNG"),
    "one-bit.png": encoded("1", "PNG"),
    "animated.gif": animated(),
    "photo.webp": encoded("RGB", "WEBP"),
    "tiff.tif": encoded("RGB", "TIFF"),
    "jpeg called png.png": encoded("RGB", "JPEG"),
}
BAD = {
    "empty.jpg": (b"", "not a readable image"),
    "text.png": (b"<html>404</html>" * 9, "not a readable image"),
    "truncated.jpg": (encoded("RGB", "JPEG")[:-200], "does not decode"),
    "truncated.png": (encoded("RGB", "PNG")[:-200], "does not decode"),
    "header only.jpg": (encoded("RGB", "JPEG")[:200], ""),
    "huge.png": (encoded("L", "PNG", (200, 51)), "200 x 51 pixels, more than max_pixels = 10000"),
    "heavy.bmp": (encoded("RGB", "BMP", (150, 60)) + bytes(30_000), "bytes, more than max_image_bytes = 50000"),
}


def test_every_image_is_kept_as_it_is_or_quarantined(tmp_path: Path) -> None:
    packed, target = pack(tmp_path, GOOD | {name: content for name, (content, _) in BAD.items()})
    reasons = dict(packed.quarantined)
    assert set(reasons) == set(BAD)
    for name, (_, reason) in BAD.items():
        assert reason in reasons[name]
    table = pq.read_table(pa.BufferReader(target.read("train/00000.parquet")))
    assert dict(zip(table["key"].to_pylist(), table["image"].to_pylist(), strict=True)) == GOOD
    assert table["label"].to_pylist() == list(range(len(GOOD)))


def test_the_index_leads_to_the_bytes(tmp_path: Path) -> None:
    _, target = pack(tmp_path, GOOD | {"empty.jpg": b""})
    for row in read_index_part(target, "train/00000.parquet").to_pylist():
        assert target.read_range("train/00000.parquet", row["offset"], row["length"]) == GOOD[row["key"]]


def test_statistics_by_hand(tmp_path: Path) -> None:
    """Two flat images: channel means (1, 0, 0.2) and (0, 0, 0.6)."""
    files = {}
    for name, colour, size in (("a.png", (255, 0, 51), (5, 3)), ("b.png", (0, 0, 153), (9, 4))):
        file = io.BytesIO()
        Image.new("RGB", size, colour).save(file, "PNG")
        files[name] = file.getvalue()
    packed, _ = pack(tmp_path, files)
    assert packed.sums == pytest.approx([1.0, 0.0, 0.8], abs=1e-5)
    assert packed.square_sums == pytest.approx([1.0, 0.0, 0.04 + 0.36], abs=1e-5)
    assert (packed.width, packed.height) == ((5, 14, 9), (3, 7, 4))
    assert not packed.all_grey


def test_a_smaller_copy_on_request(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    files = {
        "turned.jpg": encoded("RGB", "JPEG", exif=exif),
        "alpha.png": encoded("RGBA", "PNG"),
        "small.png": encoded("RGB", "PNG", (9, 12)),
    }
    _, target = pack(tmp_path, files, Limits(10_000, 50_000, max_side=15))
    images = pq.read_table(pa.BufferReader(target.read("train/00000.parquet")))["image"].to_pylist()
    opened = [Image.open(io.BytesIO(image)) for image in images]
    assert [(image.size, image.format, image.mode) for image in opened] == [
        ((10, 15), "JPEG", "RGB"),
        ((15, 10), "PNG", "RGBA"),
        ((9, 12), "PNG", "RGB"),
    ]
    assert images[2] == files["small.png"]
    assert opened[0].getexif().get(0x0112, 1) == 1


def test_a_smaller_copy_of_every_kind(tmp_path: Path) -> None:
    """None ends the preparation, what lost something may lose more, and a palette is not resized as numbers."""
    half_clear = io.BytesIO()
    Image.new("RGBA", (30, 20), (200, 0, 0, 100)).save(half_clear, "WEBP")
    files = {
        "cmyk.tif": encoded("CMYK", "TIFF"),
        "cmyk.jpg": encoded("CMYK", "JPEG"),
        "ycbcr.tif": encoded("YCbCr", "TIFF"),
        "float.tif": encoded("F", "TIFF"),
        "bits16.png": encoded("I;16", "PNG"),
        "one-bit.png": encoded("1", "PNG"),
        "palette.png": encoded("P", "PNG"),
        "two.mpo": encoded("RGB", "MPO", save_all=True, append_images=[Image.new("RGB", (30, 20))]),
        "lossy.webp": encoded("RGB", "WEBP"),
        "lossless.webp": encoded("RGB", "WEBP", lossless=True),
        "alpha.webp": half_clear.getvalue(),
        "photo.avif": encoded("RGB", "AVIF"),
    }
    packed, target = pack(tmp_path, files, Limits(10_000, 50_000, max_side=15))
    assert packed.quarantined == []
    images = pq.read_table(pa.BufferReader(target.read("train/00000.parquet")))["image"].to_pylist()
    opened = {name: Image.open(io.BytesIO(image)) for name, image in zip(files, images, strict=True)}
    assert {image.size for image in opened.values()} == {(15, 10)}
    assert {name: (image.format, image.mode) for name, image in opened.items()} == {
        "cmyk.tif": ("PNG", "RGB"),
        "cmyk.jpg": ("JPEG", "RGB"),
        "ycbcr.tif": ("PNG", "RGB"),
        "float.tif": ("PNG", "L"),
        "bits16.png": ("PNG", "L"),
        "one-bit.png": ("PNG", "L"),
        "palette.png": ("PNG", "RGB"),
        "two.mpo": ("JPEG", "RGB"),
        "lossy.webp": ("JPEG", "RGB"),
        "lossless.webp": ("PNG", "RGB"),
        "alpha.webp": ("PNG", "RGBA"),
        "photo.avif": ("JPEG", "RGB"),
    }


def test_a_shard_is_packed_once(tmp_path: Path) -> None:
    packed, target = pack(tmp_path, {"a.png": encoded("RGB", "PNG"), "bad.png": b""})
    assert read_packed(target, "train/00000.parquet") == packed
    target.write("train/00000.parquet", b"cut short")
    assert read_packed(target, "train/00000.parquet") is None
    assert read_packed(target, "train/00001.parquet") is None


def test_a_shard_of_bad_images_is_not_written(tmp_path: Path) -> None:
    packed, target = pack(tmp_path, {"bad.png": b""})
    assert packed.shard is None
    assert target.size("train/00000.parquet") is None
    assert read_packed(target, "train/00000.parquet") == packed


def test_an_entry_with_a_reason_is_not_read(tmp_path: Path) -> None:
    row = {"key": "x", "location": str(tmp_path), "file": "x", "offset": 0, "length": -1, "reason": "a link"}
    (content,) = read_entries_content(pa.Table.from_pylist([row], schema=ENTRY_SCHEMA), 10**6)
    assert str(content) == "a link"


@pytest.mark.parametrize(("number", "quarantined"), [(errno.EACCES, True), (errno.EIO, False), (errno.EMFILE, False)])
def test_an_image_is_not_left_out_for_what_the_machine_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, quarantined: bool
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, "failed")

    monkeypatch.setattr(Storage, "read_range", fail)
    with nullcontext() if quarantined else pytest.raises(OSError, match="failed"):
        packed, _ = pack(tmp_path, {"a.png": b"x"})
        assert packed.quarantined == [("a.png", "cannot be read: failed")]


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Storage, "read_range", lambda *_: pytest.fail("read"))
    packed, _ = pack(tmp_path, {"a.png": bytes(50_001)})
    assert packed.quarantined == [("a.png", "50001 bytes, more than max_image_bytes = 50000")]


def test_a_file_that_went_away_is_no_fault_of_the_image(tmp_path: Path) -> None:
    """For all of a disk may be away, and come back."""
    row = {"key": "x", "location": str(tmp_path), "file": "gone.png", "offset": 0, "length": 5}
    target = Storage(str(tmp_path / "out"))
    with pytest.raises(StorageError, match=r"^gone.png was in .* when that was listed and is gone: bring it back"):
        pack_shard(pa.Table.from_pylist([row], schema=ENTRY_SCHEMA), [0], target, "train/00000.parquet", LIMITS)
    assert read_packed(target, "train/00000.parquet") is None
