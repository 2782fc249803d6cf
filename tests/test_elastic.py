"""Runs whose number of workers is left open."""

from __future__ import annotations

import pytest

from diffvit.training.elastic import largest_fitting


@pytest.mark.parametrize(("room", "taken"), [(0, 0), (1, 0), (2, 2), (3, 2), (5, 4), (99, 12)])
def test_the_largest_number_there_is_room_for(room: int, taken: int) -> None:
    assert largest_fitting(room, (2, 4, 12)) == taken
