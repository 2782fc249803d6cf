"""Which cluster a job joins."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import with_fields

from diffvit.config import RunConfig
from diffvit.training import cluster


def test_only_an_address_that_answers_is_joined() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert cluster._answers(address)
    assert not cluster._answers(address)
    assert not cluster._answers(None)


def test_the_token_of_a_local_ray_is_private_from_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    token = tmp_path / ".ray/auth_token"
    modes: list[int] = []
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", lambda **_: modes.append(token.stat().st_mode & 0o777))
    monkeypatch.setattr(cluster, "_answers", lambda _: False)
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    cluster.connect()
    assert modes == [0o600]
    assert len(token.read_text()) == 64


@pytest.mark.parametrize(
    ("environment", "answers", "joined"), [(None, False, "local"), (None, True, "auto"), ("1.2.3.4:5", False, "auto")]
)
def test_a_job_joins_what_submitted_it_else_what_runs_here_else_starts_its_own(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    environment: str | None,
    answers: bool,
    joined: str,
) -> None:
    addresses: list[str] = []
    this_machine = SimpleNamespace(gcs_address="10.0.0.7:6379")
    monkeypatch.setattr(cluster.ray, "get_runtime_context", lambda: this_machine)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", lambda address, **_: addresses.append(address))
    monkeypatch.setattr(cluster, "_answers", lambda _: answers)
    monkeypatch.setattr(cluster, "_let_nodes_idle", lambda: addresses.append("nodes can idle"))
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / ".ray/auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    if environment is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    cluster.connect()
    assert addresses == ([joined, "nodes can idle"] if joined == "auto" else [joined])
    assert (token.stat().st_mode & 0o077 == 0) == (joined == "local")  # Ray made it, for everybody to read
    told = "joined the Ray cluster of this machine, 10.0.0.7:6379\n"
    assert capsys.readouterr().out == (told if joined == "auto" and environment is None else "")


def test_what_is_asked_of_the_cluster(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle GPUs are said; a node that lacks the images is named. A path that is no folder here is asked of nobody."""
    for name in ("connect", "_wait_for_cluster", "require_resources", "require_packages"):
        monkeypatch.setattr(cluster, name, lambda *_: None)
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 64.0, "GPU": 4.0})
    asked: list[Path] = []
    monkeypatch.setattr(cluster, "blind_nodes", lambda path: asked.append(path) or [])
    for workers, said in ((1, ["the cluster has 4 GPUs, this run takes 1: --scale.workers 4 takes all"]), (4, [])):
        heard: list[str] = []
        cluster.enter_cluster(with_fields(tiny_config, scale={"gpu": True, "workers": workers}), heard.append)
        assert heard == said
    for path in ("sample", "s3://bucket/shards", "", "/no/such/folder"):
        cluster.enter_cluster(with_fields(tiny_config, data={"path": path}), pytest.fail)
    assert asked == [Path(tiny_config.data.path)] * 2
    monkeypatch.setattr(cluster, "blind_nodes", lambda _: ["10.0.0.7"])
    with pytest.raises(ValueError, match=rf"every node shares.*: {tiny_config.data.path} is not on 10\.0\.0\.7"):
        cluster.enter_cluster(tiny_config, pytest.fail)


LISTENING = """
import os
from pathlib import Path
from diffvit.training.cluster import connect

connect()
parents = {}
for process in Path("/proc").glob("[0-9]*"):
    try:
        parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it ended
        pass

def is_own(pid):
    return pid == os.getpid() or (pid in parents and is_own(parents[pid]))

sockets = set()
for pid in filter(is_own, parents):
    for link in Path("/proc", str(pid), "fd").iterdir():
        try:
            sockets.add(os.readlink(link))
        except OSError:
            pass
for table in ("tcp", "tcp6"):
    for line in Path("/proc/net", table).read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
            print("listens", fields[1].partition(":")[0])
"""
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
"""127.0.0.1, ::1 and ::ffff:127.0.0.1 as /proc writes them."""


@pytest.mark.ray
def test_a_local_ray_listens_on_loopback_only() -> None:
    command = [sys.executable, "-c", LISTENING]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=120)
    listening = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("listens")]
    assert len(listening) > 3
    assert set(listening) <= LOOPBACK
