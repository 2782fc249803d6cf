"""One run over three hosts that loses a host, its network and a drained node, and grows: its audit is exact."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hosts import Host, HostNetwork
from launcher import ROOT

pytestmark = pytest.mark.cluster

RAY = f"RAY_AUTH_MODE=token {Path(sys.executable).parent}/ray"
EPOCHS = 24
# two of a host's three CPUs, so that each host holds one worker and has one CPU left for decoding
JOB = (
    f"{sys.executable} ray_jobs/pretrain.py sample --scale.workers 1 3 --scale.cpus-per-worker 2 --data.audit "
    f"--optim.epochs {EPOCHS} --optim.warmup-epochs 0 --optim.batch-size 960 --checkpoint.every-steps 5 "
    "--model.depth 1 --model.embed-dim 32 --model.num-heads 1"
)


class Cluster:
    """`ray start` by hand on test hosts; the first one is the head."""

    def __init__(self, network: HostNetwork) -> None:
        self._network, self._token = network, secrets.token_hex(32)
        # a lost host is missed after 20 s, and not after Ray's 65
        missed = "RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=3000 RAY_health_check_failure_threshold=5"
        self.head = self._start(21, "--head", missed)

    def add(self, number: int) -> Host:
        return self._start(number, f"--address={self.head.address}:6379")

    def rejoin(self, host: Host) -> None:
        host.run(f"{RAY} stop --force", check=False)
        self._start_ray(host, f"--address={self.head.address}:6379")

    def drain(self, host: Host, seconds: int) -> None:
        find = (
            "import ray; ray.init(log_to_driver=False); "
            f"print(next(n['NodeID'] for n in ray.nodes() if n['NodeManagerAddress'] == '{host.address}'))"
        )
        listed = self.head.run(f'cd /tmp && RAY_AUTH_MODE=token {sys.executable} -c "{find}"', timeout=60).stdout
        node = listed.split()[-1]
        self.head.run(
            f"{RAY} drain-node --address {self.head.address}:6379 --node-id {node} --reason "
            f"DRAIN_NODE_REASON_PREEMPTION --reason-message spot --deadline-remaining-seconds {seconds}",
            timeout=60,
        )

    def _start(self, number: int, role: str, settings: str = "") -> Host:
        def furnish(home: Path) -> None:
            (home / ".ray").mkdir(mode=0o700)
            (home / ".ray/auth_token").touch(mode=0o600)
            (home / ".ray/auth_token").write_text(self._token)

        host = self._network.start(number, furnish)
        self._start_ray(host, role, settings)
        return host

    def _start_ray(self, host: Host, role: str, settings: str = "") -> None:
        options = "--num-cpus=3 --object-store-memory=300000000 --disable-usage-stats"
        started = host.run(
            f"{settings} {RAY} start {role} --node-ip-address={host.address} {options}", timeout=90, check=False
        )
        assert started.returncode == 0, started.stdout + started.stderr


@pytest.fixture(scope="module")
def cluster(network: HostNetwork) -> Cluster:
    return Cluster(network)  # the network ends what runs on its hosts


def wait_for_next_checkpoint(run: Path) -> None:
    """Until the run has saved two later steps: the first may have been on its way already."""
    newest = last_saved(run)
    began = time.monotonic()
    while last_saved(run) < newest + 10:
        assert time.monotonic() - began < 180, f"no second checkpoint after step {newest} within 180 s"
        time.sleep(0.5)


def wait_for_workers(run: Path, count: int) -> None:
    """Until the run has saved a step of so many workers."""
    began = time.monotonic()
    while world_sizes(run)[-1] != count:
        assert time.monotonic() - began < 180, f"the run has not taken {count} workers within 180 s"
        time.sleep(0.5)


def world_sizes(run: Path) -> list[int]:
    manifest = run / f"checkpoint_step_{last_saved(run):08d}/checkpoint.json"
    sizes: list[int] = json.loads(manifest.read_text())["metrics"]["world_sizes"]
    return sizes


def last_saved(run: Path) -> int:
    saved = run.glob("checkpoint_step_*/checkpoint.json")
    return max((int(path.parent.name.rpartition("_")[2]) for path in saved), default=0)


def test_a_run_outlives_hosts_network_and_notices(cluster: Cluster, network: HostNetwork, shared_folder: Path) -> None:
    second, third = cluster.add(22), cluster.add(23)
    run = shared_folder / "runs/sample"
    said = shared_folder / "job.log"
    with ThreadPoolExecutor(1) as pool:
        command = f"cd {ROOT} && RAY_AUTH_MODE=token {JOB} --storage {run.parent} > {said} 2>&1"
        job = pool.submit(cluster.head.run, command, timeout=540, check=False)
        try:
            wait_for_next_checkpoint(run)

            fourth = cluster.add(24)  # has no worker yet: three is the most that the run takes
            network.power_off(third)
            wait_for_next_checkpoint(run)

            network.cut(second)
            wait_for_next_checkpoint(run)
            network.join(second)
            cluster.rejoin(second)
            wait_for_workers(run, 3)

            cluster.drain(fourth, seconds=15)
            done = job.result()
        except BaseException:
            print(said.read_text())
            print(cluster.head.run("cat /tmp/ray/session_latest/logs/train/ray-train-sys-controller*").stdout[-9000:])
            network.power_off(cluster.head)  # ends the job too
            raise
    print(said.read_text()[-3000:])
    assert done.returncode == 0
    results = json.loads((run / "results.json").read_text())
    assert (results["status"], results["last"]["step"]) == ("finished", 10 * EPOCHS)
    assert results["world_sizes"][0] == 3
    reasons = [interruption["why"] for interruption in results["interruptions"]]
    assert len(reasons) >= 4, reasons
    assert "resized from 2 to 3 workers" in reasons
    assert reasons[-1].startswith("preempted"), reasons
    rows = Counter((row["epoch"], row["position"]) for row in pq.read_table(run / "audit").to_pylist())
    rows.subtract((epoch, position) for epoch in range(1, EPOCHS + 1) for position in range(9_600))
    wrong = {place: count for place, count in rows.items() if count}
    found = (
        f"{len(wrong)} samples of the audit are wrong, {min(wrong, default=None)} to {max(wrong, default=None)}, by "
        f"{set(wrong.values())}; last files {sorted(path.name for path in (run / 'audit').iterdir())[-9:]}; "
        f"interruptions {results['interruptions']}, workers {results['world_sizes']}, skipped: "
        f"{(run / 'skipped.txt').read_text()[:300] if (run / 'skipped.txt').exists() else 'none'}"
    )
    assert not wrong, found
