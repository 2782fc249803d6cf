"""What a cluster file must not do: the ways in that Ray's own defaults leave open, and what closes each of them.

Each rule gives one line per problem, with the path of the field. Ray's defaults are those of 2.60:
`ray/autoscaler/<provider>/defaults.yaml` and `ray/autoscaler/_private/<provider>/config.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

TOKEN_PATH = "~/.ray/auth_token"
_EVERYBODY = ("0.0.0.0/0", "::/0", "*")
_FIRST_SOUND_RAY = (2, 54)


def ray_version_problems(version: str, source: str) -> list[str]:
    """Refuses versions with known holes: CVE-2023-48022 (no authentication at all), CVE-2026-27482 (before 2.54)."""
    if tuple(int(part) for part in version.split(".")[:2]) >= _FIRST_SOUND_RAY:
        return []
    return [f"{source}: Ray {version} has known holes (CVE-2023-48022, CVE-2026-27482); use 2.54 or newer"]


def launcher_problems(config: Mapping[str, Any]) -> list[str]:
    """Rules for a file that `ray up` takes, defaults already merged in."""
    problems = [*_start_problems(config), *_token_problems(config)]
    node_rules = {"aws": _aws_problems, "gcp": _gcp_problems}.get(config["provider"]["type"])
    if config["provider"]["type"] == "azure":
        problems += _azure_problems(config["provider"])
    if node_rules:
        for name, node_type in config["available_node_types"].items():
            problems += node_rules(node_type["node_config"], f"available_node_types.{name}.node_config")
    for permission in config["provider"].get("security_group", {}).get("IpPermissions", []):
        ranges = [*permission.get("IpRanges", []), *permission.get("Ipv6Ranges", [])]
        if any(value in _EVERYBODY for address in ranges for value in address.values()):
            problems.append("provider.security_group: open to everybody; name your own address, as a.b.c.d/32")
    return problems


def kuberay_security_problems(document: Mapping[str, Any]) -> list[str]:
    """Rules for a RayCluster, also the one inside a RayJob."""
    spec = document["spec"].get("rayClusterSpec") if document["kind"] == "RayJob" else document["spec"]
    if spec is None:  # a job for a cluster that exists
        return []
    path = "RayJob.spec.rayClusterSpec" if document["kind"] == "RayJob" else "RayCluster.spec"
    problems = []
    if spec.get("authOptions", {}).get("mode") != "token":
        problems.append(f"{path}.authOptions.mode: must be token, or everybody in the network can run code")
    if spec.get("tlsOptions", {}).get("enabled") is not True:
        problems.append(f"{path}.tlsOptions.enabled: must be true: the token crosses the pods' network")
    if spec.get("networkPolicy", {}).get("mode") not in ("DenyAll", "DenyAllIngress"):
        problems.append(f"{path}.networkPolicy.mode: must be DenyAllIngress or DenyAll")
    if spec["headGroupSpec"].get("serviceType", "ClusterIP") != "ClusterIP":
        problems.append(f"{path}.headGroupSpec.serviceType: must be ClusterIP, so that the head has no public address")
    if spec["headGroupSpec"].get("enableIngress"):
        problems.append(f"{path}.headGroupSpec.enableIngress: must not be set: use kubectl port-forward")
    return problems + _open_ingress_problems(spec.get("networkPolicy", {}), f"{path}.networkPolicy")


def _open_ingress_problems(policy: Mapping[str, Any], path: str) -> list[str]:
    """A rule that names nobody lets everybody in, and so does one that names all pods or all addresses."""
    rules = {name: policy.get(name, {}) for name in ("head", "worker")}
    rules |= {f"workerGroups[{number}]": group for number, group in enumerate(policy.get("workerGroups", []))}
    return [
        f"{path}.{name}.ingressRules[{number}]: {open_door}, and so lets everybody in"
        for name, group in rules.items()
        for number, rule in enumerate(group.get("ingressRules", []))
        if (open_door := _open_door(rule.get("from")))
    ]


def _open_door(peers: list[Mapping[str, Any]] | None) -> str | None:
    """What is wrong with the `from` of a rule."""
    if not peers:
        return "names no `from`"
    for peer in peers:
        if peer.get("ipBlock", {}).get("cidr") in _EVERYBODY:
            return f"is for {peer['ipBlock']['cidr']}"
        if "namespaceSelector" in peer and not peer["namespaceSelector"] and not peer.get("podSelector"):
            return "is for all namespaces"
    return None


def _start_problems(config: Mapping[str, Any]) -> Iterator[str]:
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[name] if re.search(r"\bray start\b", command)]
        if not starts:
            yield f"{name}: does not start Ray"
        for command in starts:
            if "RAY_AUTH_MODE=token" not in command:
                yield f"{name}: RAY_AUTH_MODE=token must stand before `ray start`, or Ray starts without authentication"
            if "--head" in command and not re.search(r"--dashboard-host[= ](127\.0\.0\.1|localhost)\b", command):
                yield f"{name}: `ray start --head` needs --dashboard-host=127.0.0.1; reach it with `ray dashboard`"


def _token_problems(config: Mapping[str, Any]) -> Iterator[str]:
    if config["file_mounts"].get(TOKEN_PATH) != TOKEN_PATH:
        yield f"file_mounts: {TOKEN_PATH}: {TOKEN_PATH} is missing: nodes would have no token or another one"
    for name, value in config.items():
        if name.endswith("commands") and any("RAY_AUTH_TOKEN=" in command for command in value):
            yield f"{name}: RAY_AUTH_TOKEN= shows the token in process lists and logs; nodes read {TOKEN_PATH}"


def _aws_problems(node: Mapping[str, Any], path: str) -> Iterator[str]:
    if not node.get("SecurityGroupIds") and "NetworkInterfaces" not in node:
        yield f"{path}.SecurityGroupIds: missing, and Ray's own group lets everybody try SSH"
    if "ImageId" not in node:
        yield f"{path}.ImageId: missing, and Ray would take its image of Ubuntu 18.04"
    if "IamInstanceProfile" not in node:
        yield f"{path}.IamInstanceProfile: missing; Ray would give the head full access to EC2 and S3, workers nothing"
    disks = node.get("BlockDeviceMappings", [])
    if not disks or any(disk.get("Ebs", {}).get("Encrypted") is not True for disk in disks):
        yield f"{path}.BlockDeviceMappings: every disk needs Ebs.Encrypted: true"
    if node.get("MetadataOptions", {}).get("HttpTokens") != "required":
        yield f"{path}.MetadataOptions.HttpTokens: must be required, so that a redirected request cannot read the role"


def _azure_problems(provider: Mapping[str, Any]) -> Iterator[str]:
    why = "Ray opens SSH to everybody on Azure, so no node may have a public address"
    if not provider.get("use_internal_ips"):
        yield f"provider.use_internal_ips: must be true: {why}"
    if provider.get("use_external_head_ip"):
        yield f"provider.use_external_head_ip: must not be set: {why}"


def _gcp_problems(node: Mapping[str, Any], path: str) -> Iterator[str]:
    if not node.get("serviceAccounts"):
        yield f"{path}.serviceAccounts: missing; Ray would give the head compute.admin, objectAdmin, serviceAccountUser"
    for kind in ("accessConfigs", "ipv6AccessConfigs"):
        if any(kind in interface for interface in node.get("networkInterfaces", [])):
            yield f"{path}.networkInterfaces: {kind} gives the node a public address; leave it out"
    if not node.get("networkInterfaces"):
        yield f"{path}.networkInterfaces: missing, and Ray would give the node a public address"
