"""What every node says to a question that a job asks before it starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_LIMIT_SECONDS = 60.0

P = ParamSpec("P")
T = TypeVar("T")


def other_nodes() -> dict[str, str]:
    """Address by id of the nodes that are alive, without this one."""
    here = ray.get_runtime_context().get_node_id()
    return {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"] and n["NodeID"] != here}


def blind_nodes(path: Path) -> list[str]:
    """Addresses of the other nodes that answer and do not see a file or folder of this machine."""
    nodes = other_nodes()
    return sorted(nodes[node] for node, seen in ask_nodes(nodes, Path.exists, path).items() if not seen)


def ask_nodes(nodes: Iterable[str], question: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> dict[str, T]:
    """What `question` returns on each of these nodes (ids) that answers within a minute."""
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        ask: Any = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(question)
        asked[node] = ask.remote(*arguments, **options)
    if asked:
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=_LIMIT_SECONDS)
    answers = {}
    for node, reference in asked.items():
        try:
            answers[node] = ray.get(reference, timeout=0)
        except RayError:
            ray.cancel(reference, force=True)
    return answers
