"""The cluster files and their checker: they wait for their user, filled in they are sound, broken they fail."""

from __future__ import annotations

import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffvit.cluster import check
from diffvit.cluster.account import credential_problems, policy_problems
from diffvit.cluster.check import caller_notes, file_problems

ROOT = Path(__file__).parent.parent
LOCK = (ROOT / "requirements.lock").read_text()
LAUNCHED = ("aws", "gcp", "azure", "local")
ALL = (*LAUNCHED, "kuberay")


def text_of(name: str) -> str:
    return (ROOT / f"cluster/{name}.yaml").read_text()


def filled_in(name: str) -> str:
    return text_of(name).replace("CHANGE-ME", "10.77.0.11")


def problems_of(text: str) -> list[str]:
    return file_problems(text, LOCK)


@pytest.mark.parametrize("name", ALL)
def test_a_file_names_each_field_that_waits_for_its_user(name: str) -> None:
    text = text_of(name)
    waiting = [line for line in text.splitlines() if "CHANGE-ME" in line]
    problems = problems_of(text)
    assert len(problems) == len(waiting) >= 4
    assert all(re.match(r"line \d+: .* is still CHANGE-ME", problem) for problem in problems)
    # all of them stand together at the top, but for what a KubeRay job runs
    first_other = text.index("nothing below needs a change") if "nothing below" in text else 0
    late = [line for line in text[first_other:].splitlines() if "CHANGE-ME" in line]
    assert [line.split(":")[0].strip() for line in late] == (["entrypoint", "working_dir"] if name == "kuberay" else [])


@pytest.mark.parametrize("name", ALL)
def test_a_file_that_is_filled_in_is_sound(name: str) -> None:
    assert problems_of(filled_in(name)) == []


