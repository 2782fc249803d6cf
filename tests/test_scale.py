"""The arithmetic of benchmarks/scale.py, against cases worked out by hand."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from diffvit.recipes import RECIPES

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_path() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def model() -> Any:
    return importlib.import_module("scale_model")


@pytest.fixture(scope="module")
def facts() -> Any:
    return importlib.import_module("scale_facts")


@pytest.fixture
def fleet(facts: Any) -> Any:
    """Nodes of two GPUs that train 100 images/s each, with five vCPUs and a gigabyte a second."""
    return facts.Fleet("big", 2, 5, 100.0, 8.0, 3.0, 0.1)


@pytest.fixture
def assumed(facts: Any) -> Any:
    return facts.Assumptions(
        v2_step_to_plain=1.19,
        stream_to_ceiling=0.68,
        stream_start_seconds=3.1,
        least_step_seconds=0.5,
        hop_seconds=0.01,
        overlap=0.25,
        vcpu_to_core=0.5,
        data_vcpus_per_node=3,
        data_dollars_per_hour=0.7,
        head_dollars_per_hour=0.5,
        node_extras_dollars_per_hour=0.1,
        s3_requests_per_second=10_000.0,
        dollars_per_s3_request=0.001,
        node_start_seconds=1200.0,
        lost_seconds=300.0,
        train_images=1010,
        val_images=600,
        epochs=9,
        batch_size=400,
    )


@pytest.fixture
def measured(facts: Any) -> Any:
    return facts.Measured(
        decode_images_per_core_second=100.0,
        gradient_bytes={"plain": 3_000_000_000, "V1": 3_000_000_000, "V2": 6_000_000_000},
        checkpoint_bytes=7,
        checkpoint_write_seconds=1.0,
        snapshot_seconds=0.5,
        stream_chunks_per_second=40.0,
        images_per_chunk=130,
        control_cores={
            4: {"driver": 0.02, "GCS": 0.1},
            8: {"driver": 0.05, "GCS": 0.1},
            24: {"driver": 0.12, "GCS": 0.2},
        },
    )


def test_control_goes_by_the_smallest_and_the_largest_group(model: Any, measured: Any) -> None:
    assert model.control_cores(24, measured) == {"driver": 0.12, "GCS": 0.2}
    assert model.control_cores(64, measured) == pytest.approx({"driver": 0.32, "GCS": 0.4})


def test_ring_allreduce(model: Any) -> None:
    # 4 nodes: each sends 2 x 3/4 of 600 bytes at 300 bytes/s, and there are 6 hops
    assert model.ring_allreduce_seconds(600, 4, 300, 0.125) == pytest.approx(3.0 + 0.75)
    assert model.ring_allreduce_seconds(600, 1, 300, 0.125) == 0


def test_a_step_and_what_it_is_made_of(model: Any, fleet: Any, assumed: Any, measured: Any) -> None:
    # one node: nothing to send. 400 images on 2 GPUs of 100 images/s
    assert model.step_of(2, "plain", fleet, assumed, measured) == model.Step(2.0, 0.0, 0.0)
    # 4 nodes, 50 images a GPU in 0.5 s; the ring takes 2 x 3 x (3 / 4 s + 0.01 s), of which 0.125 s hide
    step = model.step_of(8, "plain", fleet, assumed, measured)
    assert (step.compute_seconds, step.launch_seconds) == (0.5, 0.0)
    assert step.exposed_seconds == pytest.approx(4.56 - 0.125)
    assert step.seconds == pytest.approx(4.935)
    # 20 GPUs, 20 images each in 0.2 s: the rest up to 0.5 s is launching. The ring of 10 nodes takes 2 x 9 x 0.01 s, of
    # which a quarter of those 0.5 s hides
    light, no_hops = replace(measured, gradient_bytes={"plain": 100_000_000}), replace(assumed, hop_seconds=0)
    step = model.step_of(20, "plain", fleet, no_hops, light)
    assert (step.compute_seconds, step.launch_seconds, step.exposed_seconds) == pytest.approx((0.2, 0.3, 0.055))
    # V2's steps are 1.19 times as long, in compute and in launching
    v2 = model.step_of(20, "V2", fleet, assumed, replace(measured, gradient_bytes={"V2": 0}))
    assert (v2.compute_seconds, v2.launch_seconds) == pytest.approx((0.238, 0.357))


def test_chunks_hold_whole_micro_batches(model: Any, assumed: Any, measured: Any) -> None:
    assert model.chunk_images(8, assumed, measured) == 100  # two of 50, of 130 at most
    assert model.chunk_images(100, assumed, measured) == 128  # 32 of 4
    assert model.chunk_images(2, assumed, measured) == 130  # a share of 200 is taken in pieces


def test_what_binds(model: Any, fleet: Any, assumed: Any, measured: Any) -> None:
    def reason(gpus: int, a: Any = assumed, m: Any = measured) -> str:
        return str(model.bound_by(gpus, "plain", fleet, a, m))

    light = replace(measured, gradient_bytes={"plain": 0})
    no_hops = replace(assumed, hop_seconds=0.0)
    assert reason(2) == "GPU"
    assert reason(8) == "all-reduce"
    assert reason(40, no_hops, light) == "batch"  # 10 images in 0.1 s of 0.5
    # two nodes, 100 images a GPU in 1 s: at 0.583 GB, of which 0.25 s hide, a quarter of the step is exposed
    assert reason(4, no_hops, replace(measured, gradient_bytes={"plain": 570_000_000})) == "GPU"
    assert reason(4, no_hops, replace(measured, gradient_bytes={"plain": 600_000_000})) == "all-reduce"
    assert reason(2, replace(assumed, s3_requests_per_second=199)) == "S3"  # 2 GPUs take 200
    assert reason(2, replace(assumed, s3_requests_per_second=201)) == "GPU"
    assert reason(2, m=replace(measured, stream_chunks_per_second=1.5)) == "coordinator"  # of 130 images: 195
    assert reason(2, m=replace(measured, stream_chunks_per_second=1.6)) == "GPU"


def test_data_nodes_decode_what_the_gpu_nodes_cannot(model: Any, fleet: Any, assumed: Any, measured: Any) -> None:
    # a vCPU decodes 34 images/s; two GPU nodes have 2 x (5 - 2) = 6 for it, a data node has 3
    assert model.data_nodes(204.0, 2, fleet, assumed, measured) == 0
    assert model.data_nodes(205.0, 2, fleet, assumed, measured) == 1
    assert model.data_nodes(204.0 + 3 * 34 + 1, 2, fleet, assumed, measured) == 2


def test_an_epoch(model: Any, assumed: Any, measured: Any) -> None:
    # 2 steps of 400 and a third of 600, at 100 images/s; two streams of 3.1 s; 0.5 s for the copy
    assert model.epoch_seconds(100.0, assumed, measured) == pytest.approx(10.0 + 6.2 + 0.5)
    assert model.epoch_seconds(100.0, assumed, replace(measured, checkpoint_write_seconds=20.0)) == 20.0


def test_interruptions(model: Any, fleet: Any, assumed: Any) -> None:
    assert model.interruption_seconds(1, assumed) == 1500  # 300 to start again, after 1,200 for another node
    assert model.interruption_seconds(3, assumed) == 1200  # half of the 1,200, and two starts
    # one node lost in ten node-hours: with three, 0.3 an hour of 1,200 s each
    assert model.useful_share(3, fleet, assumed) == pytest.approx(0.9)
    assert model.useful_share(40, fleet, assumed) == 0


def test_a_whole_run(model: Any, fleet: Any, assumed: Any, measured: Any) -> None:
    """2 GPUs of one node: 200 images/s, of which its own three vCPUs decode 102 and one data node the others."""
    run = model.predict(2, "plain", fleet, assumed, measured)
    assert (run.gpus, run.images_per_second, run.bound_by, run.data_nodes) == (2, 200.0, "GPU", 1)
    # an epoch is 1,000 / 200 + 6.7 s; an interruption of 1,500 s every ten hours leaves 1 - 150 / 3600
    seconds = 1200 + 9 * 11.7 / (1 - 150 / 3600)
    assert run.hours == pytest.approx(seconds / 3600)
    # head 0.5, GPU node 3, data node 0.7, three disks; 9 x 1,610 images asked for
    assert run.dollars == pytest.approx(run.hours * (0.5 + 3.0 + 0.7 + 0.3) + 14.49)


def test_what_never_ends_and_what_waits_for_its_checkpoint(model: Any, fleet: Any, assumed: Any, measured: Any) -> None:
    never = model.predict(80, "plain", fleet, assumed, measured)
    assert (never.hours, never.dollars, never.bound_by) == (math.inf, math.inf, "interruptions")
    slow = model.predict(2, "plain", fleet, assumed, replace(measured, checkpoint_write_seconds=60.0))
    assert slow.bound_by == "checkpoint"


def test_where_it_stops_scaling(model: Any) -> None:
    def run(gpus: int, hours: float) -> Any:
        return model.Prediction(gpus, 1.0, "all-reduce", 0, hours, 1.0)

    assert model.stops_at([run(1, 9.0), run(2, 6.0)]) == "still scales at 2 GPUs"
    said = model.stops_at([run(1, 9.0), run(2, 6.0), run(4, 5.0), run(8, 1.0)])
    assert said == "scales to 2 GPUs: 4 are 1.20 x as fast, bound by all-reduce"


def test_the_facts_are_those_of_the_recipe_and_of_the_cluster_file(facts: Any) -> None:
    assumed, recipe = facts.Assumptions(), RECIPES["imagenet-s16-90ep"]()
    assert (assumed.epochs, assumed.batch_size) == (recipe.optim.epochs, recipe.optim.batch_size)
    nodes = yaml.safe_load((BENCHMARKS.parent / "cluster/aws.yaml").read_text())["available_node_types"]
    assert nodes["gpu_spot"]["node_config"]["InstanceType"] == assumed.gpu.name
    assert nodes["gpu_spot"]["resources"] == {"CPU": assumed.gpu.vcpus_per_node, "GPU": assumed.gpu.gpus_per_node}
    assert nodes["cpu_spot"]["resources"] == {"CPU": assumed.data_vcpus_per_node}


def test_mean_at_once() -> None:
    mean_at_once = importlib.import_module("scale_stream").mean_at_once
    # of the four seconds from 2: one span holds all, one the first half second, one the last, two none
    assert mean_at_once([(0, 9), (1, 2.5), (5, 7), (0, 1), (6, 8)], 2, 6) == pytest.approx((4 + 0.5 + 1) / 4)


def test_the_plot(model: Any, tmp_path: Path) -> None:
    draw = importlib.import_module("scale_plot").draw
    runs = [model.Prediction(gpus, 300.0 * gpus, "GPU", 0, 99 / gpus, 42.0) for gpus in (1, 2, 4)]
    runs.append(model.Prediction(8, 2000.0, "interruptions", 0, math.inf, math.inf))
    draw(tmp_path / "scale.png", {"plain": runs, "V1": runs}, {"S3": 5500.0})
    assert (tmp_path / "scale.png").stat().st_size < 60_000
    with Image.open(tmp_path / "scale.png") as picture:
        assert picture.size == (900, 370)
