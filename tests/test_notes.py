"""What a run tells in lines, on a disk and in a store."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ObjectStore

from diffvit.storage import Storage
from diffvit.training.notes import SKIPPED_FILE, LineFile, Notes, read_messages


@pytest.mark.parametrize("kind", ["disk", "store"])
def test_each_image_once_and_earlier_sittings_stay(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    store: ObjectStore | None = request.getfixturevalue("object_store") if kind == "store" else None
    location = store.uri(f"skipped-{tmp_path.name}") if store else str(tmp_path)
    first = LineFile(location, SKIPPED_FILE)
    assert first.add(["a: empty", "b: torn", "a: empty"]) == ["a: empty", "b: torn"]
    assert first.add(["b: torn"]) == []
    assert first.add(["d: empty"]) == ["d: empty"]
    first.flush()
    second = LineFile(location, SKIPPED_FILE)
    assert second.add(["c: torn"]) == ["c: torn"]
    second.flush()
    assert Storage(location).read(SKIPPED_FILE) == b"a: empty\nb: torn\nd: empty\nc: torn\n"


def test_a_message_of_several_lines_is_one_line_and_told_once(tmp_path: Path) -> None:
    for _ in range(2):
        notes = Notes(str(tmp_path))
        for message in ("passed over:\n  mean is missing", "passed over:\n  mean is missing", "on"):
            notes.publish("warning", {"message": message})
        notes.publish("step", {"loss": 1.0})
        assert notes.messages == ["passed over: mean is missing", "on"]
        notes.close()
    assert read_messages(str(tmp_path)) == ["passed over: mean is missing", "on"]
    assert read_messages(str(tmp_path / "nothing")) == []
