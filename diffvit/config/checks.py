"""What every config section checks itself with."""

from __future__ import annotations

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid")
"""Unknown fields in JSON are errors."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


MAX_PIXELS = 178_956_970
"""PIL opens no image of more pixels, to be safe from decompression bombs."""


def require_pixels(name: str, pixels: int) -> None:
    """Raises ValueError unless `pixels` is a bound that decoding can hold to."""
    require(1 <= pixels <= MAX_PIXELS, f"{name} must be from 1 to {MAX_PIXELS} (PIL's own bound), got {pixels}")


def require_fraction(name: str, value: float) -> None:
    require(0.0 <= value < 1.0, f"{name} must be in [0, 1), got {value}")
