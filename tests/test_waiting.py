"""Waiting for nodes, with a cluster that the test makes grow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.autoscaler.v2.schema import ClusterStatus, LaunchRequest, NodeInfo
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    DefaultAutoscalingCoordinator,
    _AutoscalingCoordinatorActor,
)

from diffvit.cluster import waiting
from diffvit.cluster.waiting import can_grow, wait_for_nodes

WORKER = {"CPU": 3.0, "GPU": 1.0}


def node(cpus: float, gpus: float = 0.0, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cpus} | ({"GPU": gpus} if gpus else {})}


def launch(name: str, count: int, details: str | None = None) -> LaunchRequest:
    state = LaunchRequest.Status.FAILED if details else LaunchRequest.Status.PENDING
    return LaunchRequest("g6.2xlarge", name, count, state, request_ts_s=0, details=details)


class Cluster:
    """A list of moments: at each, the nodes that are up and what the autoscaler says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moments: list[tuple[list[dict[str, Any]], ClusterStatus]] = []
        self.requests: list[list[dict[str, float]]] = []
        self.expire_seconds = float("inf")
        self.asked_at = 0.0
        self.seconds = 0.0
        self.place = 0
        monkeypatch.setattr(waiting.ray, "nodes", lambda: self.now[0])
        monkeypatch.setattr(waiting, "_status", lambda: self.now[1])
        monkeypatch.setattr(waiting, "_coordinator", lambda requester: self)
        # not in `time` itself, where other threads sleep too
        monkeypatch.setattr(waiting, "time", SimpleNamespace(sleep=self.sleep, monotonic=lambda: self.seconds))

    @property
    def now(self) -> tuple[list[dict[str, Any]], ClusterStatus]:
        return self.moments[min(self.place, len(self.moments) - 1)]

    def request_resources(self, bundles: list[dict[str, float]], expire_after_s: float) -> None:
        self.requests.append(bundles)
        self.asked_at, self.expire_seconds = self.seconds, expire_after_s

    def cancel_request(self) -> None:
        self.requests.append([])

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        assert self.seconds < self.asked_at + self.expire_seconds  # what is waited for stays asked for
        self.place += 1


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    cluster = Cluster(monkeypatch)
    yield cluster
    assert cluster.requests[-1:] in ([], [[]])  # nothing stays asked for


def test_enough_nodes_are_not_waited_for(cluster: Cluster) -> None:
    cluster.moments = [([node(0), node(7, 2)], ClusterStatus())]
    said: list[str] = []
    wait_for_nodes([WORKER] * 2, 60, said.append)
    assert said == []
    assert cluster.requests == []


def test_each_step_is_told_once(cluster: Cluster) -> None:
    head, worker = node(0), node(4, 1)
    starting = ClusterStatus(pending_launches=[launch("gpu_spot", 2)])
    booting = ClusterStatus(
        pending_nodes=[NodeInfo("g6.2xlarge", "gpu_spot", "i-1", "10.0.0.5")],
        pending_launches=[launch("gpu_spot", 1)],
    )
    cluster.moments = [
        ([head], ClusterStatus()),
        ([head], starting),
        ([head], starting),
        ([head, worker, node(4, 1, alive=False)], booting),
        ([head, worker, worker, worker], ClusterStatus()),
    ]
    said: list[str] = []
    wait_for_nodes([WORKER] * 3, 60, said.append)
    assert said == [
        "waiting for nodes for 3 x (3 CPU, 1 GPU): room for 0 of 3; nothing is starting yet",
        "waiting for nodes for 3 x (3 CPU, 1 GPU): room for 0 of 3; starting 2 gpu_spot",
        "waiting for nodes for 3 x (3 CPU, 1 GPU): room for 1 of 3; starting 2 gpu_spot",
    ]
    assert cluster.requests == [[WORKER] * 3] * 4 + [[]]


def test_a_missing_quota_is_named_and_not_waited_for_for_ever(cluster: Cluster) -> None:
    refused = ClusterStatus(failed_launches=[launch("gpu_spot", 2, "MaxSpotInstanceCountExceeded")])
    cluster.moments = [([node(16)], refused)]
    said: list[str] = []
    with pytest.raises(ValueError, match=r"room for 0 of 2 after 2\.5 minutes; the cloud refused gpu_spot"):
        wait_for_nodes([WORKER] * 2, 150, said.append)
    assert "the cloud refused gpu_spot: MaxSpotInstanceCountExceeded" in said[0]
    assert len(said) == 3  # at once, and after one and two minutes


