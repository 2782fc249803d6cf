"""A cancelled task leaves no half-imported package to the next task of its process."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
import ray

from diffvit.data import tasks


def test_an_interrupt_waits_until_everything_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def get(reference: str) -> str:
        signal.raise_signal(signal.SIGINT)
        done.append(reference)
        return reference

    monkeypatch.setattr(tasks, "ray", SimpleNamespace(get=get, exceptions=ray.exceptions))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        tasks.fetch("loader")
    assert done == ["loader"]
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_goes_before_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(reference: str) -> str:
        signal.raise_signal(signal.SIGINT)
        raise ray.exceptions.RaySystemError(f"no module for {reference}")

    monkeypatch.setattr(tasks, "ray", SimpleNamespace(get=get, exceptions=ray.exceptions))
    with pytest.raises(RuntimeError, match=r"a node lacks what the task needs: .*no module for loader"):
        tasks.fetch("loader")
