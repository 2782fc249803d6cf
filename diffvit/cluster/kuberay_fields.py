"""The fields of KubeRay's RayCluster and RayJob that a cluster file may use.

Kept by hand from the CRDs of KubeRay 1.7 (`ray-operator/config/crd/bases`), because no Python package carries them;
pods are followed down to their containers' fields, no further.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffvit.cluster.provider_fields import is_a, unknown

_Strings = Mapping[str, str]
_PULL = ("Always", "IfNotPresent", "Never")
_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "RayCluster": {"apiVersion": str, "kind": str, "metadata": dict, "spec": "ClusterSpec"},
    "RayJob": {"apiVersion": str, "kind": str, "metadata": dict, "spec": "JobSpec"},
    "JobSpec": {
        "entrypoint": str, "runtimeEnvYAML": str, "clusterSelector": _Strings, "rayClusterSpec": "ClusterSpec",
        "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        "shutdownAfterJobFinishes": bool, "ttlSecondsAfterFinished": int, "activeDeadlineSeconds": int,
        "backoffLimit": int, "suspend": bool,
    },
    "ClusterSpec": {
        "rayVersion": str, "authOptions": "AuthOptions", "tlsOptions": "TLSOptions", "networkPolicy": "NetworkPolicy",
        "enableInTreeAutoscaling": bool, "autoscalerOptions": "AutoscalerOptions", "headGroupSpec": "HeadGroup",
        "workerGroupSpecs": ["WorkerGroup"], "suspend": bool,
    },
    "AuthOptions": {"mode": ("disabled", "token"), "secretName": str, "enableK8sTokenAuth": bool},
    "TLSOptions": {"enabled": bool},
    "NetworkPolicy": {
        "mode": ("DenyAll", "DenyAllEgress", "DenyAllIngress"), "head": "NetworkRules", "worker": "NetworkRules",
        "workerGroups": [dict],
    },
    "NetworkRules": {"ingressRules": [dict], "egressRules": [dict]},
    "AutoscalerOptions": {
        "version": ("v1", "v2"), "upscalingMode": ("Default", "Aggressive", "Conservative"), "idleTimeoutSeconds": int,
        "resources": dict, "image": str, "imagePullPolicy": _PULL, "env": [dict], "envFrom": [dict],
        "volumeMounts": [dict], "securityContext": dict,
    },
    "HeadGroup": {
        "rayStartParams": _Strings, "template": "PodTemplate", "enableIngress": bool,
        "serviceType": ("ClusterIP", "NodePort", "LoadBalancer"),
    },
    "WorkerGroup": {
        "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, "idleTimeoutSeconds": int,
        "numOfHosts": int, "priority": int, "rayStartParams": _Strings, "template": "PodTemplate", "suspend": bool,
    },
    "PodTemplate": {"metadata": dict, "spec": "PodSpec"},
    "PodSpec": {
        "containers": ["Container"], "initContainers": ["Container"], "nodeSelector": _Strings, "tolerations": [dict],
        "affinity": dict, "serviceAccountName": str, "securityContext": dict, "volumes": [dict],
        "imagePullSecrets": [dict], "terminationGracePeriodSeconds": int, "automountServiceAccountToken": bool,
    },
    "Container": {
        "name": str, "image": str, "imagePullPolicy": _PULL, "command": [str], "args": [str], "env": [dict],
        "envFrom": [dict], "ports": [dict], "resources": dict, "volumeMounts": [dict], "securityContext": dict,
        "lifecycle": dict,
    },
}  # fmt: skip
"""KubeRay's types, and of each field: a Python type, a type's name, a tuple of choices, or a list of one of these."""

_REQUIRED = {
    "RayCluster": ("metadata", "spec"), "RayJob": ("metadata", "spec"), "JobSpec": ("entrypoint",),
    "ClusterSpec": ("headGroupSpec",), "HeadGroup": ("template",), "WorkerGroup": ("groupName", "template"),
    "PodTemplate": ("spec",), "PodSpec": ("containers",), "Container": ("name", "image"),
}  # fmt: skip
_CALLED = {str: "text", bool: "true or false", int: "a whole number", dict: "a mapping"}


def kuberay_problems(document: Any) -> list[str]:
    """One line for each field that KubeRay would drop or refuse."""
    kind = document.get("kind", "") if isinstance(document, dict) else document
    if kind not in ("RayCluster", "RayJob"):
        return [f"kind: must be RayCluster or RayJob, got {kind!r}"]
    return _problems(document, kind, str(kind))


def _problems(value: Any, kind: Any, path: str) -> list[str]:
    """Of a value that should be of this kind, in the words of `_FIELDS`."""
    if isinstance(kind, tuple):
        return [] if value in kind else [unknown(path, str(value), kind)]
    if kind is _Strings:
        if not isinstance(value, dict):
            return [f"{path}: must be a mapping, got {value!r}"]
        return [
            f"{path}.{name}: must be text, got {inner!r}: put it in quotes"
            for name, inner in value.items()
            if not isinstance(inner, str)
        ]
    if isinstance(kind, list):
        if not isinstance(value, list):
            return [f"{path}: must be a list, got {value!r}"]
        return [line for number, item in enumerate(value) for line in _problems(item, kind[0], f"{path}[{number}]")]
    if isinstance(kind, str):
        return _mapping_problems(value, kind, path)
    return [] if is_a(value, kind) else [f"{path}: must be {_CALLED[kind]}, got {value!r}"]


def _mapping_problems(value: Any, type_name: str, path: str) -> list[str]:
    fields = _FIELDS[type_name]
    if not isinstance(value, dict):
        return [f"{path}: must be a mapping, got {value!r}"]
    problems = [f"{path}.{name}: is missing" for name in _REQUIRED.get(type_name, ()) if name not in value]
    for name, inner in value.items():
        if name in fields:
            problems += _problems(inner, fields[name], f"{path}.{name}")
        else:
            problems.append(unknown(f"{path}.{name}", str(name), fields))
    return problems