def test_a_big_node_holds_several_but_not_by_halves(cluster: Cluster) -> None:
    cluster.moments = [([node(5, 2), node(2, 1)], ClusterStatus()), ([node(6, 2)], ClusterStatus())]
    said: list[str] = []
    wait_for_nodes([WORKER, WORKER], 60, said.append)  # 5 + 2 CPUs are enough for two workers in sum only
    assert said == ["waiting for nodes for 2 x (3 CPU, 1 GPU): room for 1 of 2; nothing is starting yet"]


def test_what_is_waited_for_is_told_by_shape(cluster: Cluster) -> None:
    cluster.moments = [([node(3.5, 1)], ClusterStatus()), ([node(5, 1)], ClusterStatus())]
    said: list[str] = []
    wait_for_nodes([WORKER, {"CPU": 1.0}], 60, said.append)
    assert said == [
        "waiting for nodes for 1 x (3 CPU, 1 GPU) and 1 x (1 CPU): room for 1 of 2; nothing is starting yet"
    ]


def launched_by(home: Path, provider: str) -> None:
    (home / "ray_bootstrap_config.yaml").write_text(f"provider: {provider}\n")


def test_own_machines_are_waited_for_until_all_are_up(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    launched_by(tmp_path, "{type: local, head_ip: 10.0.0.1, worker_ips: [10.0.0.2, 10.0.0.3]}")
    cluster.moments = [
        ([node(3, 1)], ClusterStatus()),
        ([node(3, 1)] * 2, ClusterStatus()),
        ([node(3, 1)] * 3, ClusterStatus()),
    ]
    said: list[str] = []
    wait_for_nodes([WORKER] * 4, 60, said.append)  # too much for them, which is for others to say
    assert said == [
        "waiting for nodes for 4 x (3 CPU, 1 GPU): room for 1 of 4; 1 of 3 machines are up",
        "waiting for nodes for 4 x (3 CPU, 1 GPU): room for 2 of 4; 2 of 3 machines are up",
    ]
    assert cluster.requests == []  # there is nobody to ask


def test_a_machine_that_stays_away_is_told_of(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    launched_by(tmp_path, "{type: local, head_ip: 10.0.0.1, worker_ips: [10.0.0.2, 10.0.0.3]}")
    cluster.moments = [([node(3, 1), node(3, 1, alive=False)], ClusterStatus())]
    with pytest.raises(ValueError, match=r"1 of 3 machines are up. Ask for less, start the others, or take them out"):
        wait_for_nodes([WORKER] * 2, 60, print)


def test_what_several_ask_for_is_added_up(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ray's own coordinator: the wait neither drops another job's request nor is dropped with the next sum."""
    sent: list[list[dict[str, float]]] = []
    actor = _AutoscalingCoordinatorActor(
        get_current_time=lambda: cluster.seconds, send_resources_request=sent.append, get_cluster_nodes=list
    )
    remote = SimpleNamespace(
        request_resources=SimpleNamespace(remote=actor.request_resources),
        cancel_request=SimpleNamespace(remote=actor.cancel_request),
    )
    DefaultAutoscalingCoordinator("another job", remote).request_resources([{"CPU": 1.0}], expire_after_s=900)
    monkeypatch.setattr(waiting, "_coordinator", lambda requester: DefaultAutoscalingCoordinator(requester, remote))
    cluster.moments = [([node(0)], ClusterStatus())] * 200 + [([node(4, 1)], ClusterStatus())]
    wait_for_nodes([WORKER], 900, lambda line: actor._tick())  # at least once a minute
    assert cluster.seconds == 400
    assert sent[0] == sent[-1] == [{"CPU": 1.0}]
    assert len(sent) > 6
    assert all(request == [{"CPU": 1.0}, WORKER] for request in sent[1:-1])


def test_only_a_launched_cluster_can_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_CLUSTER_NAME", raising=False)
    assert not can_grow()
    monkeypatch.setenv("RAY_CLUSTER_NAME", "diffvit")
    assert can_grow()
    monkeypatch.delenv("RAY_CLUSTER_NAME")
    (tmp_path / "ray_bootstrap_config.yaml").touch()
    assert can_grow()
    context = SimpleNamespace(gcs_address="10.0.0.1:6379")
    monkeypatch.setattr(waiting.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(waiting.ray, "get_runtime_context", lambda: context)
    assert can_grow()
    context.gcs_address = "127.0.0.1:41234"  # the job's own Ray, where `ray down` has left that file
    assert not can_grow()
