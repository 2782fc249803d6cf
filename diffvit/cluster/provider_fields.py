"""What a cloud's own API takes, for the parts of a cluster file that Ray's schema lets pass: `provider`, `node_config`.

AWS     botocore's model of RunInstances (comes with boto3)
GCP     Compute Engine's discovery document (comes with google-api-python-client)
Azure   the parameters of Ray's own deployment template (comes with Ray)
Each check gives one line per problem, with the path of the field.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

_PROVIDER_FIELDS = {
    "aws": (
        "type", "region", "availability_zone", "use_internal_ips", "use_external_head_ip", "cache_stopped_nodes",
        "key_pair", "security_group", "aws_credentials", "cloudwatch",
    ),
    "gcp": (
        "type", "region", "availability_zone", "project_id", "use_internal_ips", "use_external_head_ip",
        "cache_stopped_nodes", "gcp_credentials",
    ),
    "azure": (
        "type", "location", "resource_group", "subscription_id", "tags", "availability_zone", "use_internal_ips",
        "use_external_head_ip", "cache_stopped_nodes", "unique_id", "subnet_mask", "msi_name", "msi_resource_group",
    ),
    "local": ("type", "head_ip", "worker_ips", "external_head_ip", "coordinator_address"),
}  # fmt: skip
"""What Ray 2.60's providers read, found in `ray/autoscaler/_private/<provider>/`."""

_AWS_SET_BY_RAY = {"MinCount": 1, "MaxCount": 1}
_AZURE_SET_BY_RAY = {
    "vmName", "adminUsername", "publicKey", "vmTags", "vmCount", "provisionPublicIp", "msi", "nsg", "subnet", "zones",
}  # fmt: skip
_AZURE_READ_BY_RAY: Mapping[str, Mapping[str, str]] = {"availability_zone": {}}
_AZURE_CHOICES = {"priority": ("Regular", "Low", "Spot"), "evictionPolicy": ("Deallocate", "Delete")}
"""Of the virtual machines' API; Ray's template passes any text on."""


def provider_problems(provider: Mapping[str, Any]) -> list[str]:
    known = _PROVIDER_FIELDS[provider["type"]]
    return [unknown(f"provider.{name}", name, known) for name in provider if name not in known]


def node_problems(cloud: str, node_config: Mapping[str, Any], path: str) -> list[str]:
    """What the API of `cloud` would not take of a `node_config` that stands at `path`."""
    if cloud == "aws":
        return _aws_problems(node_config, path)
    if cloud == "gcp":
        return _gcp_problems(node_config, "Instance", path)
    return _azure_problems(node_config, path) if cloud == "azure" else []


def _aws_problems(node_config: Mapping[str, Any], path: str) -> list[str]:
    from botocore.validate import ParamValidator

    asked = dict(node_config)
    subnets = asked.pop("SubnetIds", [])  # Ray's own: it picks one of them
    if not isinstance(subnets, list):
        return [f"{path}.SubnetIds: must be a list, got {subnets!r}: write [{subnets}]"]
    shape = _run_instances_shape()
    report = ParamValidator().validate({**_AWS_SET_BY_RAY, **asked, "SubnetId": (subnets or [""])[0]}, shape)
    problems = [f"{path}: {line}" for line in report.generate_report().splitlines()]
    return problems + _enum_problems(asked, shape, path)


def _enum_problems(value: Any, shape: Any, path: str) -> list[str]:
    """The choices, because botocore checks names and types only."""
    if shape.type_name == "structure" and isinstance(value, dict):
        return [
            problem
            for name, inner in value.items()
            if name in shape.members
            for problem in _enum_problems(inner, shape.members[name], f"{path}.{name}")
        ]
    if shape.type_name == "list" and isinstance(value, list):
        return [
            problem
            for number, inner in enumerate(value)
            for problem in _enum_problems(inner, shape.member, f"{path}[{number}]")
        ]
    choices = getattr(shape, "enum", None) or []
    return [unknown(path, str(value), choices)] if choices and value not in choices else []


@lru_cache
def _run_instances_shape() -> Any:
    import botocore.session

    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _gcp_problems(value: Any, schema_name: str, path: str) -> list[str]:
    fields = _compute_schemas()[schema_name]["properties"]
    problems = [unknown(f"{path}.{name}", name, fields) for name in value if name not in fields]
    for name, inner in value.items():
        if name in fields:
            problems += _gcp_value_problems(inner, fields[name], f"{path}.{name}")
    return problems


_JSON_TYPES = {"string": str, "boolean": bool, "integer": int, "array": list, "object": dict}
_AZURE_TYPES = {"string": str, "bool": bool, "int": int, "array": list, "object": dict}


def _gcp_value_problems(value: Any, schema: Mapping[str, Any], path: str) -> list[str]:
    if "$ref" in schema:
        if not isinstance(value, dict):
            return [f"{path}: must be a mapping, got {value!r}"]
        return _gcp_problems(value, schema["$ref"], path)
    kind = schema.get("type")
    if kind == "string" and schema.get("format") == "int64" and isinstance(value, int):
        return []  # the API writes 64-bit numbers as strings and takes both
    if kind in _JSON_TYPES and not is_a(value, _JSON_TYPES[kind]):
        return [f"{path}: must be of type {kind}, got {value!r}"]
    if kind == "array":
        return [
            problem
            for number, item in enumerate(value)
            for problem in _gcp_value_problems(item, schema["items"], f"{path}[{number}]")
        ]
    choices = schema.get("enum", [])
    return [unknown(path, value, choices)] if choices and value not in choices else []


@lru_cache
def _compute_schemas() -> dict[str, Any]:
    import googleapiclient

    document = Path(googleapiclient.__file__).parent / "discovery_cache/documents/compute.v1.json"
    schemas: dict[str, Any] = json.loads(document.read_bytes())["schemas"]
    return schemas


def _azure_problems(node_config: Mapping[str, Any], path: str) -> list[str]:
    import ray.autoscaler._private as private

    template = json.loads((Path(private.__file__).parent / "_azure/azure-vm-template.json").read_bytes())
    known = {name: kind for name, kind in template["parameters"].items() if name not in _AZURE_SET_BY_RAY}
    known |= _AZURE_READ_BY_RAY
    if list(node_config) != ["azure_arm_parameters"]:
        return [unknown(f"{path}.{name}", name, ["azure_arm_parameters"]) for name in node_config]
    path = f"{path}.azure_arm_parameters"
    if not isinstance(node_config["azure_arm_parameters"], dict):
        return [f"{path}: must be a mapping, got {node_config['azure_arm_parameters']!r}"]
    problems = []
    for name, value in node_config["azure_arm_parameters"].items():
        kind = _AZURE_TYPES.get(known.get(name, {}).get("type", ""))
        choices = _AZURE_CHOICES.get(name)
        if name not in known:
            problems.append(unknown(f"{path}.{name}", name, known))
        elif kind and not is_a(value, kind):
            problems.append(f"{path}.{name}: must be of type {known[name]['type']}, got {value!r}")
        elif choices and value not in choices:
            problems.append(unknown(f"{path}.{name}", value, choices))
    return problems


def is_a(value: Any, kind: type) -> bool:
    """A bool is an int to Python, but not to an API."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def unknown(path: str, value: str, known: Iterable[str]) -> str:
    """The line for a name that none of `known` is."""
    near = difflib.get_close_matches(value, list(known), n=1)
    return f"{path}: unknown; " + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}")
