"""From a config to a trained run on a Ray cluster. The only place that builds a trainer."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray
import ray.train
from ray.train import TrainingFailedError, UserCallback
from ray.train.torch import TorchConfig
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diffvit.config import RunConfig, ScaleConfig, to_json
from diffvit.console import Console
from diffvit.data.datasets import Dataset, open_dataset
from diffvit.data.fingerprint import fingerprint_of
from diffvit.data.loader import plan_run
from diffvit.data.order import TrainPlan
from diffvit.scratch import scratch_folder
from diffvit.storage import Storage
from diffvit.training.cluster import enter_cluster
from diffvit.training.compilation import require_compiler
from diffvit.training.elastic import FittingTrainer
from diffvit.training.group import join_group
from diffvit.training.logbook import Logbook
from diffvit.training.loop import RunStopped, fit
from diffvit.training.resolve import require_weights, resolve
from diffvit.training.run_folder import CONFIG_NAME, begun, close_run, not_the_same_folder, open_run
from diffvit.training.run_lock import RunLock

__all__ = [
    "RunStopped",
    "TrainingFailedError",
    "train",
    "train_group",
    "work_on_group",
]

Work = Callable[[dict[str, Any]], Any]
"""What each worker of a group calls, with what `join_group` takes."""

_RAYS_COPY = "/runtime_resources/working_dir_files/"
_LOST_ANOTHER = ("connection", "gloo", "nccl", "peer")
"""Words in the errors of those who wait for a worker that is gone."""
_RAISED = re.compile(r"[\w.]*(Error|Exception)\b.*: ")
"""The line of a traceback that names the error."""


def train(config: RunConfig) -> dict[str, Any]:
    """Train, or continue, the run that `config` describes; its results, which are also in `results.json`.

    Raises:
        ValueError: data, storage, name or cluster do not fit the config, or there is no compiler for scale.compile;
            found before anything expensive starts.
        RunStopped: the run cannot go on.
        ray.train.TrainingFailedError: workers were lost more often than `scale.max_failures` allows.
        KeyboardInterrupt: the user ended the run; the same call continues it.
    """
    started = time.monotonic()
    require_compiler(config.scale)
    dataset = open_dataset(config.data)
    earlier = begun(config)
    if earlier is not None and config.init.weights and not config.data.mean:  # as these said, which may be gone
        with suppress(ValueError):  # of a run with other channels, which is refused below
            told = dataclasses.replace(config.data, mean=earlier.data.mean, std=earlier.data.std)
            config = dataclasses.replace(config, data=told)
    config = resolve(config, dataset)
    train_plan, _ = plan_run(config, dataset, config.worker_counts[-1])
    if earlier is None:
        require_weights(config)  # a run that goes on needs them no more
    if _RAYS_COPY in config.location:
        print(f"warning: Ray deletes {config.location}, in the job's copy of its folder; give --storage another place")
    with RunLock(config.location):
        results = open_run(config, fingerprint_of(dataset))
        if results is not None and results["status"] == "finished":
            return results
        return _train(config, dataset, train_plan, started)


def _train(config: RunConfig, dataset: Dataset, train_plan: TrainPlan, started: float) -> dict[str, Any]:
    enter_cluster(config, print)
    # on this node, and so not lost with another
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    progress = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    status, reason = "failed", None
    stop: RunStopped | None = None
    try:
        with Console(config, dataset, train_plan, progress), _kept_by_ray(config) as folder:
            stop = _trainer(config, dataset, progress, folder).fit().return_value
        status, reason = ("finished", None) if stop is None else ("stopped", str(stop))
    except (SystemExit, KeyboardInterrupt):  # the first is Ray Train's answer to Ctrl-C, once its workers are gone
        status, reason = "interrupted", "interrupted by the user"
        raise KeyboardInterrupt from None
    except TrainingFailedError as error:
        reason = _cause_first(error, config.scale)
        raise TrainingFailedError(reason) from error
    finally:
        progress.shutdown(force=True)
        results = close_run(config, status, reason, started)
    if stop is not None:
        raise stop
    return results


def _cause_first(error: TrainingFailedError, scale: ScaleConfig) -> str:
    """Ray's account of a failure; its first line says the cause, and how to go on."""
    failures = getattr(error, "worker_failures", None)
    cause = _cause(failures)[1] if failures else str(error).strip().splitlines()[-1]
    return (
        f"training failed: {cause}; the same command goes on from the last checkpoint (scale.max_failures = "
        f"{scale.max_failures}, scale.max_preemptions = {scale.max_preemptions})\n{str(error).strip()}"
    )