# (file, what stands in it, what a slip would make of it, what the checker says)
SLIPS = [
    # Ray's own schema
    ("aws", "max_workers: 16", "max_worker: 16", r"Additional properties are not allowed \('max_worker'"),
    ("aws", "min_workers: 0", "min_worker: 0", r"Additional properties .*'min_worker'"),
    ("aws", "idle_timeout_minutes: 10", "idle_timeout_minutes: ten", "idle_timeout_minutes: 'ten' is not of type"),
    ("gcp", "head_node_type: head", "head_node_type: haed", "must be one of `available_node_types`"),
    ("local", "ssh_user:", "ssh_usr:", r"'ssh_usr' was unexpected"),
    # provider, which that schema lets pass
    ("aws", "cache_stopped_nodes:", "cache_stoped_nodes:", "cache_stoped_nodes: unknown; did you mean"),
    ("gcp", "  availability_zone:", "  availability_zones:", "did you mean 'availability_zone'"),
    ("azure", "resource_group:", "resourcegroup:", "provider.resourcegroup: unknown; did you mean 'resource_group'"),
    ("local", "head_ip:", "head_ips:", "supply a `head_ip`"),
    ("aws", "type: aws", "type: awss", "provider.type: must be one of aws, gcp, azure, local, got 'awss'"),
    # node_config, which it lets pass too
    ("aws", "InstanceType: *head_type", "InstanceTyp: *head_type", 'head.node_config: Unknown parameter .*InstanceTyp'),
    ("aws", "VolumeSize: 150", "VolumeSize: '150'", "Invalid type for parameter .*VolumeSize"),
    ("aws", "gpu_type g6.2xlarge", "gpu_type g6.2xlrage", "InstanceType: unknown; did you mean 'g6.2xlarge'"),
    ("aws", "MarketType: spot", "MarketType: spott", "InstanceMarketOptions.MarketType: unknown; did you mean 'spot'"),
    ("gcp", "machineType: *gpu_type", "machinetype: *gpu_type", "gpu_spot.node_config.machinetype: unknown; did you"),
    ("gcp", "provisioningModel: SPOT", "provisioningModel: SPOTS", "scheduling.provisioningModel: unknown"),
    ("gcp", "autoDelete: true", "autoDelete: 'yes'", r"disks\[0\].autoDelete: must be of type boolean, got 'yes'"),
    ("azure", "vmSize: *gpu_size", "vmsize: *gpu_size", "azure_arm_parameters.vmsize: unknown; did you mean 'vmSize'"),
    ("kuberay", "maxReplicas: 4", "maxReplica: 4", r"workerGroupSpecs\[2\].maxReplica: unknown; did you mean"),
    ("kuberay", "submissionMode:", "submitMode:", "RayJob.spec.submitMode: unknown; did you mean 'submissionMode'"),
    # doors that Ray leaves open
    ("aws", "RAY_AUTH_MODE=token ~/diffvit-node/env/bin/ray start --head", "ray start --head", "head.*AUTH_MODE"),
    ("gcp", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "needs --dashboard-host=127.0.0.1"),
    ("local", " --dashboard-host=127.0.0.1", "", "needs --dashboard-host=127.0.0.1"),
    ("local", "RAY_AUTH_MODE=token ~", "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=abc ~", "shows the token in process lists"),
    ("azure", "  ~/.ray/auth_token: ~/.ray/auth_token", "  ~/x: ~/.ray/auth_token", "nodes would have no token"),
    ("aws", "SecurityGroupIds: *head_groups", "Monitoring: {Enabled: true}", "Ray's own group lets everybody try SSH"),
    ("aws", "Encrypted: true", "Encrypted: false", "every disk needs Ebs.Encrypted: true"),
    ("aws", "IamInstanceProfile: *head_profile", "EbsOptimized: true", "Ray would give the head full access"),
    ("aws", "HttpTokens: required", "HttpTokens: optional", "HttpTokens: must be required"),
    ("aws", "ImageId: *image", "EbsOptimized: true", "image of Ubuntu 18.04"),
    (
        "aws",
        "provider:\n",
        "provider:\n  security_group: {IpPermissions: [{FromPort: 22, ToPort: 22, IpRanges: [{CidrIp: 0.0.0.0/0}]}]}\n",
        "provider.security_group: open to everybody",
    ),
    ("gcp", "serviceAccounts: *head_accounts", "description: x", "compute.admin, objectAdmin, serviceAccountUser"),
    ("gcp", "- subnetwork: 10", "- accessConfigs: [{name: nat}]\n      subnetwork: 10", "the node a public address"),
    (
        "gcp",
        "- subnetwork: 10",
        "- ipv6AccessConfigs: [{name: six}]\n      subnetwork: 10",
        "ipv6AccessConfigs gives the node a public address",
    ),
    ("azure", "use_internal_ips: true", "use_internal_ips: false", "Ray opens SSH to everybody on Azure"),
    (
        "azure",
        "use_internal_ips: true",
        "use_internal_ips: true\n  use_external_head_ip: true",
        "use_external_head_ip: must not be set",
    ),
    ("kuberay", "mode: token", "mode: disabled", "authOptions.mode: must be token"),
    ("kuberay", "enabled: true", "enabled: false", "tlsOptions.enabled: must be true"),
    ("kuberay", "mode: DenyAllIngress", "mode: DenyAllEgress", "networkPolicy.mode: must be DenyAllIngress"),
    ("kuberay", "serviceType: ClusterIP", "serviceType: LoadBalancer", "so that the head has no public address"),
    ("kuberay", "            - from:\n", "            - form:\n", "head.ingressRules.0.: names no `from`, and so lets"),
    (
        "kuberay",
        "            - from:\n",
        "            - from:\n                - {ipBlock: {cidr: 0.0.0.0/0}}\n",
        "is for 0.0.0.0/0, and so lets",
    ),
    (
        "kuberay",
        "            - from:\n",
        "            - from:\n                - {namespaceSelector: {}}\n",
        "is for all namespaces, and so lets",
    ),
    # a field that is empty, or of another kind
    ("aws", "provider:\n  type: aws", "provider:\nx:\n  type: aws", "provider.type: must be one of .*, got None"),
    ("aws", "&subnets [10.77.0.11]", "&subnets subnet-0abc", r"SubnetIds: must be a list, .*: write \[subnet-0abc\]"),
    ("aws", "&metadata {HttpTokens: required, HttpPutResponseHopLimit: 1}", "&metadata", "parameter MetadataOptions"),
    ("aws", "BlockDeviceMappings: &disk\n", "BlockDeviceMappings: &disk x\n      UserData: |\n", "BlockDeviceMappings"),
    ("gcp", "networkInterfaces: *network", "networkInterfaces:", "networkInterfaces: must be of type array, got None"),
    ("azure", "priority: Spot", "priority: Spott", "azure_arm_parameters.priority: unknown; did you mean 'Spot'"),
    ("azure", "osDiskSize: 150", "osDiskSize: big", "azure_arm_parameters.osDiskSize: must be of type int, got 'big'"),
    ("kuberay", "items:\n", "items:\nx:\n", "items: must be a list of RayClusters and RayJobs"),
    ("kuberay", "    spec: &cluster\n", "    specs: &cluster\n", "RayCluster.spec: is missing"),
    ("kuberay", "      headGroupSpec:\n", "      headGroup:\n", "RayCluster.spec.headGroupSpec: is missing"),
    ("kuberay", "      workerGroupSpecs:\n", "      workerGroupSpecs:\n      x:\n", "workerGroupSpecs: must be a list"),
    ("kuberay", "maxReplicas: 4", "maxReplicas: four", "maxReplicas: must be a whole number, got 'four'"),
    ("kuberay", "submissionMode: SidecarMode", "submissionMode: SidecrMode", "submissionMode: unknown; did you mean"),
    ("kuberay", 'num-cpus: "0"', "num-cpus: 0", "rayStartParams.num-cpus: must be text, got 0: put it in quotes"),
    ("kuberay", "- groupName: gpu-spot\n          replicas", "- replicas", r"groupName: is missing"),
    # versions
    ("kuberay", 'rayVersion: "2.60.0"', 'rayVersion: "2.59.0"', "rayVersion must be 2.60.0, as in requirements.lock"),
    ("aws", "--requirement ~/diffvit-node/requirements.txt", "'ray[default]==2.52.1'", "installs Ray 2.52.1, require"),
    ("gcp", "cluster_name: diffvit", "cluster_name: [diffvit", "not YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "sound", "broken", "says"), SLIPS)
def test_a_slip_is_found_and_named(name: str, sound: str, broken: str, says: str) -> None:
    text = filled_in(name)
    assert sound in text
    problems = problems_of(text.replace(sound, broken))
    assert any(re.search(says, problem) for problem in problems), problems
    assert all("\n" not in problem for problem in problems)


def test_a_ray_with_known_holes_is_refused() -> None:
    old = re.sub(r"^ray==.*$", "ray==2.53.1", LOCK, flags=re.MULTILINE)
    (problem,) = file_problems(filled_in("local"), old)
    assert problem == (
        "requirements.lock: Ray 2.53.1 has known holes (CVE-2023-48022, CVE-2026-27482); use 2.54 or newer"
    )
    assert not file_problems(filled_in("local"), old.replace("ray==2.53.1", "ray==2.54.0"))


@pytest.mark.parametrize("name", LAUNCHED)
def test_fleets_start_at_nothing_and_go_back_to_it(name: str) -> None:
    config = yaml.safe_load(text_of(name))
    node_types: dict[str, Any] = config.get("available_node_types", {})
    for node_type, fields in node_types.items():
        if node_type != config["head_node_type"]:
            assert fields["min_workers"] == 0
            assert 0 < fields["max_workers"] <= config["max_workers"]
    if node_types:
        assert node_types["head"]["resources"] == {"CPU": 0}
        assert node_types["gpu_spot"]["resources"] == node_types["gpu"]["resources"]
        assert node_types["gpu_spot"]["priority"] > node_types["gpu"]["priority"]
        assert config["idle_timeout_minutes"] <= 10
        assert config["provider"]["cache_stopped_nodes"] is False


@pytest.mark.parametrize("name", LAUNCHED)
def test_nothing_installs_what_is_not_pinned(name: str) -> None:
    config = yaml.safe_load(text_of(name))
    installs = [line for key, value in config.items() if key.endswith("commands") for line in value if " pip " in line]
    assert installs
    assert all("requirements.lock" in line for line in installs)
    for place, source in config["file_mounts"].items():
        assert (ROOT / source).is_file() or source == check.TOKEN_PATH, place


@pytest.mark.parametrize("name", ["aws-head", "aws-worker"])
def test_policies_allow_no_more_than_they_name(name: str) -> None:
    policy = json.loads((ROOT / f"cluster/{name}-policy.json").read_text())
    for statement in policy["Statement"]:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        resources = statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]]
        assert statement["Effect"] == "Allow"
        assert "NotAction" not in statement
        assert all(re.fullmatch(r"(ec2|s3|iam):[A-Za-z]+", action) for action in actions)
        if "*" in resources:  # AWS knows no narrower resource for these
            assert all(action.startswith("ec2:Describe") for action in actions)
        if {"ec2:TerminateInstances", "iam:PassRole"} & set(actions):
            assert statement["Condition"]
    allowed = json.dumps(policy)
    assert ("ec2:" in allowed) == (name == "aws-head")


