"""Ask the cluster's autoscaler for nodes, and say what is waited for while they come up.

Without this, a job on a cluster that starts with no workers would be refused as too big, or wait without a word.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import ray
from ray.autoscaler.sdk import request_resources
from ray.autoscaler.v2.schema import ClusterStatus
from ray.autoscaler.v2.sdk import get_cluster_status

Bundle = dict[str, float]
"""What one worker takes of a node, as Ray names it: {"CPU": 8, "GPU": 1}."""

_POLL_SECONDS = 2.0
_REMIND_SECONDS = 60.0


def can_grow() -> bool:
    """Whether this process runs on the head of a cluster that `ray up` or KubeRay made, which may add nodes."""
    return Path("~/ray_bootstrap_config.yaml").expanduser().exists() or "RAY_CLUSTER_NAME" in os.environ


def wait_for_nodes(bundles: Sequence[Bundle], limit_seconds: float, say: Callable[[str], None]) -> None:
    """Until every bundle has room, all at the same time; `say` hears of each change, and of none once a minute.

    Raises:
        ValueError: there was no room within `limit_seconds`; says what the autoscaler last met.
    """
    if room_for(bundles) == len(bundles):
        return
    request_resources(bundles=[dict(bundle) for bundle in bundles])
    began = last_said = time.monotonic()
    said = ""
    try:
        while (room := room_for(bundles)) < len(bundles):
            now = time.monotonic()
            line = f"waiting for nodes for {_text(bundles)}: room for {room} of {len(bundles)}; {_doing()}"
            if line != said or now - last_said >= _REMIND_SECONDS:
                say(line)
                said, last_said = line, now
            if now - began > limit_seconds:
                raise ValueError(
                    f"asked for nodes for {_text(bundles)}, the cluster had room for {room} of {len(bundles)} after "
                    f"{limit_seconds / 60:g} minutes; {_doing()}. Ask for less, raise max_workers in the cluster file, "
                    "or have the cloud raise the quota"
                )
            time.sleep(_POLL_SECONDS)
    finally:
        request_resources(bundles=[])  # a node that nobody asks for goes away when it is idle


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
