"""What a run's control takes of its head, by CPU time: the driver, Ray Train's controller, Ray's own processes.

The controller, its watch over the workers and the agreement between them are the real ones. The workers are not: they
train nothing, take no CPU and are all on this machine, but ask as often as real ones whether a node is about to go.
"""

from __future__ import annotations

import math
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import ray
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from scale_stream import cpu_seconds

from diffvit.training import saver

_PROCESSES = {
    "controller": "ray::TrainController",
    "agreement": "ray::SynchronizationActor",
    "GCS": "gcs/gcs_server",
    "raylet": "raylet/raylet",
}
"""By their titles; the driver is this process."""
_START_SECONDS = 600.0

Cores = Mapping[str, float]
"""CPU that each of the head's processes takes, as shares of a core."""


def control(workers: int, seconds: float) -> Cores:
    """Watch a run of so many workers for so many seconds. Ray must be running, with so many CPUs."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a worker cannot import what lies beside a script
    with tempfile.TemporaryDirectory() as folder:
        running = Path(folder, "running")
        trainer = DataParallelTrainer(
            _ask,
            train_loop_config={
                "running": str(running),
                "every": saver._POLL_SECONDS,
                "times": math.ceil(2 * seconds / saver._POLL_SECONDS) + 1,
            },
            scaling_config=ray.train.ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(name="control", storage_path=folder),
        )
        run = threading.Thread(target=trainer.fit)
        run.start()
        _wait_for(running.exists, run)
        time.sleep(saver._POLL_SECONDS)  # what starting left over
        began, before = time.monotonic(), _used()
        time.sleep(seconds)
        after, ended = _used(), time.monotonic()
        run.join()
    return {name: (after[name] - before[name]) / (ended - began) for name in after}


def _ask(config: Mapping[str, str | float]) -> None:
    for number in range(int(config["times"])):
        ray.train.get_preemption_info()  # all of them have come this far
        if number == 0 and ray.train.get_context().get_world_rank() == 0:
            Path(str(config["running"])).touch()
        time.sleep(float(config["every"]))


def _wait_for(happened: Callable[[], bool], run: threading.Thread) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not happened():
        if not run.is_alive() or time.monotonic() > deadline:
            raise RuntimeError("the workers did not start")
        time.sleep(0.1)


def _used() -> dict[str, float]:
    """CPU seconds so far."""
    return {"driver": time.process_time()} | {name: cpu_seconds(title) for name, title in _PROCESSES.items()}
