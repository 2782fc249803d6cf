"""The stream asks the autoscaler for nothing, however busy its CPUs are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.data import ExecutionResources
from ray.data._internal.cluster_autoscaler import RateBasedClusterAutoscaler
from ray.data._internal.cluster_autoscaler.resource_utilization_gauge import ClusterUtil

from diffvit.data.no_growth import NoGrowth


class Operator:
    """Of a Ray Data execution whose tasks take a CPU each and are busy."""

    metrics = SimpleNamespace(num_output_blocks_per_task_s=1.0, average_num_outputs_per_task=1.0)
    output_dependencies: tuple[Any, ...] = ()
    input_dependencies: tuple[Any, ...] = ()

    def has_completed(self) -> bool:
        return False

    def per_task_resource_allocation(self) -> ExecutionResources:
        return ExecutionResources(cpu=1)

    def min_scheduling_resources(self) -> ExecutionResources:
        return ExecutionResources(cpu=1)

    def get_max_concurrency_limit(self) -> None:
        return None


@pytest.mark.parametrize("kept", [False, True])
def test_a_busy_stream_asks_for_no_nodes(kept: bool) -> None:
    sent: list[list[dict[str, float]]] = []
    coordinator = SimpleNamespace(
        request_resources=lambda resources, **_: sent.append(resources),
        get_reserved_resources=lambda: {"node": {"CPU": 8.0}},
    )
    busy = SimpleNamespace(observe=lambda: None, get=lambda: ClusterUtil(1.0, 0.0, 0.0, 0.0))
    autoscaler = RateBasedClusterAutoscaler(
        [Operator()], "a", utility_calculator=busy, autoscaling_coordinator=coordinator,
        min_gap_between_autoscaling_requests_s=0,
    )  # fmt: skip
    if kept:
        NoGrowth().before_execution_starts(SimpleNamespace(_cluster_autoscaler=autoscaler))
    autoscaler.try_trigger_scaling()
    assert sent == [[], [] if kept else [{"CPU": 1.0}] * 16]  # twice the eight that are there
