"""A folder that a job fills over several sittings: begun by one set of options, and continued by no other.

`.staging/` holds what the job leaves for its own continuation, and goes when the result is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from diffvit.config import listed
from diffvit.data.sources import Unit, listing_digest
from diffvit.storage import Storage

STAGING = ".staging"
_IDENTITY_NAME = f"{STAGING}/identity.json"


def identity_of(options: dict[str, Any], units: Sequence[Unit], labels: dict[str, str]) -> dict[str, Any]:
    """What must be the same for a job to go on: options, labels, and the name and size of every file it reads."""
    identity = {**options, "listing_sha256": listing_digest(units)}
    if labels:
        identity["labels_sha256"] = hashlib.sha256(json.dumps(labels).encode()).hexdigest()
    return identity


def require_outside(out: str, source: str) -> None:
    """Raises ValueError where `out` lies in `source`, which would be another source as soon as something is written."""

    def place(location: str) -> PurePath:
        if "://" not in location:
            return Path(location).resolve() if location.startswith("/") else PurePosixPath(location)
        parts = urlsplit(location)
        store = dict(parse_qsl(parts.query)).get("endpoint_override", parts.scheme.replace("gcs", "gs"))
        return PurePosixPath(store, parts.hostname or "", parts.path.lstrip("/"))

    if place(out).is_relative_to(place(source)):
        raise ValueError(
            f"out must not lie in the folder that is read, {out!r} lies in {source!r}; choose another --out"
        )


def claim(target: Storage, identity: dict[str, Any]) -> None:
    """Make `target` ours to fill, or find that it is already.

    Raises:
        ValueError: it holds something else, or what was begun with other options.
    """
    begun = target.read_or_none(_IDENTITY_NAME)
    if begun is None:
        if not target.is_remote and Path(target.path()).is_file():
            raise ValueError(f"out must be a folder, {target.uri!r} is a file; choose another --out")
        others = [name for name in target.sizes() if not name.startswith(".")]
        if others:
            raise ValueError(
                f"out must be an empty folder, {target.uri!r} holds {len(others)} files, among them {others[0]}"
            )
        target.delete_folder(STAGING)  # leftovers of an unknown job that was killed
        _begin(target, identity)
        return
    require_same(json.loads(begun), identity, f"out = {target.uri!r} was begun")


@contextmanager
def given_back(target: Storage) -> Iterator[None]:
    """Where something is wrong with the input, and nothing is made of it yet, mended options may have the folder."""
    try:
        yield
    except ValueError:
        release(target)
        raise


def _begin(target: Storage, identity: dict[str, Any]) -> None:
    target.write(_IDENTITY_NAME, json.dumps(identity, indent=2).encode())


def reopen(target: Storage, identity: dict[str, Any], result_name: str) -> None:
    """Make a finished folder that lost files ours to fill again; `result_name` is the file that calls it finished."""
    release(target)  # first: of what a killed job left of it, parts may be missing
    _begin(target, identity)
    target.delete(result_name)


def require_same(there: dict[str, Any], now: dict[str, Any], what: str) -> None:
    """Raises ValueError where the two identities differ, with every difference."""
    both = {name: (there.get(name), now.get(name)) for name in {**there, **now}}
    differing = {name: (old, new) for name, (old, new) in both.items() if old != new}
    if differing:
        raise ValueError(
            f"{what} from other images or with other options; choose another --out, or delete it:{listed(differing)}"
        )


def release(target: Storage) -> None:
    """The result is whole. Called for a finished one too, for the job may have been killed before it came here."""
    target.delete_folder(STAGING)
