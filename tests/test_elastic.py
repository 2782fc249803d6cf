"""Runs whose number of workers is left open."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

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


@pytest.mark.parametrize(
    ("running", "leaving", "to"),
    [
        pytest.param(2, set(), 4, id="grows"),
        pytest.param(4, set(), None, id="stays"),
        pytest.param(4, {"b"}, None, id="writes its checkpoint first"),
    ],
)
def test_a_group_that_runs_is_made_larger_and_never_smaller(
    running: int, leaving: set[str], to: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": name, "Alive": True} for name in ("a", "b")])
    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", lambda: dict.fromkeys(leaving, 1_000))
    policy = FittingPolicy(ScalingConfig(num_workers=(1, 8), resources_per_worker={"CPU": 2}), (1, 2, 4))
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    monkeypatch.setattr(policy, "_get_reserved_resources", lambda: {"a": {"CPU": 4.0}, "b": {"CPU": 4.0}})
    state: Any = SimpleNamespace(num_workers=running, start_time=float("-inf"))
    decision = policy.make_decision_for_running_worker_group(state, None)
    if to is None:
        assert isinstance(decision, NoopDecision)
    else:
        assert isinstance(decision, ResizeDecision)
        assert decision.num_workers == to
    if leaving:  # and once it has ended
        decision = policy.make_decision_for_non_running_worker_group()
        assert isinstance(decision, ResizeDecision)
        assert decision.num_workers == 2
