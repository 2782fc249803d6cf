"""Images inside tars: plain ones, WebDataset shards, and ImageNet's tar of class tars.

Nothing is extracted: an uncompressed tar is read in place (an entry is a range of it), a compressed one goes through
staging. A member's path is therefore never used as a path. Python's tarfile takes a damaged header, and a file that is
cut between members, for the end; here a tar ends with the mark that ends it, or a quarantined row says why not.

Source of the WebDataset layout: files that share a name up to the first dot are one sample; `.cls` holds its class.
"""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from tempfile import SpooledTemporaryFile
from typing import Any, BinaryIO, Self

from diffvit.config import SourceOptions
from diffvit.data.sources import (
    BESIDE,
    Entry,
    Staging,
    Unit,
    extension_of,
    is_image,
    open_original,
    split_called,
    split_of_file,
    split_of_path,
)

_MAX_LABEL_BYTES = 2**20
_HELD_BYTES = 64 * 2**20
"""Of a tar inside a compressed one that are held in memory; the rest goes to a temporary file."""
_READ_BYTES = 2**20
_COMPRESSIONS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
"""What opens a file that begins so; these read files of several members and check sums, tarfile's own do not."""

_Own = tuple[str | None, str | None]
"""Split and class that a tar's name says of the images in it whose path says none."""


_Unclassed = tuple[list[Entry], int, tuple[str, ...]]
"""Where an entry is that lies below no split's folder, and the folders in which it lies."""


def index_tar(unit: Unit, options: SourceOptions, staging: Staging) -> Iterator[Entry]:
    """Entries of the images in one tar, in its order."""
    (name,) = unit.files
    own_class = PurePosixPath(name).name.split(".")[0] if options.tar_is_class else None
    with open_original(unit) as file:
        unpacked = _unpacked(file)
        walk = _Walk(name, staging, unpacked is None, options.max_image_bytes, unit.ignored)
        walk.tar(unpacked or file, name, 0, (None, own_class))
    entries = [(entry, sample.class_name) for sample in walk.samples.values() for entry in sample.images]
    in_splits = any(entry.class_name or told for entry, told in entries if entry.split)
    beside = any(entry.class_name for entry, _ in entries if not entry.split)
    is_class = beside and not in_splits and not options.labels  # one called `train`, of railway pictures
    for entry, told in entries:
        if in_splits and not entry.split and not told and not split_of_file(name):
            entry = replace(entry, split=BESIDE)
        if is_class and entry.split:
            entry = replace(entry, split=None, class_name=PurePosixPath(entry.key).parent.stem)
        yield replace(entry, class_name=told or entry.class_name, split=entry.split or split_of_file(name))


@dataclass
class _Sample:
    """What the files that share a name say."""

    images: list[Entry] = field(default_factory=list)
    class_name: str | None = None


