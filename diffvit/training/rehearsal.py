"""The first steps of a run with a stopwatch: the same loop, and what its steps are made of. Nothing knows of Ray.

Letters: W workers, A micro-batches a worker accumulates in a step.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from diffvit.config import RunConfig
from diffvit.data.batches import Batch, Stream
from diffvit.data.order import EvalPlan, Indices, TrainPlan
from diffvit.training.checkpoint import Snapshot, TrainState, take_snapshot
from diffvit.training.checkpoint_store import CheckpointStore
from diffvit.training.evaluation import evaluate
from diffvit.training.loop import fit, start_state
from diffvit.training.metrics import Sums
from diffvit.training.precision import numbers
from diffvit.training.step import replicate, take_step
from diffvit.training.tracking import Waiting
from diffvit.training.utilisation import device_name, peak_bytes
from diffvit.training.worker import Worker

_WARMUP_STEPS = 10
_COMPARED_STEPS, _COMPARISONS = 3, 2
"""Steps taken with and without averaging gradients, and how often that is repeated."""


@dataclass(frozen=True)
class Measured:
    """What the first steps of a run took. Seconds are those of rank 0."""

    workers: int
    device: str
    precision: str
    """That it computed in: bf16, tf32 or fp32."""
    steps: int
    """Steps that were timed, after those that warm up."""
    step_seconds: float
    wait_seconds: float
    """Of a step, waiting for its images."""
    communication_seconds: float
    """Of a step: how much longer it takes when gradients are averaged over the workers, side by side either way."""
    filling_seconds: float
    """What the steps that warm up took longer than as many others, and the first evaluation longer than the next."""
    evaluation_images: int
    evaluation_seconds: float
    drawing_seconds: float
    """The attention maps, a few times a run."""
    snapshot_seconds: float
    """What training waits for a checkpoint."""
    writing_seconds: float
    """What a checkpoint then takes beside training."""
    peak_bytes: int
    """Largest memory of a worker: the GPU's, or of the process where it trains on the CPU."""
    seconds: float
    """All of this together."""


class TimedStream:
    """`stream`, and when it was used. Waiting counts from micro-batch `first` on, whose step finds an idle device."""

    def __init__(self, stream: Stream, first: int, device: torch.device) -> None:
        self._stream, self._first, self._device = stream, first, device
        self._waiting = Waiting(device)
        self.began = self.measured_from = self.trained_until = 0.0
        self.wait_seconds = self.evaluation_seconds = 0.0
        self.drawing_since: float | None = None
        self.last: Batch | None = None

    def train(self, first_step: int) -> Iterator[Batch]:
        batches = self._stream.train(first_step)
        self.began = time.perf_counter()
        for number in itertools.count():
            if number == self._first:
                self._wait_for_device()
                self._waiting.read()
                self.measured_from = time.perf_counter()
            self.last = self._waiting.next_of(batches)
            if self.last is None:
                return
            yield self.last

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def evaluate(self) -> Iterator[Batch]:
        self._wait_for_device()
        self.wait_seconds += self._waiting.read()
        self.trained_until = time.perf_counter()
        yield from self._stream.evaluate()
        self._wait_for_device()
        self.evaluation_seconds = time.perf_counter() - self.trained_until

    def preview(self, count: int) -> Batch:
        self.drawing_since = time.perf_counter()
        return self._stream.preview(count)

    def keys(self, samples: Indices) -> list[str]:
        return self._stream.keys(samples)


class TimedStore(CheckpointStore):
    """Says how long its last checkpoint took to write."""

    writing_seconds = 0.0

    def put(self, snapshot: Snapshot, before_publishing: Callable[[], None] = lambda: None) -> None:
        began = time.perf_counter()
        super().put(snapshot, before_publishing)
        self.writing_seconds = time.perf_counter() - began