def test_the_role_on_google_cloud_is_about_instances_only() -> None:
    role = yaml.safe_load((ROOT / "cluster/gcp-head-role.yaml").read_text())
    assert "--file cluster/gcp-head-role.yaml" in text_of("gcp")
    assert {name.rpartition(".")[0] for name in role["includedPermissions"]} == {
        "compute.instances", "compute.disks", "compute.images", "compute.subnetworks", "compute.zoneOperations",
    }  # fmt: skip
    assert not [name for name in role["includedPermissions"] if "Iam" in name or "*" in name]


def run_check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = check.main(list(arguments))
    said = capsys.readouterr()
    return status, said.out + said.err


def test_the_command_looks_at_this_machine_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    key, file = tmp_path / "key", tmp_path / "local.yaml"
    config = yaml.safe_load(text_of("local"))
    config["provider"] |= {"head_ip": "127.0.0.1", "worker_ips": []}
    config["auth"] = {"ssh_user": "me", "ssh_private_key": str(key)}
    file.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(check.socket, "create_connection", lambda place, timeout: open_connection(place))

    status, said = run_check(capsys, str(file))
    assert status == 2
    assert f"there is no token in {tmp_path}/.ray/auth_token: (umask 077" in said
    assert f"auth.ssh_private_key: there is no {key}" in said
    assert "provider.head_ip: 127.0.0.1 does not answer on port 22 (SSH): refused" in said
    assert all(line.startswith(f"error: {file}: ") for line in said.splitlines())

    key.touch()
    (tmp_path / ".ray").mkdir()
    token = tmp_path / ".ray/auth_token"
    token.touch(mode=0o644)
    token.chmod(0o644)
    _, said = run_check(capsys, str(file))
    assert f"{token} can be read by others: chmod 600 {token}" in said
    token.chmod(0o600)
    monkeypatch.setattr(check.socket, "create_connection", lambda place, timeout: Closable())
    monkeypatch.setattr(check.metadata, "version", lambda name: "2.59.3")
    assert "this environment has Ray 2.59.3, the nodes will have 2.60.0" in run_check(capsys, str(file))[1]
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(check.socket, "create_connection", lambda place, timeout: Closable())
    assert run_check(capsys, str(file)) == (0, f"{file}: nothing found that would stop it\n")

    assert run_check(capsys, "cluster/none.yaml") == (2, "error: cluster/none.yaml: there is no such file\n")
    monkeypatch.chdir(tmp_path)
    assert "run this in the project's folder" in run_check(capsys, str(file))[1]


