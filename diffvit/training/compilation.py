"""`scale.compile`: what torch.compile needs of a machine."""

from __future__ import annotations

import os
import shlex
import shutil

from diffvit.config import ScaleConfig

_FOR_GPU = ("CC", ("gcc", "clang"))
"""Where Triton looks for the C compiler of its launchers."""
_FOR_CPU = ("CXX", ("g++",))
"""Where torch's Inductor does for the C++ compiler of its kernels."""


def require_compiler(scale: ScaleConfig) -> None:
    """Check that torch.compile finds the compiler that it needs for the device.

    Looks on this machine; the nodes of a cluster are taken to be made of the same image.

    Raises:
        ValueError: `scale.compile` is on, and there is none.
    """
    if not scale.compile:
        return
    variable, usual = _FOR_GPU if scale.gpu else _FOR_CPU
    named = shlex.split(os.environ.get(variable, ""))[:1]
    if not any(map(shutil.which, named or usual)):
        raise ValueError(
            f"scale.compile needs a {'C' if scale.gpu else 'C++'} compiler, and {' or '.join(named or usual)} is not "
            f"found; install one, name one in the environment variable {variable}, or leave scale.compile off"
        )
