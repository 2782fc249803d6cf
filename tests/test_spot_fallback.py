"""What Ray's own autoscaler makes of gpu_spot and gpu in the cluster files: its scheduler and its record of failures.

This pins Ray's behaviour, which the comments in the files tell: spot first; on demand after an instance that was
promised did not come up; still spot after the cloud has refused to launch one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest
from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

ROOT = Path(__file__).parent.parent


def launches(name: str, monitor: CloudResourceMonitor, **worker: float) -> dict[str, int]:
    """What three training workers of that size, and nothing running yet, make the autoscaler launch."""
    file = yaml.safe_load((ROOT / f"cluster/{name}.yaml").read_text())
    config = AutoscalingConfig({**file, "auth": {}}, skip_content_hash=True)
    workers = [ResourceRequestUtil.make(worker) for _ in range(3)]
    request = SchedulingRequest(
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        idle_timeout_s=config.get_idle_timeout_s(),
        disable_launch_config_check=True,
        gang_resource_requests=[GangResourceRequest(requests=workers)],
        cloud_resource_availabilities=monitor.get_resource_availabilities(),
        recoverable_resource_availabilities=monitor.get_recoverable_resource_availabilities(),
    )
    reply = ResourceDemandScheduler(None).schedule(request)
    counts: dict[str, int] = {}
    for launch in reply.to_launch:
        counts[launch.instance_type] = counts.get(launch.instance_type, 0) + launch.count
    return {node_type: count for node_type, count in counts.items() if node_type != "head"}


def failed(status: Instance.InstanceStatus.ValueType) -> CloudResourceMonitor:
    monitor = CloudResourceMonitor()
    monitor.notify([InstanceUpdateEvent(instance_type="gpu_spot", new_instance_status=status)])
    return monitor


@pytest.mark.parametrize("name", ["aws", "gcp", "azure"])
def test_spot_comes_first_and_on_demand_after_a_timeout(name: str) -> None:
    assert launches(name, CloudResourceMonitor(), CPU=1, GPU=1) == {"gpu_spot": 3}
    assert launches(name, failed(Instance.ALLOCATION_TIMEOUT), CPU=1, GPU=1) == {"gpu": 3}
    # a refusal (no capacity, no quota) leaves no mark: Ray asks for spot again
    assert launches(name, failed(Instance.ALLOCATION_FAILED), CPU=1, GPU=1) == {"gpu_spot": 3}


@pytest.mark.parametrize("name", ["aws", "gcp", "azure"])
def test_work_without_gpus_goes_to_cpu_nodes(name: str) -> None:
    assert launches(name, CloudResourceMonitor(), CPU=9) == {"cpu_spot": 3}
