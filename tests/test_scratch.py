"""Folders for what goes to a store: gone with the block, and with a process that was killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from diffvit.scratch import scratch_folder

HOLD = """
import tempfile, sys, time
tempfile.tempdir = sys.argv[1]
from diffvit.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "large").write_text("")
    print(folder, flush=True)
    time.sleep(60)
"""


def test_only_what_nobody_holds_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    other = tmp_path / "other-scratch"
    other.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        with scratch_folder() as mine, scratch_folder() as second:
            assert mine != second
            assert (theirs / "large").exists()
        assert not mine.exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert theirs.exists()
        with scratch_folder() as mine:
            assert sorted(tmp_path.iterdir()) == sorted([mine, other])
    assert list(tmp_path.iterdir()) == [other]
