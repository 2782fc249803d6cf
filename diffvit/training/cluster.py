"""The Ray cluster that a job runs in: found or started, and asked up front whether it can hold the job."""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.utils import get_num_cpus, read_ray_address

from diffvit.cluster.asking import blind_nodes
from diffvit.cluster.packages import require_packages
from diffvit.cluster.waiting import can_grow, room_for, wait_for_nodes
from diffvit.config import RunConfig, ScaleConfig

_RAY_UNITS = 10_000


def connect(scale: ScaleConfig | None = None, *, dashboard: bool = False) -> None:
    """Connect to the cluster this process runs in, else start a local one that can hold the workers of `scale`.

    That cluster is the one that submitted the job, or that `ray start` started on this machine.

    A local cluster listens on loopback only, has a dashboard only where one is asked for and, as Ray does by itself,
    asks for a token.
    """
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    # "auto" alone would also join whatever else runs on this machine, such as another user's job
    if os.environ.get("RAY_ADDRESS") or _answers(read_ray_address()):
        ray.init(address="auto", **quiet)
        if not os.environ.get("RAY_ADDRESS"):
            print(f"joined the Ray cluster of this machine, {ray.get_runtime_context().gcs_address}")
        _let_nodes_idle()
    else:
        workers_cpus = math.ceil(scale.max_workers * scale.cpus_per_worker) if scale else 0
        logical_cpus = max(cpu_count(), workers_cpus + 1)
        _make_token()
        with _on_loopback():
            ray.init(
                address="local",
                num_cpus=logical_cpus,
                include_dashboard=dashboard,
                **quiet,
            )
    for library in ("ray.train", "ray.data"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if threading.current_thread() is threading.main_thread():
        # `ray job stop` ends a job like Ctrl-C; Ray's own answer to SIGTERM aborts the process with a dump
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have Ray start a node on 127.0.0.1, by the switch that it has for Windows and macOS.

    On Linux it takes the machine's own address, also where it is told another, and listens on that.
    """
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before, in_environment = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(name)
    ray_constants.ENABLE_RAY_CLUSTER, os.environ[name] = False, "0"  # of this process, and of those that it starts
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(name)
        if in_environment is not None:
            os.environ[name] = in_environment


def cpu_count() -> int:
    """CPUs that this process may use: of a container those that it was given."""
    return max(int(get_num_cpus(override_docker_cpu_warning=True)), 1)


def _make_token() -> None:
    """Ray makes its token itself where there is none, but readable for everybody."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & {*os.environ}:
        return
    token = Path.home() / ".ray" / "auth_token"
    with suppress(OSError):
        token.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), open(token, "x", opener=_private) as file:
            file.write(secrets.token_hex(32))
        token.chmod(0o600)  # one that Ray made


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)


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


def enter_cluster(config: RunConfig, say: Callable[[str], None]) -> None:
    """Connect, wait for nodes, and `say` what is waited for.

    Raises:
        ValueError: the nodes cannot hold the workers, or one lacks a package or the images.
    """
    scale = config.scale
    connect(scale)
    _wait_for_cluster(scale, say)
    require_resources(scale)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if scale.gpu and scale.max_workers < gpus:
        say(f"the cluster has {gpus} GPUs, this run takes {scale.max_workers}: --scale.workers {gpus} takes all")
    require_packages(say)
    _require_images_everywhere(config.data.path)


def _require_images_everywhere(path: str) -> None:
    """A node that lacks the folder could decode nothing. Asked only where the path is a folder on this machine."""
    blind = blind_nodes(Path(path)) if Path(path).is_absolute() and Path(path).is_dir() else []
    if blind:
        raise ValueError(
            f"data.path must be on a disk that every node shares, or in an object store: {path} is not on "
            f"{', '.join(blind)}"
        )


def _wait_for_cluster(scale: ScaleConfig, say: Callable[[str], None]) -> None:
    """Wait for the workers' nodes where an autoscaler can add them, and `say` what is waited for."""
    if can_grow():
        wait_for_nodes(_bundles(scale), 60 * scale.wait_minutes, say)
    free = ray.available_resources()
    needed = {"CPU": scale.min_workers * scale.cpus_per_worker + 1} | ({"GPU": scale.min_workers} if scale.gpu else {})
    if any(free.get(name, 0) < count <= ray.cluster_resources().get(name, 0) for name, count in needed.items()):
        asked = " and ".join(
            f"{count:g} {name}s, of which {free.get(name, 0):g} are free" for name, count in needed.items()
        )
        say(f"the cluster is busy: this job needs {asked}; it waits until another job gives them back")


def _bundles(scale: ScaleConfig) -> list[dict[str, float]]:
    """What each worker takes, and the CPU that decoding needs."""
    return [scale.worker_resources] * scale.min_workers + [{"CPU": 1.0}]


def require_resources(scale: ScaleConfig) -> None:
    """Check that the nodes can hold the (least) workers and leave a CPU for decoding.

    Raises:
        ValueError: they never could; says what there is. (Ray would wait for ever.)
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = sum(node.get("CPU", 0) for node in nodes)
    gpus = sum(node.get("GPU", 0) for node in nodes)
    places = places_for(nodes, scale.worker_resources)
    has = f"the cluster has {len(nodes)} node(s) with {cpus:g} CPUs and {gpus:g} GPUs in all"
    workers = scale.min_workers
    if places < workers:
        each = f"{scale.cpus_per_worker:g} CPUs" + (" and a GPU" if scale.gpu else "")
        remedy = "lower scale.workers or add nodes" + (", or train on CPUs with --scale.no-gpu" if scale.gpu else "")
        raise ValueError(f"scale.workers = {workers} workers need {each} each; {has}, room for {places}; {remedy}")
    if room_for(_bundles(scale)) <= workers:
        raise ValueError(
            f"scale.workers x scale.cpus_per_worker = {workers} x {scale.cpus_per_worker:g} leaves no CPU "
            f"for decoding; {has}"
        )


def places_for(nodes: Sequence[Mapping[str, float]], each: Mapping[str, float]) -> int:
    """How many bundles of resources fit on the nodes, none of them across two."""
    return sum(min(_times(name, node.get(name, 0), amount) for name, amount in each.items()) for node in nodes)


def _times(name: str, there: float, amount: float) -> int:
    """How often `amount` fits. Ray takes a share of a GPU from one GPU: of two, 0.6 fits on each, and not three times.

    Ray counts resources in ten-thousandths.
    """
    units = max(round(amount * _RAY_UNITS), 1)
    if name == "GPU" and amount < 1:
        return int(there) * (_RAY_UNITS // units)
    return round(there * _RAY_UNITS) // units
