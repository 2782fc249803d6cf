"""Which rank speaks for all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from diffvit.config import RunConfig
from diffvit.training.saver import Ask, Saver
from diffvit.training.worker import Worker


@pytest.mark.parametrize(("rank", "told"), [(0, 1), (1, 0)])
def test_a_node_about_to_go_is_said_once(tiny_config: RunConfig, rank: int, told: int) -> None:
    heard: list[Any] = []
    worker = Worker(
        torch.device("cpu"),
        report=lambda _: None,
        publish=lambda *event: heard.append(event),
        rank=rank,
        workers=2,
        preempted=lambda: True,
    )
    logbook = SimpleNamespace(cut=lambda *_, **__: heard.append("cut"))
    saver = Saver(tiny_config, cast(Any, SimpleNamespace(step=3)), worker, cast(Any, logbook))
    assert saver.answer(Ask.POLL)  # every rank saves
    assert len(heard) == 2 * told
