"""What a sweep takes of the cluster, checked before the first trial: Ray would wait for ever for what never comes."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence

import ray

from diffvit.cluster.packages import require_packages
from diffvit.search.config import SweepConfig
from diffvit.training.cluster import connect

_DRIVER_CPUS = 0.1
"""Of a trial that trains in a worker group: it only waits. (Ray Tune refuses none at all.)"""

_RAY_UNITS = 10_000

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

    Raises:
        ValueError: it cannot, or a node lacks a package; says what there is.
    """
    for name, value in _TUNE_SETTINGS.items():
        os.environ.setdefault(name, value)
    search, scale = sweep.search, sweep.run.scale
    cpus = _cpus_of_trial(sweep)
    connect(dataclasses.replace(scale, workers=search.concurrent, cpus_per_worker=cpus))
    for name in ("ray.tune", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    require_room(sweep, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    require_packages(print)


def require_room(sweep: SweepConfig, nodes: Sequence[Mapping[str, float]]) -> None:
    """Make sure that all concurrent trials fit on nodes with these resources, with everything they start.

    Raises:
        ValueError: they do not; says what there is.
    """
    search, scale = sweep.search, sweep.run.scale
    cpus = _cpus_of_trial(sweep)
    if search.workers_per_trial > 1:
        each = {"CPU": scale.cpus_per_worker} | ({"GPU": 1.0} if scale.gpu else {})
        room = min(_places(nodes, each) // search.workers_per_trial, int(sum(n.get("CPU", 0) for n in nodes) / cpus))
        wanted = f"{cpus:g} CPUs" + (f" and {search.workers_per_trial} GPUs" if scale.gpu else "")
    else:
        each = share_of_trial(sweep)
        room = _places(nodes, each)
        wanted = " and ".join(f"{amount:g} {name}s" for name, amount in each.items())
    if room < search.concurrent:
        total = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
        raise ValueError(
            f"search.concurrent = {search.concurrent} trials need {wanted} each; the cluster has {len(nodes)} node(s) "
            f"with {total['CPU']:g} CPUs and {total['GPU']:g} GPUs in all, room for {room}"
        )


def _cpus_of_trial(sweep: SweepConfig) -> float:
    search = sweep.search
    if search.workers_per_trial == 1:
        return search.cpus_per_trial
    # a CPU beside a group's workers decodes its images
    return _DRIVER_CPUS + search.workers_per_trial * sweep.run.scale.cpus_per_worker + 1


def _places(nodes: Sequence[Mapping[str, float]], each: Mapping[str, float]) -> int:
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
