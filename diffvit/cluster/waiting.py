"""Ask the cluster's autoscaler for nodes, and say what is waited for while they come up.

Without this, a job on a cluster that starts with no workers would be refused as too big, or wait without a word.
"""

from __future__ import annotations

import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.autoscaler.v2.schema import ClusterStatus
from ray.autoscaler.v2.sdk import get_cluster_status

Bundle = dict[str, float]
"""What one worker takes of a node, as Ray names it: {"CPU": 8, "GPU": 1}."""

_POLL_SECONDS = 2.0
_REMIND_SECONDS = 60.0
_EXPIRE_SECONDS = 60.0
"""After which the autoscaler forgets a request that is not made again, as when this process was killed."""
_REMEDY = "raise max_workers in the cluster file, or have the cloud raise the quota"
_BOOTSTRAP = "~/ray_bootstrap_config.yaml"
"""The cluster file, as `ray up` leaves it on the head."""


def can_grow() -> bool:
    """Whether this process is connected to a cluster that `ray up` or KubeRay made, which may add nodes.

    `ray down` leaves the file of a cluster of own machines behind; a Ray that a job started there for itself, which
    listens on loopback, is not that cluster.
    """
    if ray.is_initialized() and ray.get_runtime_context().gcs_address.startswith("127."):
        return False
    return Path(_BOOTSTRAP).expanduser().exists() or "RAY_CLUSTER_NAME" in os.environ


def wait_for_nodes(bundles: Sequence[Bundle], limit_seconds: float, say: Callable[[str], None]) -> None:
    """Until every bundle has room, all at the same time; `say` hears of each change, and of none once a minute.

    A cluster of own machines is waited for only until all of them are up: then nothing more will come.

    Raises:
        ValueError: there was no room within `limit_seconds`; says what the autoscaler last met.
    """
    if room_for(bundles) == len(bundles):
        return
    machines = _own_machines()
    coordinator = None if machines else _coordinator(f"diffvit-{uuid.uuid4().hex}")
    began = last_said = time.monotonic()
    said = ""
    try:
        while (room := room_for(bundles)) < len(bundles):
            if machines and _alive() >= machines:
                return
            if coordinator:
                coordinator.request_resources([dict(bundle) for bundle in bundles], expire_after_s=_EXPIRE_SECONDS)
            doing = f"{_alive()} of {machines} machines are up" if machines else _doing()
            now = time.monotonic()
            line = f"waiting for nodes for {_text(bundles)}: room for {room} of {len(bundles)}; {doing}"
            if line != said or now - last_said >= _REMIND_SECONDS:
                say(line)
                said, last_said = line, now
            if now - began > limit_seconds:
                remedy = "start the others, or take them out of worker_ips" if machines else _REMEDY
                raise ValueError(
                    f"asked for nodes for {_text(bundles)}, the cluster had room for {room} of {len(bundles)} after "
                    f"{limit_seconds / 60:g} minutes; {doing}. Ask for less, {remedy}"
                )
            time.sleep(_POLL_SECONDS)
    finally:
        if coordinator:
            coordinator.cancel_request()  # a node that nobody asks for goes away when it is idle


def _coordinator(requester: str) -> Any:
    """Who sends the autoscaler the sum of all requests, every 20 s, and here those of `requester`.

    `ray.autoscaler.sdk.request_resources` would overwrite that sum, and be overwritten by the next.
    """
    from ray.data._internal.cluster_autoscaler import DefaultAutoscalingCoordinator  # slow to import

    return DefaultAutoscalingCoordinator(requester)


def _own_machines() -> int | None:
    """How many nodes a cluster of own machines has when all are up; None where nodes are launched."""
    file = Path(_BOOTSTRAP).expanduser()
    provider = yaml.safe_load(file.read_text())["provider"] if file.exists() else {}
    return 1 + len(provider["worker_ips"]) if provider.get("type") == "local" and "worker_ips" in provider else None


def _alive() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def room_for(bundles: Sequence[Bundle]) -> int:
    """How many of the bundles the nodes that are up could hold, each node as if it were empty."""
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    placed = 0
    for bundle in bundles:
        for node in nodes:
            if all(node.get(name, 0.0) >= amount for name, amount in bundle.items()):
                for name, amount in bundle.items():
                    node[name] -= amount
                placed += 1
                break
    return placed


def _doing() -> str:
    """What the autoscaler is about, in a few words; a refusal of the cloud stands first."""
    status = _status()
    refused = {f"{launch.ray_node_type_name}: {launch.details}" for launch in status.failed_launches if launch.details}
    starting: dict[str, int] = {}
    for launch in status.pending_launches:
        starting[launch.ray_node_type_name] = starting.get(launch.ray_node_type_name, 0) + launch.count
    for node in status.pending_nodes:
        starting[node.ray_node_type_name] = starting.get(node.ray_node_type_name, 0) + 1
    parts = [f"the cloud refused {line}" for line in sorted(refused)]
    if starting:
        parts.append("starting " + ", ".join(f"{count} {name}" for name, count in sorted(starting.items())))
    return "; ".join(parts) or "nothing is starting yet"


def _status() -> ClusterStatus:
    return get_cluster_status(ray.get_runtime_context().gcs_address)


def _text(bundles: Sequence[Bundle]) -> str:
    """'3 x (8 CPU, 1 GPU) and 1 x (1 CPU)'."""
    shapes = Counter(", ".join(f"{amount:g} {name}" for name, amount in bundle.items()) for bundle in bundles)
    return " and ".join(f"{count} x ({shape})" for shape, count in shapes.items())