def _cause(failures: Mapping[int, Exception]) -> tuple[int, str]:
    """Rank and error, in a line, of a worker that failed itself and did not only lose another one, if there is any.

    First of all of one whose node was taken away: NCCL ends the processes of the others, which then look the same.
    """

    def likeliest(rank: int) -> tuple[bool, bool]:
        error = failures[rank]  # of a worker that died, Ray's account has these words too
        died = getattr(error, "health_check_failure", None)
        lost_another = died is None and any(word in str(error).lower() for word in _LOST_ANOTHER)
        return not getattr(died, "preempted", False), lost_another

    rank = min(failures, key=likeliest)
    error = getattr(failures[rank], "health_check_failure", failures[rank])
    lines = str(error).strip().splitlines() or [""]
    return rank, next((x for x in reversed(lines) if _RAISED.match(x)), f"{type(error).__name__}: {lines[0]}")


def train_group(config: RunConfig, dataset: Dataset, callbacks: list[UserCallback]) -> None:
    """Train as part of something larger, such as a Tune trial: `callbacks` hear what the workers report.

    Raises:
        RunStopped: the run cannot go on.
        ray.train.TrainingFailedError: workers were lost more often than `scale.max_failures` allows.
    """
    with _kept_by_ray(config) as folder:
        stop: RunStopped | None = _trainer(config, dataset, None, folder, callbacks).fit().return_value
    if stop is not None:
        raise stop


def work_on_group(config: RunConfig, dataset: Dataset, work: Work) -> Any:
    """What rank 0 returns of `work`, which the workers of the run do instead of training.

    Raises:
        ray.train.TrainingFailedError: as `train_group`.
    """
    with _kept_by_ray(config) as folder:
        return _trainer(config, dataset, None, folder, work=work).fit().return_value


@contextmanager
def _kept_by_ray(config: RunConfig) -> Iterator[str]:
    """Ray Train's `storage_path`.

    It keeps checkpoints there, of which it gets none from us. All that is left is a marker that its controller writes
    when it starts, and the controller runs on the node of this process. So a folder of this machine will do where the
    run itself is in an object store: there the marker would only be one more write that an outage can fail.
    """
    if not config.is_remote:
        yield config.storage
        return
    with scratch_folder() as folder:
        yield str(folder)


def _trainer(
    config: RunConfig,
    dataset: Dataset,
    progress: Queue | None,
    kept_by_ray: str,
    callbacks: list[UserCallback] | None = None,
    work: Work | None = None,
) -> FittingTrainer:
    return FittingTrainer(
        config.worker_counts,
        config.location,
        work or _train_worker,
        train_loop_config={
            "config": to_json(config),
            "dataset": ray.put(dataset),
            "progress": progress,
            "opened": Storage(config.location).size(CONFIG_NAME) is not None,
        },
        torch_config=TorchConfig(backend="nccl" if config.scale.gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.scale.workers,
            use_gpu=config.scale.gpu,
            resources_per_worker=config.scale.worker_resources,
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=kept_by_ray,
            failure_config=ray.train.FailureConfig(
                max_failures=config.scale.max_failures, max_preemption_failures=config.scale.max_preemptions
            ),
            callbacks=[_SayWhy(config.location), *(callbacks or [])],
        ),
    )


class _SayWhy(ray.train.UserCallback):  # type: ignore[misc]
    """Tells the run's logbook, from Ray Train's controller, why its workers are started again."""

    def __init__(self, run: str) -> None:
        self._run = run

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        rank, cause = _cause(worker_exceptions)
        Logbook(self._run).cut(f"worker {rank} was lost: {cause}")


def _train_worker(job: dict[str, Any]) -> RunStopped | None:
    """What Ray Train runs on every worker.

    Why the run stopped is returned and not raised, because Ray Train would start the worker group again.
    """
    group = join_group(job)
    problem = group.worker.agree(not_the_same_folder(group.config) if job["opened"] and not group.worker.rank else None)
    if problem is not None:
        return RunStopped(problem)
    try:
        fit(group.config, group.train_plan, group.eval_plan, group.stream, group.worker)
    except RunStopped as stop:
        return stop
    finally:
        group.notes.close()
    return None
