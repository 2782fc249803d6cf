"""Whether the other nodes have what a job needs, asked before it starts: Ray would say it by a traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import ray

from diffvit.cluster.asking import ask_nodes, other_nodes

PACKAGES = (
    "torch",
    "torchvision",
    "ray",
    "optuna",
    "pyarrow",
    "numpy",
    "pillow",
    "safetensors",
    "tensorboard",
    "matplotlib",
    "jinja2",
    "tyro",
    "pydantic",
    "rich",
)
"""What diffvit depends on, by the names of pyproject.toml."""

_OURS = "diffvit"

Versions = Mapping[str, str | None]
"""Of packages; None for one that is not there."""


def require_packages(say: Callable[[str], None]) -> None:
    """Ask each of the other nodes for its packages, and `say` whose versions are not those of this process.

    A node that goes away meanwhile, or does not answer within a minute, is left to the job itself.

    Raises:
        ValueError: a node lacks a package, or diffvit.
    """
    here, others = ray.get_runtime_context().get_node_id(), other_nodes()
    if not others:
        return
    found = versions_on([here, *others], PACKAGES)
    mine = found.pop(here, None)
    by_address = {others[node]: versions for node, versions in found.items()}
    require_all(by_address)
    for line in differing(mine, by_address) if mine is not None else ():
        say(line)


def versions_on(nodes: Iterable[str], packages: Sequence[str]) -> dict[str, Versions]:
    """The versions of `packages`, and 'found' for diffvit, on each of these nodes (ids) that answers."""

    # inside, so that it travels by value: by name it would need diffvit on the node
    def installed(names: Sequence[str], ours: str) -> dict[str, str | None]:
        from importlib import metadata, util

        versions: dict[str, str | None] = {ours: "found" if util.find_spec(ours) else None}
        for name in names:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = None
        return versions

    return dict(ask_nodes(nodes, installed, packages, _OURS))


def require_all(found: Mapping[str, Versions]) -> None:
    """Make sure that no node, by address, lacks a package.

    Raises:
        ValueError: one does; says what is to be installed where.
    """
    lacking = {
        address: names
        for address, versions in found.items()
        if (names := [name for name, version in versions.items() if version is None])
    }
    if not lacking:
        return
    lines = "".join(f"\n  {address}: {', '.join(names)}" for address, names in sorted(lacking.items()))
    remedy = "install cluster/requirements.txt there (setup_commands of the cluster file, or its image)"
    if any(_OURS in names for names in lacking.values()):
        remedy += f", and submit the job with --working-dir . for {_OURS} itself"
    raise ValueError(f"every node needs diffvit's packages, and these lack some:{lines}\n{remedy}")


def differing(mine: Versions, found: Mapping[str, Versions]) -> list[str]:
    """A line for each package whose version differs on a node; builds of one version (+cpu, +cu130) are the same."""
    lines = []
    for name, version in mine.items():
        others = {
            address: there[name] for address, there in found.items() if _release(there[name]) != _release(version)
        }
        if others:
            listed = ", ".join(f"{other} on {address}" for address, other in sorted(others.items()))
            lines.append(f"warning: {name} is {version} here and {listed}; runs may not continue with the same bits")
    return lines


def _release(version: str | None) -> str | None:
    return version.partition("+")[0] if version else None
