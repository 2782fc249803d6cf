"""Runs whose number of workers is left open."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from diffvit.training import elastic
from diffvit.training.elastic import FittingPolicy, SparingPolicy, largest_fitting


@pytest.mark.parametrize(("room", "taken"), [(0, 0), (1, 0), (2, 2), (3, 2), (5, 4), (99, 12)])
def test_the_largest_number_there_is_room_for(room: int, taken: int) -> None:
    assert largest_fitting(room, (2, 4, 12)) == taken


def fitting_policy(counts: tuple[int, ...]) -> FittingPolicy:
    return FittingPolicy(ScalingConfig(num_workers=(1, 8), resources_per_worker={"CPU": 2}), counts, lambda: None)


def test_nodes_that_are_gone_or_about_to_go_have_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"NodeID": name, "Alive": name != "dead"} for name in ("a", "b", "leaving", "dead")]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", lambda: {"leaving": 1_000})
    policy = fitting_policy((1, 2, 3, 4, 6))
    reserved = {name: {"CPU": 4.0} for name in ("a", "b", "leaving", "dead", "never heard of")}
    assert policy._count_possible_workers(reserved) == 4
    del reserved["a"]
    assert policy._count_possible_workers(reserved) == 2
    reserved["b"] = {"CPU": 7.0}
    assert policy._count_possible_workers(reserved) == 3


def running(workers: int) -> Any:
    return SimpleNamespace(num_workers=workers, start_time=float("-inf"))


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> FittingPolicy:
    """Two nodes with room for four workers."""
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": name, "Alive": True} for name in ("a", "b")])
    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", dict)
    policy = fitting_policy((1, 2, 4))
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    monkeypatch.setattr(policy, "_get_reserved_resources", lambda: {"a": {"CPU": 4.0}, "b": {"CPU": 4.0}})
    return policy


def test_a_group_grows_just_after_a_checkpoint(policy: FittingPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = iter(["step_10", "step_10", None, "step_20"])
    monkeypatch.setattr(policy, "_newest", lambda: next(newest))
    for _ in range(3):
        assert isinstance(policy.make_decision_for_running_worker_group(running(2), None), NoopDecision)
    decision = policy.make_decision_for_running_worker_group(running(2), None)
    assert isinstance(decision, ResizeDecision)
    assert decision.num_workers == 4


def test_room_that_is_gone_by_the_next_checkpoint(policy: FittingPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = iter(["step_10", "step_20"])
    monkeypatch.setattr(policy, "_newest", lambda: next(newest))
    policy.make_decision_for_running_worker_group(running(2), None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "a", "Alive": True}])
    for _ in range(2):  # the second time there is nothing to wait for
        assert isinstance(policy.make_decision_for_running_worker_group(running(2), None), NoopDecision)


@pytest.mark.parametrize("leaving", [set(), {"b"}])
def test_a_group_that_runs_is_never_made_smaller(
    policy: FittingPolicy, leaving: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose node is about to go writes its checkpoint first."""
    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", lambda: dict.fromkeys(leaving, 1_000))
    newest = iter(["step_10", "step_20"])
    monkeypatch.setattr(policy, "_newest", lambda: next(newest))
    for _ in range(2):
        assert isinstance(policy.make_decision_for_running_worker_group(running(4), None), NoopDecision)
    if leaving:  # and once it has ended
        decision = policy.make_decision_for_non_running_worker_group()
        assert isinstance(decision, ResizeDecision)
        assert decision.num_workers == 2


@pytest.mark.parametrize(
    ("draining", "spared"), [({}, 0), ({"idle": 0}, 0), ({"spot": 1_060_000}, 9), ({"idle": 0, "spot": 1_060_000}, 9)]
)
def test_what_workers_die_of_beside_a_node_that_is_taken_away_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, draining: dict[str, int], spared: int
) -> None:
    monkeypatch.setattr(elastic, "_draining_nodes", lambda: draining)
    policy = SparingPolicy(FailureConfig(max_failures=2, max_preemption_failures=9))
    lost = WorkerGroupError("a worker failed", {0: RuntimeError("The actor died: aborted"), 1: ConnectionError("peer")})
    decisions = [policy.make_decision(lost) for _ in range(spared or 2)]
    assert set(decisions) == {FailureDecision.RETRY}
    assert policy.make_decision(lost) is FailureDecision.RAISE
    monkeypatch.setattr(elastic, "_draining_nodes", dict)
    assert policy.make_decision(lost) is (FailureDecision.RETRY if spared else FailureDecision.RAISE)


def test_a_controller_that_cannot_start_workers_is_no_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "_draining_nodes", lambda: {"spot": 1_060_000})
    failed = ControllerError(ValueError("a bug"))
    assert SparingPolicy(FailureConfig(max_failures=2)).make_decision(failed) is FailureDecision.RAISE
