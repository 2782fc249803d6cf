"""cluster/aws.yaml: Ray's own autoscaler launches instances through EC2's API (moto's), on hosts that are there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cloud import REGION, Cloud
from hosts import Host, HostNetwork
from launcher import ROOT, Launcher

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("default"),  # moto's and its server's own
]

CLUSTER_NAME = "diffvit-aws-test"
# two of the three CPUs that a node says it has here, so that two workers need two nodes
JOB = (
    "python ray_jobs/pretrain.py sample --scale.workers 2 --scale.cpus-per-worker 2 --optim.epochs 12 "
    "--optim.warmup-epochs 0 --optim.batch-size 180 --model.depth 1 --model.embed-dim 32 --model.num-heads 1"
)


@pytest.fixture(scope="module")
def module_monkeypatch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def cloud(network: HostNetwork, caller: Host, module_monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    def furnish(home: Path) -> None:
        """What the image and the instance's role bring along: Python packages, apt's, and credentials."""
        for folder in ("bin", "diffvit-node"):
            (home / folder).mkdir()
        (home / "diffvit-node/env").symlink_to(sys.prefix)
        (home / ".bashrc").write_text("export PATH=~/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1\n")
        (home / "bin/sudo").write_text("#!/bin/sh\nexit 0\n")
        (home / "bin/sudo").chmod(0o755)
        write_aws_files(home, cloud)

    with Cloud(network, caller, module_monkeypatch, furnish) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def launcher(
    cloud: Cloud, network: HostNetwork, caller: Host, shared_folder: Path, caller_home: Path
) -> Iterator[Launcher]:
    """aws.yaml with its placeholders filled in, and up. The last test takes it down."""
    made = cloud.open_account((network.key.with_name("key.pub")).read_text())
    text = (ROOT / "cluster/aws.yaml").read_text()
    for field, value in {
        "region: &region": REGION,
        "subnets: &subnets": f"[{made['subnet']}]",
        "head_groups: &head_groups": f"[{made['nodes']}, {made['ssh']}]",
        "worker_groups: &worker_groups": f"[{made['nodes']}]",
        "image: &image": made["image"],
        "key_pair: &key_pair": "diffvit",
        "ssh_private_key:": str(network.key),
    }.items():
        text, changed = re.subn(rf"({re.escape(field)}) .*", rf"\1 {value}", text)
        assert changed == 1
    assert "CHANGE-ME" not in text.split("cluster_name:")[1]
    # and what differs on a test host: its user, its metadata service, how long a test may last
    for there, here in {
        "cluster_name: diffvit ": f"cluster_name: {CLUSTER_NAME} ",
        "ssh_user: ubuntu": "ssh_user: root",
        "--cloud aws": f"--cloud aws --poll-seconds 1 --from {cloud.metadata_address}",
        "idle_timeout_minutes: 10": "idle_timeout_minutes: 0.4",
        "ray start": "ray start --object-store-memory=300000000",
        "max_workers: 4": "max_workers: 3",  # two, and the one that comes for the interrupted one
        '{"CPU": 16}': '{"CPU": 3}',  # for each CPU Ray starts a process at once
    }.items():
        assert there in text
        text = text.replace(there, here)
    file = shared_folder / "aws.yaml"
    file.write_text(text)
    programs = shared_folder / "programs"
    programs.mkdir()
    for name in ("ssh", "rsync"):
        wrapper = programs / name
        wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent}/reach.py {name} "$@"\n')
        wrapper.chmod(0o755)
    write_aws_files(caller_home, cloud)
    launcher = Launcher(file, caller, caller_home, first_on_path=programs)
    try:
        launcher.up()
        yield launcher
    finally:
        launcher.forget(CLUSTER_NAME)


def write_aws_files(home: Path, cloud: Cloud) -> None:
    (home / ".aws").mkdir()
    (home / ".aws/config").write_text(f"[default]\nregion = {REGION}\nendpoint_url = {cloud.endpoint}\n")
    (home / ".aws/credentials").write_text("[default]\naws_access_key_id = test\naws_secret_access_key = test\n")


def wait_until(happened: Callable[[], object], seconds: float, what: str) -> None:
    began = time.monotonic()
    while not happened():
        if time.monotonic() - began > seconds:
            pytest.fail(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.5)
    print(f"{what}: {time.monotonic() - began:.1f} s")


def test_up_launches_the_head_as_the_file_says(cloud: Cloud, launcher: Launcher) -> None:
    (head,) = cloud.instances("running")
    assert head["InstanceType"] == "m7i.xlarge"
    assert head["IamInstanceProfile"]["Arn"].endswith("instance-profile/diffvit-head")
    assert {group["GroupName"] for group in head["SecurityGroups"]} == {"diffvit-nodes", "diffvit-ssh"}
    assert head["MetadataOptions"]["HttpTokens"] == "required"
    assert all(volume["Encrypted"] for volume in cloud.ec2.describe_volumes()["Volumes"])
    # Ray made no group, role or key of its own beside ours
    groups = {group["GroupName"] for group in cloud.ec2.describe_security_groups()["SecurityGroups"]}
    assert groups == {"default", "diffvit-nodes", "diffvit-ssh"}
    assert {role["RoleName"] for role in cloud.iam.list_roles()["Roles"]} == {"diffvit-head", "diffvit-worker"}


def test_images_become_shards_in_the_bucket(cloud: Cloud, launcher: Launcher, tmp_path: Path) -> None:
    images = tmp_path / "images.parquet"  # by its own name it would be a test split
    shutil.copy(ROOT / "diffvit/data/sample/test.parquet", images)
    prepare = ["ray_jobs/prepare.py", "--source", str(images), "--out", cloud.uri("shards")]
    done = subprocess.run(
        launcher.host.from_here(sys.executable, *prepare), cwd=ROOT, env=launcher.environment, timeout=300,
        text=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "shards/dataset.json" in cloud.objects("shards")


def test_a_job_brings_up_workers_and_outlives_one(cloud: Cloud, launcher: Launcher) -> None:
    run = "runs/sample"
    places = ["--data.path", cloud.uri("shards"), "--storage", cloud.uri("runs")]
    with launcher.tunnel() as address, launcher.job(address, *JOB.split(), *places) as job:
        wait_until(lambda: len(cloud.workers("running")) == 2, 60, "two workers launched")
        first = cloud.workers("running")
        assert {worker["InstanceType"] for worker in first} == {"c7i.4xlarge"}
        assert {worker["InstanceLifecycle"] for worker in first} == {"spot"}
        assert {worker["IamInstanceProfile"]["Arn"].rpartition("/")[2] for worker in first} == {"diffvit-worker"}
        wait_until(lambda: any("/checkpoint.json" in name for name in cloud.objects(run)), 200, "a checkpoint saved")
        gone = first[1]["PrivateIpAddress"]
        watcher_log = cloud.network.hosts[gone].home / "diffvit-node/spot_watcher.log"
        cloud.interrupt(gone, seconds=25)
        wait_until(lambda: " is drained, " in watcher_log.read_text(), 20, "the notice passed on to Ray")
        wait_until(lambda: gone not in cloud.network.hosts, 60, "the instance ended")
        wait_until(lambda: len(cloud.workers("running")) >= 2, 60, "another launched in its place")
        said = job.finish(timeout=300)
    print(said)
    assert "waiting for nodes for 2 x (2 CPU) and 1 x (1 CPU): room for 0 of 3" in said
    results = json.loads(cloud.read(f"{run}/results.json"))
    assert results["status"] == "finished"
    assert results["last"]["step"] == 120  # 12 epochs of 1,800 images in batches of 180
    assert results["world_sizes"] == [2, 2]
    (interruption,) = results["interruptions"]
    assert interruption["why"] == "preempted: a node was about to go"
    assert "a node is about to go: saving at step" in said
    assert interruption["steps_repeated"] < 10  # then it saved every 5 s, and ended in between; without, up to an epoch


def test_idle_workers_go_away(cloud: Cloud, launcher: Launcher) -> None:
    # what Ray Data asked for at its end counts for three minutes more
    wait_until(lambda: not cloud.workers("running"), 400, "idle workers terminated")


def test_down_leaves_nothing(cloud: Cloud, launcher: Launcher, network: HostNetwork) -> None:
    launcher.down()
    assert not cloud.instances("running", "pending", "stopping", "stopped")
    caller = launcher.host
    wait_until(lambda: list(network.hosts) == [caller.address], 20, "hosts powered off")
    assert set(cloud.sent_outside.values()) == {0}
    assert caller.packets_sent_outside() == 0
    assert network.names_asked == set()
