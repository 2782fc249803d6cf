"""The fields of KubeRay's RayCluster and RayJob that a cluster file may use.

Kept by hand from the CRDs of KubeRay 1.7 (`ray-operator/config/crd/bases`), because no Python package carries them;
pods are followed down to their containers' fields, no further.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffvit.cluster.provider_fields import unknown

_FIELDS: Mapping[str, Any] = {
    "RayCluster": {"apiVersion": None, "kind": None, "metadata": None, "spec": "ClusterSpec"},
    "RayJob": {"apiVersion": None, "kind": None, "metadata": None, "spec": "JobSpec"},
    "JobSpec": {
        "entrypoint": None, "runtimeEnvYAML": None, "submissionMode": None, "clusterSelector": None,
        "rayClusterSpec": "ClusterSpec", "shutdownAfterJobFinishes": None, "ttlSecondsAfterFinished": None,
        "activeDeadlineSeconds": None, "backoffLimit": None, "suspend": None,
    },
    "ClusterSpec": {
        "rayVersion": None, "authOptions": "AuthOptions", "tlsOptions": "TLSOptions", "networkPolicy": "NetworkPolicy",
        "enableInTreeAutoscaling": None, "autoscalerOptions": "AutoscalerOptions", "headGroupSpec": "HeadGroup",
        "workerGroupSpecs": ["WorkerGroup"], "suspend": None,
    },
    "AuthOptions": {"mode": None, "secretName": None, "enableK8sTokenAuth": None},
    "TLSOptions": {"enabled": None},
    "NetworkPolicy": {"mode": None, "head": "NetworkRules", "worker": "NetworkRules", "workerGroups": None},
    "NetworkRules": {"ingressRules": None, "egressRules": None},
    "AutoscalerOptions": {
        "version": None, "upscalingMode": None, "idleTimeoutSeconds": None, "resources": None, "image": None,
        "imagePullPolicy": None, "env": None, "envFrom": None, "volumeMounts": None, "securityContext": None,
    },
    "HeadGroup": {"rayStartParams": None, "template": "PodTemplate", "serviceType": None, "enableIngress": None},
    "WorkerGroup": {
        "groupName": None, "replicas": None, "minReplicas": None, "maxReplicas": None, "idleTimeoutSeconds": None,
        "numOfHosts": None, "priority": None, "rayStartParams": None, "template": "PodTemplate", "suspend": None,
    },
    "PodTemplate": {"metadata": None, "spec": "PodSpec"},
    "PodSpec": {
        "containers": ["Container"], "initContainers": ["Container"], "nodeSelector": None, "tolerations": None,
        "affinity": None, "serviceAccountName": None, "securityContext": None, "volumes": None,
        "imagePullSecrets": None,
        "terminationGracePeriodSeconds": None, "automountServiceAccountToken": None,
    },
    "Container": {
        "name": None, "image": None, "imagePullPolicy": None, "command": None, "args": None, "env": None,
        "envFrom": None, "ports": None, "resources": None, "volumeMounts": None, "securityContext": None,
        "lifecycle": None,
    },
}  # fmt: skip
"""KubeRay's types: field -> None (taken as it is), a type's name, or a list of that type."""


def kuberay_problems(document: Mapping[str, Any]) -> list[str]:
    """One line for each field that KubeRay would drop or refuse."""
    kind = document.get("kind", "")
    if kind not in ("RayCluster", "RayJob"):
        return [f"kind: must be RayCluster or RayJob, got {kind!r}"]
    return _typed_problems(document, kind, str(kind))


def _typed_problems(value: Any, type_name: str, path: str) -> list[str]:
    fields = _FIELDS[type_name]
    if not isinstance(value, dict):
        return [f"{path}: must be a mapping, got {value!r}"]
    problems = [unknown(f"{path}.{name}", name, fields) for name in value if name not in fields]
    for name, inner in value.items():
        kind = fields.get(name)
        if isinstance(kind, list):
            for number, item in enumerate(inner):
                problems += _typed_problems(item, kind[0], f"{path}.{name}[{number}]")
        elif kind:
            problems += _typed_problems(inner, kind, f"{path}.{name}")
    return problems
