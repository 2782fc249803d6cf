"""The head's policy against what Ray's own node provider does on AWS: enough, and no action of EC2's too many.

moto refuses what a policy's actions do not allow. It knows neither resources nor conditions, so those are left out
here; test_cluster_files.py looks at them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import moto
import pytest
from moto.core import set_initial_no_auth_action_count
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

from diffvit.cluster.account import running_nodes
from diffvit.cluster.check import caller_notes

REGION = "eu-central-1"
STATEMENTS = json.loads((Path(__file__).parent.parent / "cluster/aws-head-policy.json").read_text())["Statement"]
ACTIONS = sorted({a for s in STATEMENTS for a in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])})

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # moto, whose own warnings do not concern us


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    with moto.mock_aws():
        yield


def make_key(actions: list[str]) -> dict[str, str]:
    """An access key whose owner may do `actions` and nothing else."""
    iam = boto3.client("iam")
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": actions, "Resource": "*"}]}
    iam.create_user(UserName="head")
    iam.put_user_policy(UserName="head", PolicyName="head", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName="head")["AccessKey"]
    return {"aws_access_key_id": key["AccessKeyId"], "aws_secret_access_key": key["SecretAccessKey"]}


@set_initial_no_auth_action_count(0)
def launch_tag_and_end_a_worker(provider_config: dict[str, Any], node_config: dict[str, Any]) -> None:
    provider = AWSNodeProvider(provider_config, "diffvit")
    tags = {"ray-node-type": "worker", "ray-launch-config": "x", "ray-user-node-type": "gpu_spot"}
    provider.create_node(node_config, tags, 1)
    (worker,) = provider.non_terminated_nodes({})
    provider.set_node_tags(worker, {"ray-node-status": "up-to-date"})
    assert provider.internal_ip(worker)
    provider.terminate_node(worker)
    assert provider.non_terminated_nodes({}) == []


def run_with(actions: list[str]) -> None:
    ec2 = boto3.client("ec2")
    node_config = {
        "InstanceType": "g6.2xlarge",
        "ImageId": ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"],
        "SubnetIds": [ec2.describe_subnets()["Subnets"][0]["SubnetId"]],
    }
    key = make_key(actions)
    launch_tag_and_end_a_worker({"region": REGION, "cache_stopped_nodes": False, "aws_credentials": key}, node_config)


def test_a_name_that_is_taken_is_found(account: None) -> None:
    config = {"cluster_name": "diffvit", "provider": {"type": "aws", "region": REGION}}
    assert list(caller_notes(config)) == []
    image = boto3.client("ec2").describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    tags = [{"ResourceType": "instance", "Tags": [{"Key": "ray-cluster-name", "Value": "diffvit"}]}]
    boto3.client("ec2").run_instances(ImageId=image, MinCount=2, MaxCount=2, TagSpecifications=tags)
    (note,) = caller_notes(config)
    assert note.startswith("cluster_name: diffvit is up, with 2 instances")
    assert list(caller_notes(config | {"cluster_name": "other"})) == []


@set_initial_no_auth_action_count(0)
def test_credentials_that_aws_refuses_are_told(account: None) -> None:
    with pytest.raises(ValueError, match=r"AWS does not tell what runs: .*AuthFailure"):
        running_nodes({"cluster_name": "diffvit", "provider": {"type": "aws", "region": REGION}})


def test_the_policy_is_enough(account: None) -> None:
    run_with(ACTIONS)


@pytest.mark.parametrize("needless", [action for action in ACTIONS if action.startswith("ec2:")])
def test_every_action_is_needed(account: None, needless: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception) as refused:  # noqa: PT011  Ray ends some with a message, some with boto's error
        run_with([action for action in ACTIONS if action != needless])
    assert f"not authorized to perform: {needless}" in f"{refused.value}{capsys.readouterr()}"