@dataclass
class _Walk:
    """Goes through the tar `file_name` and the tars in it.

    `staging` receives the images that cannot be read `in_place`: those of a compressed tar, and those stored sparsely.
    """

    file_name: str
    staging: Staging
    in_place: bool
    max_image_bytes: int
    ignored: Counter[str]
    samples: dict[str, _Sample] = field(default_factory=dict)

    def sample(self, name: str) -> _Sample:
        return self.samples.setdefault(name, _Sample())

    def tar(self, file: Any, name: str, start: int, own: _Own) -> None:
        """`file` is the tar called `name`; it begins at byte `start` of the outermost file."""
        unclassed: list[_Unclassed] = []
        try:
            with tarfile.open(fileobj=file, mode="r:" if self.in_place else "r|", tarinfo=_Header) as tar:
                for member in tar:
                    if not member.isdir():
                        self._member(tar, member, name, start, own, unclassed)
                _require_end(tar)
        except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError, ValueError, RecursionError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk; those of gzip and bz2 have no number
            # what came before is good; that something is missing must show
            reason = f"the tar is damaged from here: {error}"
            self.sample(name).images.append(Entry(f"{name}/…", self.file_name, reason=reason))
        _name_classes(unclassed)

    def _member(
        self,
        tar: tarfile.TarFile,
        member: tarfile.TarInfo,
        name: str,
        start: int,
        own: _Own,
        unclassed: list[_Unclassed],
    ) -> None:
        path, key = PurePosixPath(member.name), f"{name}/{member.name}"
        sample_name = f"{name}/{path.parent}/{path.name.split('.')[0]}"
        if path.is_absolute() or ".." in path.parts:
            self.sample(key).images.append(Entry(key, self.file_name, reason="its path leaves the archive"))
        elif not member.isfile():
            self.sample(key).images.append(Entry(key, self.file_name, reason="a link or device, not a file"))
        elif path.suffix == ".tar":
            inner: Any = tar.extractfile(member)
            named = split_called(path.stem)
            split = named or split_of_path(_below_root(member.name))[0] or own[0]
            own = (split, None if named else path.stem)
            if member.issparse():
                self.sample(key).images.append(Entry(key, self.file_name, reason="a tar in a tar, stored sparsely"))
            elif not self.in_place:  # a stream cannot go back, as reading a tar may have to
                with SpooledTemporaryFile(_HELD_BYTES) as copy:
                    shutil.copyfileobj(inner, copy)
                    copy.seek(0)
                    self.tar(copy, key, 0, own)
            else:
                self.tar(inner, key, start + member.offset_data, own)
        elif is_image(path.name) and member.size > self.max_image_bytes:  # a compressed tar may unpack to anything
            reason = f"{member.size} bytes, more than max_image_bytes = {self.max_image_bytes}"
            self.sample(key).images.append(Entry(key, self.file_name, reason=reason))
        elif is_image(path.name):
            split, rest = split_of_path(_below_root(member.name))
            class_name = rest[0] if split and len(rest) > 1 else own[1]
            entry = Entry(key, self.file_name, start + member.offset_data, member.size, split or own[0], class_name)
            images = self.sample(sample_name).images
            if not split and len(rest) > 1:
                unclassed.append((images, len(images), rest[:-1]))
            images.append(self._staged(entry, tar, member))
        elif path.suffix in (".cls", ".json") and member.size <= _MAX_LABEL_BYTES:
            sample = self.sample(sample_name)
            sample.class_name = sample.class_name or _label_of(path.suffix, _content(tar, member))
        else:
            self.ignored[extension_of(path.name)] += 1

    def _staged(self, entry: Entry, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Entry:
        if self.in_place and not member.issparse():
            return entry
        return replace(entry, **self.staging.add(_content(tar, member)))


def _name_classes(unclassed: list[_Unclassed]) -> None:
    """As in a folder the first folder of a path is the class, but below those that wrap all of a tar's images."""
    if not unclassed:
        return
    folders = [path for _, _, path in unclassed]
    same = itertools.takewhile(lambda names: names[0] == names[1], zip(min(folders), max(folders), strict=False))
    wrapping = min(sum(1 for _ in same), min(map(len, folders)) - 1)
    for images, place, path in unclassed:
        images[place] = replace(images[place], class_name=path[wrapping])


class _Header(tarfile.TarInfo):
    """A member's header. The end mark is the only thing that may stand in its place."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros
            raise
        except tarfile.HeaderError as error:  # tarfile would end here without a word
            what = {"empty header": "it ends without an end mark", "truncated header": "it ends within a header"}
            raise tarfile.ReadError(what.get(str(error), str(error))) from None


def _require_end(tar: tarfile.TarFile) -> None:
    """Nothing but zeros may follow the end mark, as where tars were joined."""
    rest: Any = tar.fileobj
    while block := rest.read(_READ_BYTES):
        if block.strip(b"\0"):
            raise tarfile.ReadError("more data follows its end mark")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _unpacked(file: BinaryIO) -> BinaryIO | None:
    """What a compressed file holds; None for one that is not compressed."""
    start = file.read(8)
    file.seek(0)
    opened: BinaryIO | None = next((o(file) for magic, o in _COMPRESSIONS.items() if start.startswith(magic)), None)
    return opened


def _below_root(name: str) -> str:
    """Without the folder that many tars wrap around everything, where a split's folder follows it."""
    parts = PurePosixPath(name).parts
    below = "/".join(parts[1:])
    return below if len(parts) > 2 and split_of_path(below)[0] else "/".join(parts)


def _label_of(suffix: str, content: bytes) -> str | None:
    try:
        if suffix == ".cls":
            label = content.decode().strip()
            return None if label in ("", "-1") else label  # -1 as Hugging Face marks unlabelled images
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    found = next((fields[name] for name in ("label", "cls", "class") if name in fields), None)
    return str(found) if isinstance(found, int | str) and found != -1 else None
