"""prepare and predict on two nodes of one machine: the same bytes and predictions as on one, everything once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import make_folder, with_fields, write_untrained

from diffvit import predict as predict_module
from diffvit.config import PredictConfig, PrepareConfig, RunConfig
from diffvit.data.prepare import prepare
from diffvit.predict import predict

PART_IMAGES = 7
SHARD_MIB = 0.005
SCRIPT = """
import json, runpy, sys, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from diffvit import predict
from diffvit.data import prepare

jobs, folder, part_images, shard_mib = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
pack_shard, load_part, Predictor = prepare.pack_shard, predict.load_part, predict.Predictor

def noted(what, work, *arguments):
    with (folder / "nodes").open("a") as file:
        file.write(f"{what} {ray.get_runtime_context().get_node_id()}\\n")
    for _ in range(600):  # of 0.05 s, so that one node cannot do all of it
        lines = (folder / "nodes").read_text().splitlines()
        if len({line for line in lines if line.startswith(what)}) > 1:
            break
        time.sleep(0.05)
    return work(*arguments)

class NotedPredictor(Predictor):
    def __call__(self, row):
        return noted("predict", super().__call__, row)

def run(job, **options):
    sys.argv = [job, *(word for name, value in options.items() for word in (f"--{name}", str(folder / value)))]
    sys.argv += {"prepare": ["--shard-mib", shard_mib], "predict": ["--workers", "2"]}[job]
    runpy.run_path(str(jobs / f"{job}.py"), run_name="__main__")

if __name__ == "__main__":
    small = {"num_cpus": 2, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    cluster.add_node(**small)
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    prepare.pack_shard = lambda *arguments: noted("pack", pack_shard, *arguments)
    predict.load_part = lambda *arguments: noted("load", load_part, *arguments)
    predict.Predictor, predict._PART_IMAGES = NotedPredictor, part_images
    try:
        run("prepare", source="pictures", out="shards")
        run("predict", checkpoint="checkpoint", images="pictures", out="predictions")
    finally:
        ray.shutdown()
        cluster.shutdown()
"""


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def end_session(leader: int) -> None:
    """End what is left of it: now and then a worker of Ray's hangs in the last lines of its own end."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getsid(int(process.name)) == leader:
                os.kill(int(process.name), signal.SIGKILL)


@pytest.fixture
def broken(tmp_path: Path) -> list[str]:
    """Keys of what is no image among the 54 that are in the folder `pictures`."""
    make_folder(tmp_path / "pictures", images_per_class=18)
    whole = (tmp_path / "pictures/red/000.png").read_bytes()
    contents = {"blue/a.png": b"", "blue/b.png": whole[:300], "green/c.jpg": b"<html>", "red/d.png": whole[:-40]}
    for name, content in contents.items():
        (tmp_path / "pictures" / name).write_bytes(content)
    (tmp_path / "pictures/red/e.png").symlink_to("nowhere")
    return sorted([*contents, "red/e.png"])


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_two_nodes_do_what_one_does(
    tiny_config: RunConfig, tmp_path: Path, broken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_fields(tiny_config, model={"num_classes": 3}, data={"classes": ("blue", "green", "red")})
    write_untrained(config, tmp_path / "checkpoint")
    (tmp_path / "script.py").write_text(SCRIPT)
    jobs = Path(__file__).parents[1] / "ray_jobs"
    command = [sys.executable, str(tmp_path / "script.py"), str(jobs), str(tmp_path), str(PART_IMAGES), str(SHARD_MIB)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as script:
        try:
            _, errors = script.communicate(timeout=400)
        finally:
            end_session(script.pid)
    assert script.returncode == 0, errors[-3000:]
    noted = [line.split() for line in (tmp_path / "nodes").read_text().splitlines()]
    nodes = {what: [node for name, node in noted if name == what] for what in ("pack", "load", "predict")}
    assert {what: len(set(names)) for what, names in nodes.items()} == {"pack": 2, "load": 2, "predict": 2}
    assert len(nodes["load"]) == len(nodes["predict"]) == 9  # ceil(59 / 7): nothing was done twice

    source = str(tmp_path / "pictures")
    prepare(PrepareConfig(source=source, out=str(tmp_path / "alone"), shard_mib=SHARD_MIB), lambda *_: None)
    shards = files_of(tmp_path / "shards")
    assert shards == files_of(tmp_path / "alone")
    assert json.loads(shards["dataset.json"])["quarantined"] == 5
    assert sum(name.startswith("train/") for name in shards) > 4
    quarantined = pq.read_table(tmp_path / "shards/quarantine.parquet")["key"].to_pylist()
    assert sorted(quarantined) == broken

    monkeypatch.setattr(predict_module, "_PART_IMAGES", PART_IMAGES)
    alone = PredictConfig(checkpoint=str(tmp_path / "checkpoint"), images=source, out=str(tmp_path / "predicted alone"))
    predict(alone, lambda *_: None)
    ours, theirs = (
        sorted(pq.read_table(folder / "predictions").to_pylist(), key=lambda row: row["key"])
        for folder in (tmp_path / "predictions", tmp_path / "predicted alone")
    )
    assert ours == theirs
    keys = [str(path.relative_to(source)) for path in Path(source).glob("*/*")]
    assert [row["key"] for row in ours] == sorted(keys)
    assert [row["key"] for row in ours if row["predicted"] is None] == broken
