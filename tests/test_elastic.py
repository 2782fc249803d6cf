"""Runs whose number of workers is left open."""

from __future__ import annotations

import pytest
import ray
from ray.train import ScalingConfig

from diffvit.training.elastic import FittingPolicy, largest_fitting


@pytest.mark.parametrize(("room", "taken"), [(0, 0), (1, 0), (2, 2), (3, 2), (5, 4), (99, 12)])
def test_the_largest_number_there_is_room_for(room: int, taken: int) -> None:
    assert largest_fitting(room, (2, 4, 12)) == taken


def test_nodes_that_are_gone_or_about_to_go_have_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"NodeID": name, "Alive": name != "dead"} for name in ("a", "b", "leaving", "dead")]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", lambda: {"leaving": 1_000})
    policy = FittingPolicy(ScalingConfig(num_workers=(1, 8), resources_per_worker={"CPU": 2}), (1, 2, 3, 4, 6))
    reserved = {name: {"CPU": 4.0} for name in ("a", "b", "leaving", "dead", "never heard of")}
    assert policy._count_possible_workers(reserved) == 4
    del reserved["a"]
    assert policy._count_possible_workers(reserved) == 2
    reserved["b"] = {"CPU": 7.0}
    assert policy._count_possible_workers(reserved) == 3