def test_workers_that_do_not_answer_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(place: tuple[str, int], timeout: float) -> Closable:
        if place[0] == "10.0.0.3":
            raise TimeoutError("timed out")
        return Closable()

    monkeypatch.setattr(check.socket, "create_connection", connect)
    config = {"provider": {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}}
    (note,) = caller_notes(config)
    assert note == "worker 10.0.0.3 does not answer this machine on port 22 (SSH): timed out; it must answer the head"


def test_policies_must_fit_the_file(tmp_path: Path) -> None:
    for name in ("aws-head-policy.json", "aws-worker-policy.json"):
        (tmp_path / name).write_text((ROOT / "cluster" / name).read_text())
    config = yaml.safe_load(filled_in("aws"))
    assert [line.partition(": still holds CHANGE-ME")[0] for line in policy_problems(config, tmp_path)] == [
        f"{tmp_path}/aws-head-policy.json",
        f"{tmp_path}/aws-worker-policy.json",
    ]
    for name in ("aws-head-policy.json", "aws-worker-policy.json"):
        (tmp_path / name).write_text(re.sub("CHANGE-ME-[A-Z-]+", "10.77.0.11", (ROOT / "cluster" / name).read_text()))
    (problem,) = policy_problems(config, tmp_path)
    assert 'does not hold :key-pair/10.77.0.11" as KeyName asks: the head could not launch a worker' in problem
    config = yaml.safe_load(filled_in("aws").replace("&key_pair 10.77.0.11", "&key_pair diffvit"))
    assert list(policy_problems(config, tmp_path)) == []
    config["cluster_name"] = "other"
    config["available_node_types"]["gpu"]["node_config"]["SecurityGroupIds"] = ["sg-1"]
    config["provider"]["region"] = "eu-central-1"
    assert [re.search(r" as (\S+) asks", line)[1] for line in policy_problems(config, tmp_path)] == [  # type: ignore[index]
        "cluster_name", "provider.region", "SecurityGroupIds",
    ]  # fmt: skip
    assert list(policy_problems(config, tmp_path / "elsewhere")) == []
    node_types = config["available_node_types"]
    node_types["boss"], config["head_node_type"] = node_types.pop("head"), "boss"
    node_types["boss"]["node_config"]["SecurityGroupIds"] = ["sg-of-the-head"]  # which its role need not launch
    assert not any("sg-of-the-head" in line for line in policy_problems(config, tmp_path))


def test_no_credentials_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "CLOUDSDK_"))]:
        monkeypatch.delenv(name)
    for name, value in {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true", "NO_GCE_CHECK": "true"}.items():
        monkeypatch.setenv(name, value)
    assert "no AWS credentials here: aws configure" in "".join(credential_problems({"provider": {"type": "aws"}}))
    assert "no Google Cloud credentials here" in "".join(credential_problems({"provider": {"type": "gcp"}}))
    assert list(credential_problems({"provider": {"type": "local"}})) == []
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    assert list(credential_problems({"provider": {"type": "aws"}})) == []


class Closable:
    def close(self) -> None:
        pass


def open_connection(place: tuple[str, int]) -> Closable:
    assert place == ("127.0.0.1", 22)
    raise ConnectionRefusedError("refused")


def test_the_lock_is_what_is_installed() -> None:
    """A cluster's nodes install all of it, so that a line too many fails there and not here."""
    lines = [line.partition(" ;")[0] for line in LOCK.splitlines() if not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    assert {name: version(name) for name in pinned} == pinned
