"""Whether a run's images are still those that it was begun with, wherever they lie now."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from diffvit.data.datasets import Dataset, Split
from diffvit.storage import Storage

DATA_NAME = "data.json"
SPLITS = ("training", "validation")
_KEYS_AT_ONCE = 4096


@dataclass(frozen=True)
class SplitFingerprint:
    """What tells one split from another, short of its pixels."""

    images: int
    sha256: str
    """Of the labels and the keys in their order."""

    def __str__(self) -> str:
        return f"{self.images:,} ({self.sha256[:8]})"


@dataclass(frozen=True)
class Fingerprint:
    """What tells one data set from another."""

    training: SplitFingerprint
    validation: SplitFingerprint

    def to_json(self) -> str:
        return _FINGERPRINT.dump_json(self, indent=2).decode() + "\n"


_FINGERPRINT = TypeAdapter(Fingerprint)


def fingerprint_of(dataset: Dataset) -> Fingerprint:
    """Goes through all keys: a million take one to two seconds."""
    return Fingerprint(_fingerprint(dataset.train), _fingerprint(dataset.val))


def _fingerprint(split: Split) -> SplitFingerprint:
    digest = hashlib.sha256(split.labels.astype("<i8").tobytes())
    for start in range(0, len(split), _KEYS_AT_ONCE):
        keys = (split.key(index) for index in range(start, min(start + _KEYS_AT_ONCE, len(split))))
        digest.update("".join(f"{key}\0" for key in keys).encode())
    return SplitFingerprint(len(split), digest.hexdigest())


def known_images(folder: Storage) -> Fingerprint | None:
    """Those that the run, or sweep, in `folder` was begun with; None where nobody wrote them down.

    Raises:
        ValueError: what was written down is damaged.
    """
    content = folder.read_or_none(DATA_NAME)
    try:
        return None if content is None else _FINGERPRINT.validate_json(content)
    except ValidationError as error:
        raise ValueError(
            f"{folder.uri.partition('?')[0]}/{DATA_NAME} is damaged: {error.errors()[0]['msg']}; delete it if "
            "data.path has the images that were there at the beginning"
        ) from None


def require_same_images(folder: Storage, now: Fingerprint, path: str) -> None:
    """As `require_same`, for the run or sweep in `folder`."""
    require_same(known_images(folder), now, folder.uri.partition("?")[0], path)


def require_same(
    then: Fingerprint | None, now: Fingerprint, whose: str, path: str, splits: Sequence[str] = SPLITS
) -> None:
    """A step is a place in an order of all training images, and what is best depends on the validation images.

    Args:
        then: the images that it was begun with; None where nobody knows.
        now: those at `path`.
        whose: the run or sweep, for the message.
        path: the `data.path` of today.
        splits: that must be the same.

    Raises:
        ValueError: they are others.
    """
    for split in splits if then is not None else ():
        before, after = getattr(then, split), getattr(now, split)
        if before != after:
            how = ", but with other names, labels or in another order" if before.images == after.images else ""
            raise ValueError(
                f"{whose} was begun with {before.images:,} {split} images, {path} has {after.images:,} now{how}; "
                "bring them back, or choose another --name or place"
            )
