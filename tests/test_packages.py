"""A node without what the job needs is named before the job starts."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import ray

from diffvit.cluster import packages
from diffvit.cluster.packages import PACKAGES, differing, require_all, require_packages, versions_on


def test_a_node_installs_them_with_rays_extras_and_boto3() -> None:
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    bare = [re.split(r"[<>=;\s]", line, maxsplit=1)[0] for line in project["dependencies"]]
    listed = (root / "cluster/requirements.txt").read_text().splitlines()
    assert [line for line in listed if not line.startswith("#")] == [*bare, "boto3"]


def test_every_dependency_is_asked_for() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert list(PACKAGES) == [re.split(r"[\[<>=;\s]", line, maxsplit=1)[0] for line in project["dependencies"]]


def test_what_a_node_lacks_is_named_with_the_remedy() -> None:
    whole = {"torch": "2.14.1", "safetensors": "0.5", "diffvit": "found"}
    require_all({"10.0.0.1": whole})
    with pytest.raises(ValueError, match=r"lack some:\n  10.0.0.2: safetensors\n  10.0.0.3: torch, safetensors\ninst"):
        require_all(
            {
                "10.0.0.3": whole | {"torch": None, "safetensors": None},
                "10.0.0.1": whole,
                "10.0.0.2": whole | {"safetensors": None},
            }
        )
    with pytest.raises(ValueError, match=r"10.0.0.1: diffvit\n.*submit the job with --working-dir \."):
        require_all({"10.0.0.1": whole | {"diffvit": None}})


def test_another_version_is_said_and_another_build_is_not() -> None:
    mine = {"torch": "2.14.1+cpu", "numpy": "2.4.0"}
    assert differing(mine, {"10.0.0.1": {"torch": "2.14.1+cu130", "numpy": "2.4.0"}}) == []
    (line,) = differing(
        mine, {"b": {"torch": "2.14.0", "numpy": "2.4.0"}, "a": {"torch": "2.13.0+cpu", "numpy": "2.4.0"}}
    )
    assert line.startswith("warning: torch is 2.14.1+cpu here and 2.13.0+cpu on a, 2.14.0 on b; ")


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_nodes_answer_and_one_that_is_gone_does_not() -> None:
    here = ray.get_runtime_context().get_node_id()
    found = versions_on([here, "0" * 56], ("torch", "no-such-package"))
    assert found == {here: {"diffvit": "found", "torch": metadata.version("torch"), "no-such-package": None}}


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_the_other_nodes_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """This node plays the other one."""
    (node,) = ray.nodes()
    monkeypatch.setattr(packages, "PACKAGES", ("torch", "no-such-package"))
    require_packages(print)  # alone
    monkeypatch.setattr(packages.ray, "nodes", lambda: [node, {**node, "NodeID": "0" * 56}, {**node, "Alive": False}])
    require_packages(print)  # the other does not answer
    context = ray.get_runtime_context()
    monkeypatch.setattr(context, "get_node_id", lambda: "1" * 56)
    monkeypatch.setattr(packages.ray, "get_runtime_context", lambda: context)
    with pytest.raises(ValueError, match=f"{node['NodeManagerAddress']}: no-such-package\n"):
        require_packages(print)
    monkeypatch.setattr(packages, "PACKAGES", ("torch",))
    require_packages(pytest.fail)  # this process's own node does not answer: nothing to compare with
