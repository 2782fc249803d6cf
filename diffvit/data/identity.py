"""Whether a run's images are still those that it was begun with, wherever they lie now."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

from pydantic import TypeAdapter, ValidationError

from diffvit.config import RunConfig
from diffvit.data.sources import Dataset, Split

_KEYS_AT_ONCE = 4096


@dataclass(frozen=True)
class SplitIdentity:
    """What tells one split from another, short of its pixels."""

    images: int
    sha256: str
    """Of the labels and the keys in their order."""


@dataclass(frozen=True)
class Identity:
    """What tells one data set from another."""

    training: SplitIdentity
    validation: SplitIdentity

    def to_json(self) -> bytes:
        return _IDENTITY.dump_json(self, indent=2) + b"\n"


_IDENTITY = TypeAdapter(Identity)


def identity_of(dataset: Dataset) -> Identity:
    """Goes through all keys: a million take one to two seconds."""
    return Identity(_identity(dataset.train), _identity(dataset.val))


def _identity(split: Split) -> SplitIdentity:
    digest = hashlib.sha256(split.labels.astype("<i8").tobytes())
    for start in range(0, len(split), _KEYS_AT_ONCE):
        keys = (split.key(index) for index in range(start, min(start + _KEYS_AT_ONCE, len(split))))
        digest.update("".join(f"{key}\0" for key in keys).encode())
    return SplitIdentity(len(split), digest.hexdigest())


def require_same_images(known: bytes, now: Identity, config: RunConfig) -> None:
    """A step is a place in an order of all training images, and what is best depends on the validation images.

    Args:
        known: the JSON of the identity that the run was begun with.
        now: that of the images at `config.data.path`.
        config: of the run.

    Raises:
        ValueError: they are others, or `known` is damaged.
    """
    try:
        then = _IDENTITY.validate_json(known)
    except ValidationError as error:
        raise ValueError(
            f"data.json of run {config.name!r} is damaged: {error.errors()[0]['msg']}; delete it if "
            f"{config.data.path} has the images that the run was begun with"
        ) from None
    for split in (field.name for field in fields(Identity)):
        before, after = getattr(then, split), getattr(now, split)
        if before != after:
            how = ", but with other names, labels or in another order" if before.images == after.images else ""
            raise ValueError(
                f"run {config.name!r} was begun with {before.images:,} {split} images, {config.data.path} has "
                f"{after.images:,} now{how}; bring them back to continue it, or choose another --name"
            )
