"""What every config section checks itself with."""

from __future__ import annotations

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid")
"""Unknown fields in JSON are errors."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def require_fraction(name: str, value: float) -> None:
    require(0.0 <= value < 1.0, f"{name} must be in [0, 1), got {value}")
