"""Tells Ray that this spot node is about to go, so that training saves a checkpoint in time. Nothing in Ray does this.

Runs on every worker, started by the cluster file right after `ray start`. It is one file that needs no more than
Python, because that is how it gets to the node. It asks the cloud's metadata service every few seconds; on a notice it
drains this node (`ray drain-node`) with the seconds that are left, writes one line, and ends. It also ends when this
node's raylet is gone.

AWS: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html (two minutes)
GCP: https://cloud.google.com/compute/docs/instances/create-use-spot (thirty seconds)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path

_AWS = "http://169.254.169.254"
_GCP = "http://metadata.google.internal"
_GCP_NOTICE_SECONDS = 30
_POLL_SECONDS = {"aws": 5.0, "gcp": 2.0, "file": 1.0}
_DRAIN_ATTEMPTS = 5
_RAYLET_WAIT_SECONDS = 120.0


@dataclass(frozen=True)
class Notice:
    """The node it is read on ends in `seconds_left`; `reason` is the cloud's own word for it."""

    seconds_left: int
    reason: str


Ask = Callable[[], Notice | None]
"""The notice, or None as long as there is none; raises when the metadata service does not answer, or nonsense."""


def ask_aws(base: str = _AWS, now: Callable[[], float] = time.time) -> Notice | None:
    """The instance action that EC2 has announced, through IMDSv2; 404 means that there is none."""
    token = _fetch(f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT")
    try:
        answer = _fetch(f"{base}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    action = json.loads(answer)
    ends = datetime.strptime(action["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    return Notice(max(int(ends.timestamp() - now()), 0), f"EC2 spot {action['action']}")


def ask_gcp(base: str = _GCP) -> Notice | None:
    """Whether Compute Engine preempts this VM, or ends it for maintenance (VMs with a GPU do not migrate)."""
    place = f"{base}/computeMetadata/v1/instance"
    header = {"Metadata-Flavor": "Google"}
    if _fetch(f"{place}/preempted", header).strip() == "TRUE":
        return Notice(_GCP_NOTICE_SECONDS, "Compute Engine preemption")
    event = _fetch(f"{place}/maintenance-event", header).strip()
    return Notice(_GCP_NOTICE_SECONDS, "Compute Engine maintenance") if event.startswith("TERMINATE") else None


def ask_file(path: Path) -> Notice | None:
    """A file that holds the seconds left: for rehearsals, and for clouds whose notice something else can write down."""
    try:
        return Notice(int(path.read_text()), f"notice in {path}")
    except (FileNotFoundError, ValueError):  # not there yet, or not yet written
        return None


def _fetch(url: str, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=headers, method=method)
    answer: bytes = _OPENER.open(request, timeout=2).read()
    return answer.decode()


# The metadata service is the host's own: a proxy in the environment would answer for the wrong one.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Node:
    """The node that this process runs on, in its Ray cluster."""

    ray: Path
    address: str
    node_id: str

    def drain(self, notice: Notice) -> str | None:
        """Ask Ray to drain the node; why that failed, or None."""
        command = [
            str(self.ray), "drain-node", "--address", self.address, "--node-id", self.node_id,
            "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", notice.reason,
            "--deadline-remaining-seconds", str(notice.seconds_left),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except subprocess.TimeoutExpired:
            return "no answer in 20 s"
        if done.returncode == 0:
            return None
        return (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]

    def is_up(self) -> bool:
        return _find_raylet(Path("/proc")) == (self.address, self.node_id)


def find_node(ray: Path, proc: Path = Path("/proc")) -> Node:
    """The node whose raylet runs here, once it does.

    Raises:
        RuntimeError: none came up in two minutes.
    """
    deadline = time.monotonic() + _RAYLET_WAIT_SECONDS
    while time.monotonic() < deadline:
        found = _find_raylet(proc)
        if found:
            return Node(ray, *found)
        time.sleep(1)
    raise RuntimeError(f"no raylet runs on this node {_RAYLET_WAIT_SECONDS:.0f} s after `ray start`")


def _find_raylet(proc: Path) -> tuple[str, str] | None:
    """(GCS address, node id) from the raylet's command line, which needs no connection to the cluster."""
    for entry in proc.glob("[0-9]*/cmdline"):
        try:
            arguments = entry.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it ended
            continue
        options = dict(argument.lstrip("-").split("=", 1) for argument in arguments if "=" in argument)
        if arguments[0].endswith("/raylet") and {"gcs-address", "node_id"} <= options.keys():
            return options["gcs-address"], options["node_id"]
    return None


def watch(ask: Ask, node: Node, poll_seconds: float) -> int:
    """Wait for a notice and drain the node; the exit status, 0 when Ray took the notice or the node went away."""
    silent = 0
    while node.is_up():
        try:
            notice = ask()
            silent = 0
        except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:  # or an answer of another kind
            notice = None
            silent += 1
            if silent in (1, 100):  # once, and once more when it lasts
                _log(f"the metadata service does not answer: {error}")
        if notice:
            return _report(notice, node)
        time.sleep(poll_seconds)
    _log("the node's raylet is gone: nothing left to watch")
    return 0


def _report(notice: Notice, node: Node) -> int:
    began = time.monotonic()
    for attempt in range(1, _DRAIN_ATTEMPTS + 1):
        left = max(notice.seconds_left - int(time.monotonic() - began), 0)
        problem = node.drain(Notice(left, notice.reason))
        if problem is None:
            _log(f"{notice.reason}: node {node.node_id} is drained, {left} s left")
            return 0
        if attempt < _DRAIN_ATTEMPTS:
            time.sleep(1)
    _log(f"{notice.reason}: Ray did not take the notice in {_DRAIN_ATTEMPTS} attempts: {problem}")
    return 1


def _log(message: str) -> None:
    print(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} spot_watcher: {message}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Turn this node's spot notice into `ray drain-node`.")
    parser.add_argument("--cloud", choices=sorted(_POLL_SECONDS), required=True)
    parser.add_argument("--from", dest="source", help="metadata service to ask instead of the cloud's, or the file")
    parser.add_argument("--poll-seconds", type=float, help="between two questions")
    options = parser.parse_args(arguments)
    if options.cloud == "file" and not options.source:
        parser.error("--cloud file needs --from FILE")
    asks: dict[str, Ask] = {
        "aws": lambda: ask_aws(options.source or _AWS),
        "gcp": lambda: ask_gcp(options.source or _GCP),
        "file": lambda: ask_file(Path(options.source)),
    }
    try:
        node = find_node(Path(sys.executable).with_name("ray"))
    except RuntimeError as error:
        _log(str(error))
        return 1
    return watch(asks[options.cloud], node, options.poll_seconds or _POLL_SECONDS[options.cloud])


if __name__ == "__main__":
    sys.exit(main())
