"""What `ray up` needs beside the cluster file on AWS and Google Cloud: credentials, and policies that fit the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PLACEHOLDER = "CHANGE-ME"
_POLICIES = ("aws-head-policy.json", "aws-worker-policy.json")


def policy_problems(config: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Where the policy files that lie beside an AWS cluster file are not filled in, or name another cluster."""
    texts = {name: (folder / name).read_text() for name in _POLICIES if (folder / name).exists()}
    for name, text in texts.items():
        if PLACEHOLDER in text:
            yield f"{folder / name}: still holds {PLACEHOLDER}; the role made from it would allow nothing"
    head = texts.get(_POLICIES[0])
    if head is None or PLACEHOLDER in head:
        return
    kinds = config["available_node_types"].items()
    workers = [kind["node_config"] for name, kind in kinds if name != config["head_node_type"]]
    named = {
        f'"aws:RequestTag/ray-cluster-name": "{config["cluster_name"]}"': "cluster_name",
        f"arn:aws:ec2:{config['provider']['region']}:": "provider.region",
    }
    named |= {f':key-pair/{worker["KeyName"]}"': "KeyName" for worker in workers if "KeyName" in worker}
    for worker in workers:
        named |= {f':security-group/{group}"': "SecurityGroupIds" for group in worker.get("SecurityGroupIds", [])}
    for text, field in named.items():
        if text not in head:
            yield f"{folder / _POLICIES[0]}: does not hold {text} as {field} asks: the head could not launch a worker"


def credential_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Whether this machine has credentials for the cloud, without showing them to it."""
    provider = config["provider"]["type"]
    if provider == "aws" and "aws_credentials" not in config["provider"]:
        import botocore.session

        if botocore.session.get_session().get_credentials() is None:
            yield "there are no AWS credentials here: aws configure, or set AWS_PROFILE"
    if provider == "gcp" and "gcp_credentials" not in config["provider"]:
        import google.auth
        from google.auth.exceptions import DefaultCredentialsError

        try:
            google.auth.default()
        except DefaultCredentialsError:
            yield "there are no Google Cloud credentials here: gcloud auth application-default login"


def running_nodes(config: Mapping[str, Any]) -> int:
    """How many instances of AWS bear this cluster's name already.

    Raises:
        ValueError: AWS does not answer, or refuses; says why.
    """
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        ec2 = boto3.client("ec2", region_name=config["provider"]["region"])
        pages = ec2.get_paginator("describe_instances").paginate(
            Filters=[
                {"Name": "tag:ray-cluster-name", "Values": [config["cluster_name"]]},
                {"Name": "instance-state-name", "Values": ["pending", "running"]},
            ]
        )
        return sum(len(reservation["Instances"]) for page in pages for reservation in page["Reservations"])
    except (BotoCoreError, ClientError) as error:
        raise ValueError(f"AWS does not tell what runs: {' '.join(str(error).split())}") from None
