"""The Ray cluster that a job runs in: found or started, and asked up front whether it can hold the job."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray._private.utils import read_ray_address

from diffvit.cluster.waiting import can_grow, room_for, wait_for_nodes
from diffvit.config import ScaleConfig

_LOCAL_OBJECT_STORE_BYTES = 2 * 2**30


def connect(scale: ScaleConfig | None = None) -> None:
    """Connect to the cluster this process runs in, else start a local one that can hold the workers of `scale`.

    That cluster is the one that submitted the job, or that `ray start` started on this machine.

    A local cluster listens on loopback only, has no dashboard and, as Ray does by itself, asks for a token.
    """
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    # "auto" alone would also join whatever else runs on this machine, such as another user's job
    if os.environ.get("RAY_ADDRESS") or _answers(read_ray_address()):
        ray.init(address="auto", **quiet)
        _let_nodes_idle()
    else:
        workers_cpus = math.ceil(scale.max_workers * scale.cpus_per_worker) if scale else 0
        logical_cpus = max(os.cpu_count() or 1, workers_cpus + 1)
        ray.init(
            address="local",
            num_cpus=logical_cpus,
            include_dashboard=False,
            object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
            **quiet,
        )
        with suppress(OSError):  # Ray writes the token readable for everybody
            (Path.home() / ".ray" / "auth_token").chmod(0o600)
    for library in ("ray.train", "ray.data"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _answers(address: str | None) -> bool:
    """Whether anybody listens at `host:port`; a cluster that died leaves its address behind."""
    if not address:
        return False
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def _let_nodes_idle() -> None:
    """Start Ray Data's own actors on this node, where the driver is.

    They outlive the job. Started by rank 0, with its stream, they would lie on a worker's node, and the autoscaler
    would take that for busy for ever.
    """
    from ray.data._internal.stats import get_or_create_stats_actor  # of use on a cluster only, and slow to import
    from ray.data._internal.usage.actor import get_or_create_usage_collection_actor

    get_or_create_stats_actor()
    get_or_create_usage_collection_actor()


def wait_for_cluster(scale: ScaleConfig, say: Callable[[str], None]) -> None:
    """Wait for the workers' nodes where an autoscaler can add them, and `say` what is waited for."""
    if can_grow():
        wait_for_nodes(_bundles(scale), 60 * scale.wait_minutes, say)


def _bundles(scale: ScaleConfig) -> list[dict[str, float]]:
    """What each worker takes, and the CPU that decoding needs."""
    worker = {"CPU": scale.cpus_per_worker} | ({"GPU": 1.0} if scale.gpu else {})
    return [worker] * scale.min_workers + [{"CPU": 1.0}]


def require_resources(scale: ScaleConfig) -> None:
    """Check that the nodes can hold the (least) workers and leave a CPU for decoding.

    Raises:
        ValueError: they never could; says what there is. (Ray would wait for ever.)
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = sum(node.get("CPU", 0) for node in nodes)
    gpus = sum(node.get("GPU", 0) for node in nodes)
    places = sum(
        min(
            int(node.get("CPU", 0) // scale.cpus_per_worker),
            int(node.get("GPU", 0)) if scale.gpu else scale.min_workers,
        )
        for node in nodes
    )
    has = f"the cluster has {len(nodes)} node(s) with {cpus:g} CPUs and {gpus:g} GPUs in all"
    workers = scale.min_workers
    if places < workers:
        each = f"{scale.cpus_per_worker:g} CPUs" + (" and a GPU" if scale.gpu else "")
        raise ValueError(f"scale.workers = {workers} workers need {each} each; {has}, room for {places}")
    if room_for(_bundles(scale)) <= workers:
        raise ValueError(
            f"scale.workers x scale.cpus_per_worker = {workers} x {scale.cpus_per_worker:g} leaves no CPU "
            f"for decoding; {has}"
        )