def rehearse_steps(
    config: RunConfig, plan: TrainPlan, eval_plan: EvalPlan, stream: Stream, worker: Worker, steps: int
) -> Measured:
    """Run the first `steps` steps of `plan`, an evaluation and a checkpoint into `config.folder`. A collective.

    The stream goes on beyond them, as in the run itself: a loader that keeps up only because it need not go on would
    look too fast.
    """
    began = time.perf_counter()
    warmup = min(_WARMUP_STEPS, steps // 2)
    first = warmup * plan.accumulation_steps
    timed, reported = TimedStream(stream, first, worker.device), []
    short = dataclasses.replace(plan, num_samples=steps * plan.batch_size, epochs=1)
    store = TimedStore(config.location, config.checkpoint)
    watched = dataclasses.replace(worker, store=store, report=lambda _: reported.append(time.perf_counter()))
    fit(config, short, eval_plan, timed, watched)
    peak = _peak_bytes(worker)

    assert timed.last is not None
    state = start_state(config, plan, dataclasses.replace(worker, store=None))
    communication = _communication_seconds(config, plan, state, timed.last, worker)
    snapshot_seconds = _snapshot_seconds(config, state, worker.device)
    # before the epoch is evaluated, it is saved
    step_seconds = (timed.trained_until - timed.measured_from - snapshot_seconds) / (steps - warmup)
    first_evaluation_seconds = timed.evaluation_seconds
    evaluation_seconds = _evaluation_seconds(config, eval_plan, timed, state, worker)
    return Measured(
        workers=worker.workers,
        device=device_name(worker.device),
        precision=numbers(config.scale, worker.device),
        steps=steps - warmup,
        step_seconds=step_seconds,
        wait_seconds=timed.wait_seconds / (steps - warmup),
        communication_seconds=communication,
        filling_seconds=max(timed.measured_from - timed.began - warmup * step_seconds, 0.0)
        + max(first_evaluation_seconds - evaluation_seconds, 0.0),
        evaluation_images=eval_plan.num_samples,
        evaluation_seconds=evaluation_seconds,
        drawing_seconds=reported[-1] - (timed.drawing_since or reported[-1]),
        snapshot_seconds=snapshot_seconds,
        writing_seconds=store.writing_seconds,
        peak_bytes=peak,
        seconds=time.perf_counter() - began,
    )


def _communication_seconds(
    config: RunConfig, plan: TrainPlan, state: TrainState, batch: Batch, worker: Worker
) -> float:
    """A step over a batch at hand with gradients averaged, less one without; all workers train in both."""
    if worker.workers == 1:
        return 0.0
    model = replicate(state.model, worker.workers, worker.device, compiles=config.scale.compile)
    assert isinstance(model, DistributedDataParallel)
    sums, batches = Sums(worker.device), itertools.repeat(batch)

    def seconds_a_step(steps: int, *, averaged: bool) -> float:
        sums.read()  # of all ranks: they begin together, and are waited for at the end
        began = time.perf_counter()
        with nullcontext() if averaged else model.no_sync():
            for _ in range(steps):
                take_step(config, plan, model, state, batches, sums, worker.rank, worker.device)
        sums.read()
        return (time.perf_counter() - began) / steps

    seconds_a_step(1, averaged=True)
    differences = [
        seconds_a_step(_COMPARED_STEPS, averaged=True) - seconds_a_step(_COMPARED_STEPS, averaged=False)
        for _ in range(_COMPARISONS)
    ]
    return max(sum(differences) / _COMPARISONS, 0.0)


def _evaluation_seconds(
    config: RunConfig, eval_plan: EvalPlan, stream: TimedStream, state: TrainState, worker: Worker
) -> float:
    """Of one more evaluation: the first also sets up what the later ones use again."""
    evaluate(state.evaluated_model, stream.evaluate(), eval_plan.num_samples, config, worker.device)
    return stream.evaluation_seconds


def _snapshot_seconds(config: RunConfig, state: TrainState, device: torch.device) -> float:
    began = time.perf_counter()
    take_snapshot(state, config, {})
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _peak_bytes(worker: Worker) -> int:
    """Of the worker that has the most."""
    peak = torch.tensor(float(peak_bytes(worker.device)), device=worker.device, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(peak, dist.ReduceOp.MAX)
    return int(peak)
