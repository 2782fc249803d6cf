"""A cloud in a box: EC2's, IAM's and S3's API from moto, whose instances are test hosts, and their metadata service.

moto hands out private addresses of its VPC, which is the hosts' network, so an instance at 10.77.0.5 is the host at
10.77.0.5. A thread starts a host for every instance that runs and powers it off when the instance ends.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
from hosts import MACHINE, Host, HostNetwork
from moto.ec2.responses.instances import InstanceResponse
from moto.server import ThreadedMotoServer

REGION = "eu-central-1"
BUCKET = "diffvit-test"
POLICIES = Path(__file__).parents[2] / "cluster"
CREDENTIALS = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": REGION}


def _give_as_many_as_asked(monkeypatch: Any) -> None:
    """EC2 launches up to MaxCount instances where it can, moto MinCount of them."""
    read = InstanceResponse._get_param
    monkeypatch.setattr(
        InstanceResponse, "_get_param",
        lambda self, name, *rest, **more: read(self, "MaxCount" if name == "MinCount" else name, *rest, **more),
    )  # fmt: skip


class Cloud:
    """`with Cloud(network, caller, monkeypatch, furnish) as cloud:`; `furnish` puts an image's contents into a HOME."""

    def __init__(self, network: HostNetwork, caller: Host, monkeypatch: Any, furnish: Callable[[Path], None]) -> None:
        _give_as_many_as_asked(monkeypatch)
        self.network, self._caller, self._furnish = network, caller, furnish
        self._server = ThreadedMotoServer(ip_address=MACHINE, port=0, verbose=False)
        self._metadata = ThreadingHTTPServer((MACHINE, 0), self._metadata_handler())
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._metadata.serve_forever, args=(0.1,)),
            threading.Thread(target=self._follow_instances),
        ]
        self._notices: dict[str, str] = {}
        self.sent_outside: dict[str, int] = {}

    def __enter__(self) -> Cloud:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.endpoint = f"http://{host}:{port}"
        self.ec2 = boto3.client("ec2", endpoint_url=self.endpoint, **CREDENTIALS)
        self.iam = boto3.client("iam", endpoint_url=self.endpoint, **CREDENTIALS)
        self.s3 = boto3.client("s3", endpoint_url=self.endpoint, **CREDENTIALS)
        self.s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._metadata.shutdown()
        for thread in self._threads:
            thread.join()
        self._metadata.server_close()
        self._server.stop()

    @property
    def metadata_address(self) -> str:
        return f"http://{MACHINE}:{self._metadata.server_port}"

    def open_account(self, public_key: str) -> dict[str, Any]:
        """What the comments at the top of aws.yaml tell its user to make; the names to write into the file."""
        vpc = self.ec2.create_vpc(CidrBlock="10.77.0.0/24")["Vpc"]["VpcId"]
        subnet = self.ec2.create_subnet(VpcId=vpc, CidrBlock="10.77.0.0/24")["Subnet"]["SubnetId"]
        self.ec2.modify_subnet_attribute(SubnetId=subnet, MapPublicIpOnLaunch={"Value": True})
        nodes, ssh = (
            self.ec2.create_security_group(VpcId=vpc, GroupName=name, Description=name)["GroupId"]
            for name in ("diffvit-nodes", "diffvit-ssh")
        )
        self.ec2.import_key_pair(KeyName="diffvit", PublicKeyMaterial=public_key.encode())
        for node in ("head", "worker"):
            trust, policy = ((POLICIES / f"aws-{name}.json").read_text() for name in ("trust", f"{node}-policy"))
            name = f"diffvit-{node}"
            self.iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust)
            self.iam.put_role_policy(RoleName=name, PolicyName="diffvit", PolicyDocument=policy)
            self.iam.create_instance_profile(InstanceProfileName=name)
            self.iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
        image = self.ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        return {"subnet": subnet, "nodes": nodes, "ssh": ssh, "image": image}

    def uri(self, folder: str) -> str:
        """A place in the bucket, as diffvit's options take it."""
        return f"s3://{BUCKET}/{folder}?endpoint_override={self.endpoint.removeprefix('http://')}&scheme=http"

    def objects(self, folder: str) -> list[str]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{folder}/")
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def read(self, name: str) -> bytes:
        content: bytes = self.s3.get_object(Bucket=BUCKET, Key=name)["Body"].read()
        return content

    def instances(self, *states: str) -> list[dict[str, Any]]:
        found = self.ec2.describe_instances()["Reservations"]
        every = [instance for reservation in found for instance in reservation["Instances"]]
        return [instance for instance in every if not states or instance["State"]["Name"] in states]

    def workers(self, *states: str) -> list[dict[str, Any]]:
        return [i for i in self.instances(*states) if {"Key": "ray-node-type", "Value": "worker"} in i["Tags"]]

    def interrupt(self, address: str, seconds: int) -> None:
        """EC2's notice to the instance at `address`, and its end when the time is up."""
        ends = datetime.now(UTC) + timedelta(seconds=seconds)
        self._notices[address] = json.dumps({"action": "terminate", "time": f"{ends:%Y-%m-%dT%H:%M:%SZ}"})
        (instance,) = [i for i in self.instances("running") if i["PrivateIpAddress"] == address]
        end = threading.Timer(seconds, self.ec2.terminate_instances, kwargs={"InstanceIds": [instance["InstanceId"]]})
        self._threads.append(end)
        end.start()

    def _follow_instances(self) -> None:
        while not self._stop.wait(0.5):
            running = {instance["PrivateIpAddress"] for instance in self.instances("running")}
            for address in running - self.network.hosts.keys():
                self.network.start(int(address.rpartition(".")[2]), self._furnish)
            for address in self.network.hosts.keys() - running - {self._caller.address}:
                host: Host = self.network.hosts[address]
                self.sent_outside[f"{address} at {time.time():.0f}"] = host.packets_sent_outside()
                self.network.power_off(host)

    def _metadata_handler(self) -> type[BaseHTTPRequestHandler]:
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                self.reply(200, "a-session-token")

            def do_GET(self) -> None:
                notice = cloud._notices.get(self.client_address[0])
                self.reply(200 if notice else 404, notice or "")

            def reply(self, code: int, text: str) -> None:
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: object) -> None:
                pass

        return Handler
