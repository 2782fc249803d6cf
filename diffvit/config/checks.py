"""What every config section checks itself with."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

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


def require_finite(config: Any, prefix: str = "") -> None:
    """Raises ValueError where a number in a dataclass or a section of it is infinite or NaN: JSON cannot hold these."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            require_finite(value, f"{name}.")
        for number in value if isinstance(value, tuple) else (value,):
            require(not isinstance(number, float) or math.isfinite(number), f"{name} must be finite, got {value}")


def require_fraction(name: str, value: float) -> None:
    require(0.0 <= value < 1.0, f"{name} must be in [0, 1), got {value}")
