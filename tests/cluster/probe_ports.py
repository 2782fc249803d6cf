"""`probe_ports.py HOST PORT ...`: what each port does for somebody who has no token, as JSON.

served         requests that were answered
refused        requests that were turned away for want of a token
metrics_only   everything that was served is Prometheus' text of numbers, or a health check
closed         no connection at all
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from typing import Any

import grpc

PATHS = (
    "/", "/metrics", "/logs", "/nodes", "/api/jobs/", "/api/version", "/api/cluster_status", "/api/job_agent/jobs/",
    "/api/v0/nodes", "/api/packages/protocol/gcs/x.zip", "/get_or_create_runtime_env", "/api/local_raylet_healthz",
)  # fmt: skip
METHODS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.ActorInfoGcsService/GetAllActorInfo",
    "/ray.rpc.autoscaler.AutoscalerStateService/GetClusterStatus",
    "/ray.rpc.autoscaler.AutoscalerStateService/DrainNode",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.NodeManagerService/RequestWorkerLease",
    "/ray.rpc.NodeManagerService/ShutdownRaylet",
    "/ray.rpc.ObjectManagerService/Push",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/PushTask",
    "/ray.rpc.RayletDriver/Init",
    "/ray.rpc.RayletDriver/ClusterInfo",
    "/ray.rpc.ReporterService/GetTraceback",
    "/ray.rpc.LogService/ListLogs",
)


def probe(host: str, port: int) -> dict[str, Any]:
    served, refused, bodies, reached = [], [], [], False
    for path in PATHS:
        try:
            with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=3) as answer:
                served.append(path)
                bodies.append(answer.read(200))
                reached = True
        except urllib.error.HTTPError as error:
            reached = True
            if error.code in (401, 403):
                refused.append(path)
        except urllib.error.URLError:
            break
        except Exception:  # it speaks, but not HTTP
            reached = True
            break
    if reached and not served and not refused:
        with grpc.insecure_channel(f"{host}:{port}") as channel:
            for method in METHODS:
                try:
                    channel.unary_unary(method)(b"", timeout=3)
                    served.append(method)
                except grpc.RpcError as error:
                    if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                        refused.append(method)
                    elif error.code() != grpc.StatusCode.UNIMPLEMENTED:
                        served.append(f"{method}: {error.code()}")
    harmless = all(body.startswith((b"# HELP", b"success")) for body in bodies)
    return {
        "served": served,
        "refused": refused,
        "metrics_only": bool(served) and len(bodies) == len(served) and harmless,
        "closed": not reached,
    }


if __name__ == "__main__":
    print(json.dumps({port: probe(sys.argv[1], int(port)) for port in sys.argv[2:]}))
