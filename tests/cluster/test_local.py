"""cluster/local.yaml on three hosts: up, a job on all of them, nobody else gets in, down."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hosts import Host, HostNetwork
from launcher import ROOT, Launcher

pytestmark = pytest.mark.cluster

CLUSTER_NAME = "diffvit-local-test"
RAY = "RAY_AUTH_MODE=token ~/diffvit-node/env/bin/ray"
JOB = (
    "python ray_jobs/pretrain.py sample --scale.workers 3 --scale.cpus-per-worker 2 --optim.epochs 1 "
    "--optim.warmup-epochs 0 --optim.batch-size 960 --model.depth 1 --model.embed-dim 32 --model.num-heads 1"
)


@pytest.fixture(scope="module")
def launcher(hosts: list[Host], caller: Host, shared_folder: Path, caller_home: Path) -> Iterator[Launcher]:
    """The cluster of the first three hosts, up with all its nodes. The last test takes it down."""
    config = yaml.safe_load((ROOT / "cluster/local.yaml").read_text())
    head, *workers = hosts[:3]
    config["cluster_name"] = CLUSTER_NAME
    config["provider"] |= {"head_ip": head.address, "worker_ips": [worker.address for worker in workers]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(head.key)}
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        # three CPUs, so that a worker that takes two leaves one for decoding and has no room for another beside it
        small = "ray start --num-cpus=3 --object-store-memory=300000000"
        config[commands] = [command.replace("ray start", small) for command in config[commands]]
    file = shared_folder / "local.yaml"
    file.write_text(yaml.safe_dump(config))
    for host in hosts[:3]:  # the environment that setup would otherwise download
        host.run(f"mkdir ~/diffvit-node && ln -s {sys.prefix} ~/diffvit-node/env")
        host.run("echo 'export PIP_DISABLE_PIP_VERSION_CHECK=1' >> ~/.bashrc")  # pip asks for its newest version
    launcher = Launcher(file, caller, caller_home)
    try:
        launcher.up()
        wait_for_nodes(head, 3)
        yield launcher
    finally:
        launcher.forget(CLUSTER_NAME)


def wait_for_nodes(head: Host, count: int) -> None:
    for _ in range(60):
        status = head.run(f"{RAY} status", check=False).stdout
        active = re.search(r"Active:\n(.*?)Pending:", status, re.DOTALL)
        if active and sum(int(number) for number in re.findall(r"^ (\d+) ", active[1], re.MULTILINE)) == count:
            return
        time.sleep(2)
    pytest.fail(f"{count} nodes did not come up:\n{status}")


def test_a_job_trains_and_decodes_on_every_host(launcher: Launcher, hosts: list[Host], shared_folder: Path) -> None:
    with launcher.tunnel() as address:
        done = launcher.submit(address, *JOB.split(), "--storage", str(shared_folder / "runs"), timeout=400)
    assert done.returncode == 0, done.stdout
    assert "3 workers on CPU, 1 epochs of 10 steps" in done.stdout
    results = json.loads((shared_folder / "runs/sample/results.json").read_text())
    assert results["status"] == "finished"
    assert results["world_sizes"] == [3]
    assert results["last"]["step"] == 10  # 10,000 images in batches of 960

    # Ray notes in each host's /tmp what ran there
    def hosts_of(title: str) -> int:
        found = f"grep -l {title} /tmp/ray/session_latest/logs/worker-*.err"
        return sum(bool(host.run(found, check=False).stdout) for host in hosts[:3])

    assert (hosts_of("RayTrainWorker"), hosts_of("Read_Chunks")) == (3, 3)
    # what the job uploaded
    packages = "/tmp/ray/session_latest/runtime_resources/working_dir_files"
    assert int(hosts[0].run(f"du -sb {packages} | cut -f1").stdout) < 8 * 2**20
    assert not hosts[0].run(f"find {packages} -name tests -o -name .git").stdout


def test_up_again_starts_every_node_anew_and_they_stay(launcher: Launcher, hosts: list[Host]) -> None:
    """What ends a worker's Ray after `ray down` must not end the one that comes after it."""
    head, *workers = hosts[:3]
    before = [raylet_of(worker) for worker in workers]
    launcher.up()
    deadline = time.monotonic() + 240
    while any(raylet_of(worker) in (old, "") for worker, old in zip(workers, before, strict=True)):
        assert time.monotonic() < deadline, "the workers were not started again"
        time.sleep(1)
    after = [raylet_of(worker) for worker in workers]
    time.sleep(12)  # more than twice what a reaper sleeps
    assert [raylet_of(worker) for worker in workers] == after
    wait_for_nodes(head, 3)
    for worker in workers:
        assert len([line for line in worker.processes() if line.startswith("sh -c cd ~/diffvit-node")]) == 1


