"""A cancelled task leaves no half-imported package to the next task of its process."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import ray

from diffvit.data import tasks


@pytest.fixture(autouse=True)
def interrupts_are_raised() -> Iterator[None]:
    """A shell starts what runs in the background with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_until_everything_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def get(reference: str) -> str:
        signal.raise_signal(signal.SIGINT)
        done.append(reference)
        return reference

    monkeypatch.setattr(tasks, "ray", SimpleNamespace(get=get, exceptions=ray.exceptions))
    with pytest.raises(KeyboardInterrupt):
        tasks.fetch("loader")
    assert done == ["loader"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_goes_before_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(reference: str) -> str:
        signal.raise_signal(signal.SIGINT)
        raise ray.exceptions.RaySystemError(f"no module for {reference}")

    monkeypatch.setattr(tasks, "ray", SimpleNamespace(get=get, exceptions=ray.exceptions))
    with pytest.raises(RuntimeError, match=r"a node lacks what the task needs: .*no module for loader"):
        tasks.fetch("loader")
