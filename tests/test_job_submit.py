"""`ray job submit` on a running cluster that asks for a token, as the README says it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A head of its own with a token of its own: (dashboard address, environment that shows the token)."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},  # of other tests' Ray
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    dashboard = free_port()
    short = Path(tempfile.mkdtemp(prefix="dv-"))  # socket paths must stay under 107 characters
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=3",
        "--node-ip-address=127.0.0.1", f"--port={free_port()}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", "--object-store-memory=300000000", f"--temp-dir={short}",
        # with Ray's fixed one, another Ray on this machine leaves the head without the agent that takes jobs
        f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}",
    ]  # fmt: skip
    with (tmp_path / "ray.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(f"http://127.0.0.1:{dashboard}/api/jobs/", tmp_path / "ray.log")
            yield f"http://127.0.0.1:{dashboard}", environment
        finally:
            head.send_signal(signal.SIGTERM)
            kill_processes_of(short)
            head.wait(timeout=30)
            shutil.rmtree(short, ignore_errors=True)


def kill_processes_of(folder: Path) -> None:
    """The cluster's own processes: all of them name its folder, which no other does."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended
            if str(folder).encode() in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)


def wait_for(url: str, log: Path) -> None:
    """Until the dashboard answers; without the token its answer is 401."""
    for _ in range(120):
        try:
            urllib.request.urlopen(url, timeout=2)
        except urllib.error.HTTPError as answer:
            assert answer.code == 401  # noqa: PT017
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the cluster did not start:\n{log.read_text()[-2000:]}")


def submit(address: str, environment: dict[str, str], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "ray"), "job", "submit", "--address", address, "--working-dir", ".", "--"]
    for _ in range(20):
        done = subprocess.run(
            [*command, "python", "ray_jobs/pretrain.py", *arguments],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        if "No available agent" not in done.stderr:  # the dashboard answers before it can take a job
            break
        time.sleep(1)
    return done


def test_submitted_job_trains_and_a_wrong_one_says_why(
    cluster: tuple[str, dict[str, str]], folder: Path, tmp_path: Path
) -> None:
    address, environment = cluster
    options = [
        "folder", "--data.path", str(folder), "--storage", str(tmp_path / "runs"), "--model.image-size", "16",
        "--model.patch-size", "8", "--model.embed-dim", "16", "--model.num-heads", "1", "--model.depth", "1",
        "--optim.batch-size", "12", "--optim.epochs", "1", "--optim.warmup-epochs", "0",
    ]  # fmt: skip
    done = submit(address, environment, options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "folder finished: top-1" in done.stdout
    assert json.loads((tmp_path / "runs/folder/results.json").read_text())["last"]["step"] == 3

    wrong = submit(address, environment, [*options, "--name", "big", "--scale.workers", "12"])
    assert wrong.returncode != 0
    assert "12 workers need 0.5 CPUs each; the cluster has 1 node(s) with 3 CPUs and 0 GPUs in all" in wrong.stdout

    stranger = {**environment, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}
    Path(stranger["RAY_AUTH_TOKEN_PATH"]).write_text(secrets.token_hex(32))
    refused = submit(address, stranger, options)
    assert refused.returncode != 0
    assert "token authentication is enabled" in (refused.stdout + refused.stderr).lower()
