"""What a space's points are drawn by: an Optuna trial, or one of two that stand in for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Suggest(Protocol):
    """What `Space.propose` needs of an Optuna trial."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


class HasRange(Exception):
    """A range has more points than can be listed."""


class Walker:
    """Takes every choice there is, one point after the other, depth first."""

    def __init__(self) -> None:
        self.goes_on = True
        self._path: list[int] = []
        """Which of its choices each parameter of the next point takes."""
        self._counts: list[int] = []
        """Of the choices that each had."""
        self._parameters: dict[str, Any] = {}

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Raises HasRange: there is more than one number to suggest."""
        del log
        if low < high:
            raise HasRange
        self._parameters[name] = low
        return low

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        place = len(self._counts)
        if place == len(self._path):
            self._path.append(0)
        self._counts.append(len(choices))
        self._parameters[name] = choices[self._path[place]]
        return choices[self._path[place]]

    def take_point(self) -> dict[str, Any]:
        """What was suggested since the last one, by name; from here on comes the next point, if it `goes_on`."""
        point = self._parameters
        while self._path and self._path[-1] + 1 == self._counts[len(self._path) - 1]:
            self._path.pop()
        self.goes_on = bool(self._path)
        if self._path:
            self._path[-1] += 1
        self._counts, self._parameters = [], {}
        return point


class Recogniser:
    """Answers with what a given configuration has, which `read` tells by the field's name."""

    def __init__(self, read: Callable[[str], Any]) -> None:
        self._read = read
        self.parameters: dict[str, Any] = {}
        self.outside: set[str] = set()
        """Fields whose value the space does not hold."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> Any:
        del log
        found = self._read(name)
        return self._take(name, name, found, not isinstance(found, str) and low <= found <= high)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        if name == "lambda_schedule":
            found = "depth" if self._read("lambda_init") == "depth" else "constant"
            return self._take(name, "lambda_init", found, True)
        field = "num_heads" if name.startswith("num_heads") else name
        found = self._read(field)
        return self._take(name, field, found, found in choices)

    def _take(self, name: str, field: str, value: Any, inside: bool) -> Any:
        self.parameters[name] = value
        if not inside:
            self.outside.add(field)
        return value
