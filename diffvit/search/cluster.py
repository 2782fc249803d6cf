"""What a sweep takes of the cluster, checked before the first trial: Ray would wait for ever for what never comes."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import ray
from ray._private import services

from diffvit.cluster.asking import blind_nodes
from diffvit.cluster.packages import require_packages
from diffvit.cluster.waiting import Bundle, can_grow, wait_for_nodes
from diffvit.search.config import SweepConfig
from diffvit.training.cluster import connect, places_for

_DRIVER_CPUS = 0.1
"""Of a trial that trains in a worker group: it only waits. (Ray Tune refuses none at all.)"""
_DECODING_CPUS = 1.0
"""Beside a group's workers, for the tasks that decode its images."""


_TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # records and curves are our own
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep as it ends any Python program
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the table shows the reason
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0 the other one still prints a box
}


def share_of_trial(sweep: SweepConfig, *, alone: bool = False) -> dict[str, float]:
    """Resources of the process that Ray Tune starts for a trial; with `alone`, of one that trains by itself."""
    search = sweep.search
    if search.workers_per_trial > 1 and not alone:
        return {"CPU": _DRIVER_CPUS}
    return {"CPU": search.cpus_per_trial} | ({"GPU": search.gpus_per_trial} if sweep.run.scale.gpu else {})


def connect_for(sweep: SweepConfig) -> None:
    """Connect to the cluster, or start a local one, that can hold all concurrent trials with everything they start.

    A local one offers the CPUs that there are; to a worker group, what a single one needs, whose processes mostly wait
    for each other. A cluster that can grow is given the time to.

    Raises:
        ValueError: it cannot, or a node lacks a package, or other clusters are in the way; says what there is.
    """
    for name, value in _TUNE_SETTINGS.items():
        os.environ.setdefault(name, value)
    scale = sweep.run.scale
    group = dataclasses.replace(scale, workers=1, cpus_per_worker=_cpus_of_trial(sweep))
    groups = sweep.search.workers_per_trial > 1
    # Ray Train asks the dashboard whether a trial that was stopped has ended, and keeps its CPUs until it hears so
    connect(group if groups else None, dashboard=groups)
    for name in ("ray.tune", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    clusters = clusters_here() if groups else set()
    if len(clusters) > 1:  # it asks for the address of the only one, and never again
        raise ValueError(
            f"search.workers_per_trial = {sweep.search.workers_per_trial} cannot be used while several Ray clusters "
            f"run on this machine ({', '.join(sorted(clusters))}): Ray would not see that a stopped trial has ended, "
            "and keep its CPUs; wait for the others' end, or take --search.workers-per-trial 1"
        )
    if can_grow():
        wait_for_nodes(bundles_of(sweep), 60 * scale.wait_minutes, print)
    require_room(sweep, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    require_packages(print)


def clusters_here() -> set[str]:
    """Addresses of the Ray clusters whose heads run on this machine now."""
    services.find_gcs_addresses.cache_clear()
    found: set[str] = services.find_gcs_addresses()
    return found


def bundles_of(sweep: SweepConfig) -> list[Bundle]:
    """What all concurrent trials take, process by process, as an autoscaler is asked for it."""
    scale, workers = sweep.run.scale, sweep.search.workers_per_trial
    trial = [share_of_trial(sweep)]
    if workers > 1:
        trial += [scale.worker_resources] * workers + [{"CPU": _DECODING_CPUS}]
    return trial * sweep.search.concurrent


def require_shared(file: Path) -> None:
    """Make sure that every node sees `file`, of the sweep's folder: trials leave there what this process reads.

    A node that does not answer within a minute is left to the trials themselves.

    Raises:
        ValueError: a node does not; names it.
    """
    blind = blind_nodes(file)
    if blind:
        raise ValueError(
            f"a sweep needs a storage folder that every node sees; {file.parent} is not seen on "
            f"{', '.join(blind)}. Mount a shared disk there and name it with --storage"
        )


def require_room(sweep: SweepConfig, nodes: Sequence[Mapping[str, float]]) -> None:
    """Make sure that all concurrent trials fit on nodes with these resources, with everything they start.

    Raises:
        ValueError: they do not; says what there is.
    """
    search, scale = sweep.search, sweep.run.scale
    cpus = _cpus_of_trial(sweep)
    if search.workers_per_trial > 1:
        room = min(
            places_for(nodes, scale.worker_resources) // search.workers_per_trial,
            int(sum(n.get("CPU", 0) for n in nodes) / cpus),
        )
        wanted = f"{cpus:g} CPUs" + (f" and {search.workers_per_trial} GPUs" if scale.gpu else "")
    else:
        each = share_of_trial(sweep)
        room = places_for(nodes, each)
        wanted = " and ".join(f"{amount:g} {name}s" for name, amount in each.items())
    if room < search.concurrent:
        total = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
        raise ValueError(
            f"search.concurrent = {search.concurrent} trials need {wanted} each; the cluster has {len(nodes)} node(s) "
            f"with {total['CPU']:g} CPUs and {total['GPU']:g} GPUs in all, room for {room}; "
            "lower search.concurrent, or add nodes"
        )


def _cpus_of_trial(sweep: SweepConfig) -> float:
    search = sweep.search
    if search.workers_per_trial == 1:
        return search.cpus_per_trial
    return _DRIVER_CPUS + search.workers_per_trial * sweep.run.scale.cpus_per_worker + _DECODING_CPUS
