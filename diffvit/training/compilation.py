"""`scale.compile`: what torch.compile needs of a machine."""

from __future__ import annotations

import os
import shutil

from diffvit.config import ScaleConfig


def require_compiler(scale: ScaleConfig) -> None:
    """Check that torch.compile finds a compiler, for the CPU as for the launchers of a GPU's kernels.

    Looks on this machine; the nodes of a cluster are taken to be made of the same image.

    Raises:
        ValueError: `scale.compile` is on, and there is none.
    """
    compiler = os.environ.get("CXX", "g++")
    if scale.compile and shutil.which(compiler) is None:
        raise ValueError(
            f"scale.compile needs a C++ compiler, and {compiler!r} is not found; install one, name one in the "
            "environment variable CXX, or leave scale.compile off"
        )
