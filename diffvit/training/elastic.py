"""What Ray Train decides otherwise here: with how many workers a run goes on, and what counts as a preemption.

The numbers of workers that it may pick are those that divide the global batch, and no others.

Ray Train's elastic policy takes whatever number the cluster has room for. This one steps down to the next that the run
can have, and looks at the nodes of now: Ray's own goes by those of up to 20 seconds ago and by nodes that are about to
go, starts workers there, and finds out when that times out after a minute. Nor does it take workers from a group that
runs: one whose node is about to go first writes its checkpoint, and ends by itself. And it makes a group larger only
just after a checkpoint was written, since all that came after the last one is done again.

Both policies are put in where the trainer hands its own to the controller, because Ray 2.60 has no option for them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import ray
from ray.train import PreemptionInfo, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError

from diffvit.training.checkpoint_store import newest_written


class FittingPolicy(ElasticScalingPolicy):  # type: ignore[misc]
    """As many workers of `counts` as there is room for; fewer than there are only once their group has ended.

    `newest` names the newest checkpoint, None where it cannot be told.
    """

    def __init__(self, scaling_config: Any, counts: tuple[int, ...], newest: Callable[[], str | None]) -> None:
        super().__init__(scaling_config)
        self._counts, self._newest = counts, newest
        self._grows_after: str | None = None
        self._waits = False

    def _get_reserved_resources(self) -> Any:
        with suppress(ray.exceptions.RayError):  # then the one before has to do
            coordinator = self._autoscaling_coordinator
            ray.get(coordinator.get_reserved_resources.remote(self._requester_id, recompute=True), timeout=5)
        return super()._get_reserved_resources()

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        staying = _staying_nodes()
        room = {node: resources for node, resources in reserved_resources.items() if node in staying}
        return largest_fitting(super()._count_possible_workers(room), self._counts)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        saved = False
        if self._waits:
            newest = self._newest()
            saved = newest not in (None, self._grows_after)
            if not saved:
                return NoopDecision()
            self._latest_monitor_time = float("-inf")  # look at the nodes of now
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        grows = isinstance(decision, ResizeDecision) and decision.num_workers > worker_group_state.num_workers
        self._waits = grows and not saved
        if self._waits:
            self._grows_after = self._newest()
        return decision if grows and saved else NoopDecision()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._waits = False
        return super().make_decision_for_non_running_worker_group()


class SparingPolicy(DefaultFailurePolicy):  # type: ignore[misc]
    """Counts what workers die of while a node is about to be taken away as that preemption, not as a failure.

    Those who stay see a lost peer as an error of their own (gloo), or their process is ended (NCCL), and the controller
    may hear of that before it hears of the node. An error that has nothing to do with the node comes back in the next
    group.
    """

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        taken = [node for node, deadline_ms in _draining_nodes().items() if deadline_ms]  # an idle one has no deadline
        if taken and isinstance(training_failed_error, WorkerGroupError):
            training_failed_error = PreemptionError(PreemptionInfo(None, {node: [] for node in taken}))
        return super().make_decision(training_failed_error)


def _staying_nodes() -> set[str]:
    """Ids of the nodes that are there and are not being drained."""
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return alive - set(_draining_nodes())


def _draining_nodes() -> dict[str, int]:
    """Their ids, and when each has to be gone, in milliseconds; 0 where nobody said."""
    draining: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return draining


def largest_fitting(room: int, counts: tuple[int, ...]) -> int:
    """The largest of `counts` that does not exceed `room`; 0, which Ray Train waits at, where there is none."""
    return max((count for count in counts if count <= room), default=0)


class FittingTrainer(TorchTrainer):  # type: ignore[misc]
    """A `TorchTrainer` with these policies; `counts` are the numbers of workers, `run` is the run's folder."""

    def __init__(self, counts: tuple[int, ...], run: str, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._counts, self._run = counts, run

    def _initialize_and_run_controller(self, *, scaling_policy: ScalingPolicy, **options: Any) -> Any:
        if isinstance(scaling_policy, ElasticScalingPolicy):
            scaling_policy = FittingPolicy(self.scaling_config, self._counts, partial(newest_written, self._run))
        options["failure_policy"] = SparingPolicy(self.run_config.failure_config)
        return super()._initialize_and_run_controller(scaling_policy=scaling_policy, **options)
