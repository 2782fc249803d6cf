"""Which rank speaks for all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from diffvit.config import RunConfig
from diffvit.training.checkpoint import TrainState
from diffvit.training.health import Health
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


def test_weights_are_good_once_they_were_tried() -> None:
    """The last update before a checkpoint may have gone too far, which no step has shown yet."""
    state = TrainState(*[cast(Any, None)] * 4, health=Health(0))
    goods = []
    for state.step in (10, 20, 25, 30, 45):
        state.note_healthy(tried=False)
        goods.append((state.good_step, state.untried_step))
    assert goods == [(None, 10), (10, 20), (10, 20), (20, 30), (30, 45)]
    state.step = 50
    state.note_evaluated()
    assert (state.good_step, state.untried_step) == (50, None)


def test_of_an_average_the_weights_behind_it_are_not_tried_by_its_evaluation() -> None:
    state = TrainState(*[cast(Any, None)] * 3, ema=cast(Any, object()), step=30, health=Health(0))
    state.note_evaluated()
    assert (state.evaluated, state.good_step, state.untried_step) == (True, None, 30)


def test_an_evaluation_among_poisoned_steps_makes_nothing_good() -> None:
    state = TrainState(*[cast(Any, None)] * 4, step=30, health=Health(2))
    state.health.counted = 1
    state.note_evaluated()
    assert (state.evaluated, state.good_step, state.untried_step) == (True, None, None)
