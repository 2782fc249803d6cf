"""By what a run was trained: the commit of this source tree and the versions of the libraries that matter."""

from __future__ import annotations

import os
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_LIBRARIES = ("torch", "torchvision", "ray", "numpy", "pyarrow", "pillow")


def provenance() -> dict[str, Any]:
    """Commit and versions, for `results.json`."""
    return {
        "git_commit": _git_commit(),
        "versions": {name: metadata.version(name) for name in _LIBRARIES},
    }


def _git_commit() -> str | None:
    """Of the source tree this runs from, with '+changes' where it differs; outside of one, what DIFFVIT_COMMIT says."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("DIFFVIT_COMMIT")
