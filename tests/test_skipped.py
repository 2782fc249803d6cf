"""The list of skipped images, on a disk and in a store."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ObjectStore

from diffvit.storage import Storage
from diffvit.training.skipped import SKIPPED_FILE, SkippedImages


@pytest.mark.parametrize("kind", ["disk", "store"])
def test_each_image_once_and_earlier_sittings_stay(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    store: ObjectStore | None = request.getfixturevalue("object_store") if kind == "store" else None
    location = store.uri(f"skipped-{tmp_path.name}") if store else str(tmp_path)
    first = SkippedImages(location)
    assert first.add(["a: empty", "b: torn", "a: empty"]) == ["a: empty", "b: torn"]
    assert first.add(["b: torn"]) == []
    assert first.add(["d: empty"]) == ["d: empty"]
    first.flush()
    second = SkippedImages(location)
    assert second.add(["c: torn"]) == ["c: torn"]
    second.flush()
    assert Storage(location).read(SKIPPED_FILE) == b"a: empty\nb: torn\nd: empty\nc: torn\n"
