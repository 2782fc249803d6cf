"""`reach.py ssh|rsync ARGUMENT ...`: the real program, sent to the test host behind a public address.

moto makes up public addresses, which belong to somebody. Any address that is not one of moto's own is refused.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import boto3

_ADDRESS = re.compile(r"(?<=@)\d+\.\d+\.\d+\.\d+")


def host_of(address: str) -> str:
    if address.startswith("10.77.0."):
        return address
    found = boto3.client("ec2").describe_instances(Filters=[{"Name": "ip-address", "Values": [address]}])
    instances = [instance for reservation in found["Reservations"] for instance in reservation["Instances"]]
    if len(instances) != 1:
        sys.exit(f"reach.py: {address} is not one of the test's instances")
    private: str = instances[0]["PrivateIpAddress"]
    return private


def main() -> None:
    name, *arguments = sys.argv[1:]
    here = Path(os.environ["PATH"].split(":")[0])
    others = os.environ["PATH"].split(":", 1)[1]
    arguments = [_ADDRESS.sub(lambda match: host_of(match[0]), argument) for argument in arguments]
    program = shutil.which(name, path=others)
    assert program, f"no {name} behind {here}"
    os.execv(program, [name, *arguments])


if __name__ == "__main__":
    main()
