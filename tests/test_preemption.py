"""A node that comes and is taken away with notice: the run grows, saves, and goes on with what is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import make_folder, with_fields

from diffvit.config import RunConfig, to_json

pytestmark = [pytest.mark.ray, pytest.mark.faults]

# a process of its own, because the other tests' Ray has one node
SCRIPT = """
import functools, json, subprocess, sys, threading, time
from pathlib import Path
import ray
import ray.train
from ray.cluster_utils import Cluster
from diffvit.config import from_json
from diffvit.training.launch import train

if __name__ == "__main__":
    config = from_json(Path(sys.argv[1]).read_text(), "test")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
    ray.init(address=cluster.address, log_to_driver=False)
    ray._private.utils.set_sigterm_handler = lambda _: None  # which the thread that adds a node may not set
    ray.train.ScalingConfig = functools.partial(ray.train.ScalingConfig, elastic_resize_monitor_interval_s=2)

    def workers():
        saved = sorted(config.folder.glob("checkpoint_step_*/checkpoint.json"))
        return json.loads(saved[-1].read_text())["metrics"]["world_sizes"][-1] if saved else 0

    def wait_for(count):
        while workers() != count:
            time.sleep(0.1)

    def come_and_go():
        wait_for(1)
        node = cluster.add_node(num_cpus=3)
        wait_for(2)
        subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address,
             "--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
             "--reason-message", "spot", "--deadline-remaining-seconds", "15"], check=True)

    threading.Thread(target=come_and_go, daemon=True).start()
    try:
        train(config)
    finally:
        ray.shutdown()
        cluster.shutdown()
"""


def test_a_node_that_comes_and_is_taken_away(tiny_config: RunConfig, tmp_path: Path) -> None:
    images = make_folder(tmp_path / "more", images_per_class=160, val_per_class=5)  # 40 steps an epoch
    config = with_fields(
        tiny_config,
        data={"path": str(images), "audit": True},
        model={"depth": 8},  # slow enough that the node goes before the run ends
        optim={"epochs": 15},
        checkpoint={"every_steps": 20},
        scale={"workers": (1, 2), "cpus_per_worker": 2.0, "max_failures": 0},
    )
    (tmp_path / "config.json").write_text(to_json(config))
    (tmp_path / "script.py").write_text(SCRIPT)
    log = tmp_path / "log"
    with log.open("w") as file:
        command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "config.json")]
        done = subprocess.run(command, stdout=file, stderr=file, check=False, timeout=600, env=os.environ)
    assert done.returncode == 0, log.read_text()[-3000:]
    results = json.loads((config.folder / "results.json").read_text())
    assert (results["status"], results["last"]["step"]) == ("finished", 600)
    assert results["world_sizes"] == [1, 2, 1]
    grown, taken = results["interruptions"]
    assert grown["why"] == "resized from 1 to 2 workers"
    # A failure would have ended the run: it counted as a preemption. Where the notice comes before the new group's
    # stream has its coordinator, which a node that is drained does not start any more, the ranks wait for batches and
    # do not hear of it; what they lose then is what came after the last checkpoint.
    assert taken["why"].startswith(("preempted", "worker"))
    assert taken["steps_repeated"] <= 20
    rows = pq.read_table(config.folder / "audit").to_pylist()
    seen = sorted((row["epoch"], row["position"]) for row in rows)
    assert seen == [(epoch, position) for epoch in range(1, 16) for position in range(480)]