def raylet_of(host: Host) -> str:
    """Its process, "" where none runs."""
    return host.run("pgrep -x raylet", check=False).stdout.strip()


def test_the_token_is_nowhere_but_in_its_file(launcher: Launcher, hosts: list[Host]) -> None:
    token = (launcher.home / ".ray/auth_token").read_text()
    for host in hosts[:3]:
        assert host.run("stat -c %a ~/.ray ~/.ray/auth_token").stdout.split() == ["700", "600"]
        assert host.run("cat ~/.ray/auth_token").stdout == token
        # the pattern comes from the file, so that the search does not find itself
        found = host.run("grep -rlsF -f ~/.ray/auth_token /tmp ~ --exclude-dir=.pyenv", check=False).stdout
        assert found.split() == ["/root/.ray/auth_token"]
        assert not host.run(
            "cat /proc/[0-9]*/cmdline | tr '\\0' '\\n' | grep -F -f ~/.ray/auth_token", check=False
        ).stdout


def test_nobody_gets_in_without_the_token(launcher: Launcher, hosts: list[Host]) -> None:
    """From a host outside of the cluster: every port that the head or a worker opens to the network."""
    *cluster, stranger = hosts
    probe = (Path(__file__).parent / "probe_ports.py").read_text()
    (launcher.home.parent / "probe_ports.py").write_text(probe)
    for host in cluster:
        listening = host.run("ss -ltnH | awk '{print $4}'").stdout.split()
        ports = sorted({int(place.rpartition(":")[2]) for place in listening if "127.0.0.1" not in place} - {22})
        answers = json.loads(
            stranger.run(
                f"{sys.executable} {launcher.home.parent}/probe_ports.py {host.address} {' '.join(map(str, ports))}",
                timeout=120,
            ).stdout
        )
        assert answers.keys() == {str(port) for port in ports}
        opened = {port: answer for port, answer in answers.items() if answer["served"]}
        # what Prometheus reads asks for no token: numbers, and names of tasks and actors
        assert all(answer["metrics_only"] for answer in opened.values()), opened
        assert {"8076", "8077", "52365"} <= {port for port, answer in answers.items() if answer["refused"]}
    head = cluster[0]
    answers_of_head = stranger.run(
        f"{sys.executable} {launcher.home.parent}/probe_ports.py {head.address} 6379 8265 10001"
    ).stdout
    gcs, dashboard, client = (json.loads(answers_of_head)[port] for port in ("6379", "8265", "10001"))
    assert gcs["refused"]
    assert client["refused"]
    assert dashboard == {"served": [], "refused": [], "metrics_only": False, "closed": True}


@pytest.mark.parametrize("token", [None, "0" * 64])
def test_ray_itself_is_refused(launcher: Launcher, hosts: list[Host], token: str | None) -> None:
    """`ray.init` from outside of the cluster and `ray job submit` on its head, without a token or with a wrong one."""
    *cluster, stranger = hosts
    mode = "RAY_AUTH_MODE=disabled" if token is None else f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN={token}"
    script = f'import ray; ray.init(address="{cluster[0].address}:6379"); print(ray.nodes())'
    tried = stranger.run(f"cd /tmp && {mode} {sys.executable} -c '{script}'", timeout=60, check=False)
    assert tried.returncode != 0
    assert "Alive" not in tried.stdout
    assert re.search("token is missing or incorrect|authentication token", tried.stdout + tried.stderr)
    submit = f"{mode} ~/diffvit-node/env/bin/ray job submit --address http://127.0.0.1:8265 -- touch /tmp/broken-in"
    tried = cluster[0].run(submit, timeout=60, check=False)
    assert tried.returncode != 0
    assert re.search("authentication token|Authentication required", tried.stdout + tried.stderr)
    assert cluster[0].run("test -e /tmp/broken-in", check=False).returncode != 0


def test_down_leaves_nothing_running(launcher: Launcher, hosts: list[Host]) -> None:
    launcher.down()
    assert hosts[0].processes() == []
    deadline = time.monotonic() + 120  # `ray down` stops the head; workers end once they miss it
    while any(host.processes() for host in hosts[:3]) and time.monotonic() < deadline:
        time.sleep(2)
    assert [host.processes() for host in hosts[:3]] == [[], [], []]


def test_nothing_was_sent_to_any_other_network(hosts: list[Host], caller: Host, network: HostNetwork) -> None:
    assert [host.packets_sent_outside() for host in (*hosts, caller)] == [0] * 5
    assert network.names_asked == set()
    # so would it have been seen
    caller.run("getent hosts example.org; bash -c 'echo > /dev/udp/192.0.2.1/9'", check=False)
    assert network.names_asked == {f"example.org by {caller.address}"}
    assert caller.packets_sent_outside() > 0
