"""Nodes without a GPU decode first; the CPUs beside the GPUs, where the work is submitted, do the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffvit.data.stream import _first_without_gpu

SCRIPT = """
import json, sys, time
import numpy as np
import ray
from ray.cluster_utils import Cluster
from diffvit.data.batches import Batch
from diffvit.data.order import EvalPlan
from diffvit.data import stream

class Loader:
    channels = image_size = 1
    plan = EvalPlan(20, 1)

    def __call__(self, row, into):
        time.sleep(0.25)
        node = ray.get_runtime_context().get_node_id()
        return Batch(row, into[:1], np.zeros(1, np.int64), (node,), np.array([row]))

if __name__ == "__main__":
    small = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 1, **small})
    data_node = cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20)
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()

    def decoded_by(cpus, rows):
        stream.ExecutionOptions = lambda **options: ray.data.ExecutionOptions(
            preserve_order=True, resource_limits=ray.data.ExecutionResources(cpu=cpus)
        )
        stream._CHUNK_IMAGES = 1
        (part,) = stream._split_chunks(Loader(), range(rows), 1)
        batches = [b for chunk in part.iter_batches(batch_size=None, batch_format="pyarrow")
                   for b in stream._unpack(chunk)]
        assert [batch.row for batch in batches] == list(range(rows))
        return [batch.skipped[0] for batch in batches]

    try:
        one, many = decoded_by(1, 6), decoded_by(6, 20)
        cluster.remove_node(data_node)
        while sum(node["Alive"] for node in ray.nodes()) > 1:
            time.sleep(0.1)
        print(json.dumps({"data_node": data_node.node_id, "one": one, "many": many, "left": decoded_by(1, 6)}))
    finally:
        ray.shutdown()
        cluster.shutdown()
"""


@pytest.mark.ray
def test_nodes_without_a_gpu_decode_first(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["one"]) == {found["data_node"]}  # which has room for all that is made at a time
    assert len(set(found["many"])) == 2
    assert found["data_node"] not in found["left"]


@pytest.mark.parametrize(
    ("nodes", "preferred"),
    [
        ([("a", 4, 1), ("b", 8, 0), ("c", 8, 0)], "in(b,c)"),
        ([("a", 4, 1), ("head", 0, 0)], None),
        ([("a", 4, 1), ("b", 4, 2)], None),
        ([("a", 4, 0), ("b", 4, 0)], None),
        ([], None),
    ],
)
def test_which_nodes_come_first(nodes: list[tuple[str, int, int]], preferred: str | None) -> None:
    described = [
        {"NodeID": name, "Alive": True, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}}
        for name, cpus, gpus in nodes
    ]
    gone = {"NodeID": "gone", "Alive": False, "Resources": {"CPU": 4.0}}
    options = _first_without_gpu([*described, gone])
    assert options.get("label_selector") == (preferred and {"ray.io/node-id": preferred})
