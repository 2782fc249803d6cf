"""A run from its first step to its last: `fit`, read top to bottom. Nothing here knows of Ray.

What a run needs of whoever started it (its rank, its checkpoints, where to report) comes in `Worker`; its batches come
from a `Stream`. One loop then serves Ray Train, a Tune trial and a plain call in a test.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import cast

import torch

from diffvit.config import RunConfig
from diffvit.data.batches import SKIPPED_LABEL, Batch, Stream
from diffvit.data.order import EvalPlan, TrainPlan
from diffvit.models.vit import VisionTransformer
from diffvit.storage import Storage
from diffvit.training.audit import Audit
from diffvit.training.checkpoint import TrainState, load_checkpoint
from diffvit.training.evaluation import evaluate
from diffvit.training.gather import gather_bytes
from diffvit.training.health import Health
from diffvit.training.initial import load_initial
from diffvit.training.logbook import Logbook
from diffvit.training.metrics import Sums
from diffvit.training.optim import build_ema, build_optimizer, build_schedule
from diffvit.training.precision import numbers, precision_warning, set_float32_products, unsupported
from diffvit.training.saver import Ask, Saver, newest_step
from diffvit.training.sharding import shard
from diffvit.training.step import replicate, take_step
from diffvit.training.tracking import Tracker
from diffvit.training.worker import RunDiverged, RunStopped, Worker

__all__ = ["RunDiverged", "RunStopped", "Worker", "fit", "start_state"]

LOG_EVERY_STEPS = 10
"""How often ranks agree on their metrics and on what rank 0 asks for; a poisoned step is found then at the latest."""


def fit(config: RunConfig, train_plan: TrainPlan, eval_plan: EvalPlan, stream: Stream, worker: Worker) -> None:
    """Train to the end of the plan. What comes out goes into the store, `worker.report` and TensorBoard.

    Raises:
        RunStopped: rank 0's GPU is too old for the installed torch, no checkpoint can be used or written, the
            weights went bad more often than allowed, or more images than allowed cannot be used.
        RuntimeError: another rank's GPU is too old.
    """
    reason = unsupported(worker.device)
    first = worker.agree(reason)
    if first:
        raise RunStopped(first)
    if reason:  # the others wait for this rank, so it must not end as if all were well
        raise RuntimeError(reason)
    set_float32_products(config.scale, worker.device)
    warning = precision_warning(config.scale, worker.device)
    if warning and worker.rank == 0:
        worker.warn(warning)
    logbook = Logbook(config.location)
    if worker.rank == 0 and worker.store is not None:
        logbook.claim()
    state = start_state(config, train_plan, worker)
    with (
        closing(Saver(config, state, worker, logbook)) as saver,
        closing(Tracker(config, train_plan, state, worker.publish, enabled=worker.rank == 0)) as tracker,
    ):
        _train(config, train_plan, eval_plan, stream, worker, state, saver, tracker)
        saver.finish()


def _train(
    config: RunConfig,
    train_plan: TrainPlan,
    eval_plan: EvalPlan,
    stream: Stream,
    worker: Worker,
    state: TrainState,
    saver: Saver,
    tracker: Tracker,
) -> None:
    model = replicate(state.model, worker.workers, worker.device, compiles=config.scale.compile)
    audit = Audit(config.location, train_plan, stream, worker.rank, state.step) if config.data.audit else None
    unusable: dict[int, str] = {}
    batches = tracker.timed(_noting_unusable(stream.train(state.step), unusable))
    batches = audit.watch(batches) if audit else batches
    sums, agree_every_steps = Sums(worker.device), LOG_EVERY_STEPS

    def save(*, healthy: bool, ends_epoch: bool) -> None:
        audit_files = tuple(_audit_writes(audit, state.step, config, worker))
        saver.save(tracker.metrics(), tracker.to_copy(), audit_files, healthy=healthy, ends_epoch=ends_epoch)

    while True:
        if state.step and state.step % train_plan.steps_per_epoch == 0 and not state.evaluated:
            diverged = _end_epoch(config, train_plan, eval_plan, stream, worker, state, saver, tracker)
            if diverged:
                _go_back(diverged, saver, audit, state)
                save(healthy=False, ends_epoch=True)
                continue  # and evaluate these
        if state.step == train_plan.total_steps:
            return
        _open_gates(config, state)
        state.evaluated = False
        state.health.add(take_step(config, train_plan, model, state, batches, sums, worker.rank, worker.device))
        ends_epoch = state.step % train_plan.steps_per_epoch == 0
        saves = planned = ends_epoch or state.step % (config.checkpoint.every_steps or train_plan.total_steps) == 0
        judges = planned or state.step % LOG_EVERY_STEPS == 0
        if judges or state.step % agree_every_steps == 0:
            state.poisoned_steps += state.health.read(state.step)
            wish = saver.asks(tracker.minutes_since_save, tracker.step_seconds) if worker.rank == 0 else 0
            read = sums.read(wish)
            ask = Ask(int(read["votes"]))
            agree_every_steps = 1 if Ask.OFTEN in ask else LOG_EVERY_STEPS
            if read["skipped"]:
                state.skipped_samples = sorted({*state.skipped_samples, *_tell_unusable(unusable, worker)})
            tracker.log_steps(read)
            saves = saver.answer(ask) or saves
            _require_usable(len(state.skipped_samples), train_plan.num_samples, config, "training")
            # only at steps that do not depend on the clock, so that a run that is cut goes the way of one that is not
            if judges and state.health.is_sick:
                _go_back(state.health.complaint, saver, audit, state)
                saves = planned = True
        if saves:
            save(healthy=planned and not ends_epoch and state.health.counted == 0, ends_epoch=ends_epoch)
            tracker.saved()


def _end_epoch(
    config: RunConfig,
    train_plan: TrainPlan,
    eval_plan: EvalPlan,
    stream: Stream,
    worker: Worker,
    state: TrainState,
    saver: Saver,
    tracker: Tracker,
) -> str | None:
    """Evaluate what was saved just before, so that a cut meanwhile costs no more than the evaluation.

    What is wrong with these weights where the loss is not finite: no step may have been seen to go wrong yet.
    """
    unusable: dict[int, str] = {}
    evaluation = _noting_unusable(stream.evaluate(), unusable)
    evaluated = evaluate(state.evaluated_model, evaluation, eval_plan.num_samples, config, worker.device)
    if evaluated["skipped"]:
        _tell_unusable(unusable, worker)
    tracker.log_epoch(evaluated, stream)
    _require_usable(evaluated["skipped"], eval_plan.num_samples, config, "validation")
    if not math.isfinite(evaluated["loss"]):
        epoch = state.step // train_plan.steps_per_epoch
        return f"the validation loss is not finite after epoch {epoch}: the weights have diverged"
    metrics = tracker.end_epoch(evaluated)
    saver.describe(metrics, tracker.to_copy())
    worker.report(metrics)
    tracker.saved()
    return None


def _go_back(why: str, saver: Saver, audit: Audit | None, state: TrainState) -> None:
    undone = saver.roll_back(why)
    if audit is not None:
        audit.forget(undone, state.step)


def _audit_writes(audit: Audit | None, step: int, config: RunConfig, worker: Worker) -> Iterator[Callable[[], None]]:
    """What rank 0 is to call to write the files of every rank. A collective where there is an audit."""
    if audit is not None:
        run = Storage(config.location, retry_seconds=0)
        for name, content in audit.parts(step, gather_bytes(audit.take(), worker.device)).items():
            yield partial(run.write, name, content)


def start_state(config: RunConfig, plan: TrainPlan, worker: Worker) -> TrainState:
    """The state before the first step, or that of the newest checkpoint that is whole."""
    torch.manual_seed(config.seed)
    model = VisionTransformer(config.model)
    step = newest_step(worker, config.model)
    if step is None and config.init.weights:
        try:
            report = load_initial(model, config)
        except ValueError as error:
            raise RunStopped(str(error)) from None
        if worker.rank == 0:
            worker.publish("started from", {"message": f"started from {config.init.weights}: {report}"})
    if config.init.train == "head":
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    ema = build_ema(model, config.optim.ema_decay)
    for part in (model,) if ema is None else (model, cast(VisionTransformer, ema.module)):
        if config.scale.sharding == "fsdp" and worker.workers > 1:
            shard(part, worker.workers, worker.device)
        else:
            part.to(worker.device)
    optimizer = build_optimizer(model, config.optim)
    schedule = build_schedule(optimizer, config.optim, plan.steps_per_epoch)
    state = TrainState(model, optimizer, schedule, ema, health=Health(config.optim.max_skipped_steps))
    if worker.store is not None and step is not None:
        with worker.store.opened(step) as folder:
            load_checkpoint(folder, state)
    state.world_sizes.append(worker.workers)
    state.precisions.append(numbers(config.scale, worker.device))
    if worker.rank == 0 and len({*state.precisions[-2:]}) > 1:
        before, now = state.precisions[-2:]
        worker.warn(f"the run goes on in {now}; so far it computed in {before}")
    return state


def _open_gates(config: RunConfig, state: TrainState) -> None:
    """Let the second maps of a converted plain ViT in, a little more each step."""
    steps = config.init.gate_opening_steps
    opening = min(state.step / steps, 1.0) if steps else state.model.gate_opening
    if opening != state.model.gate_opening:
        for model in {state.model, state.evaluated_model}:
            model.open_gates(opening)


def _noting_unusable(batches: Iterator[Batch], unusable: dict[int, str]) -> Iterator[Batch]:
    """The same batches; samples that cannot be used are added to `unusable`, each with its key and the reason."""
    for batch in batches:
        if batch.skipped:
            samples = batch.samples[batch.labels == SKIPPED_LABEL].tolist()
            unusable.update(zip(samples, batch.skipped, strict=True))
        yield batch


def _tell_unusable(unusable: dict[int, str], worker: Worker) -> list[int]:
    """Bring together what each rank found and empty it; rank 0 tells. The numbers of the samples. A collective."""
    found = gather_bytes(json.dumps(list(unusable.items())).encode(), worker.device)
    unusable.clear()
    samples: dict[int, str] = dict(pair for part in found for pair in json.loads(part))
    if worker.rank == 0:
        worker.publish("skipped", {"images": list(samples.values())})
    return list(samples)


def _require_usable(skipped: float, num_samples: int, config: RunConfig, split: str) -> None:
    """One image may always be skipped, so that a small folder with a single bad file is still of use."""
    allowed = max(1, int(config.data.max_skipped_fraction * num_samples))
    if skipped > allowed:
        raise RunStopped(
            f"{skipped:.0f} of the {num_samples} {split} images cannot be used, more than the {allowed} that "
            f"data.max_skipped_fraction = {config.data.max_skipped_fraction} allows; skipped.txt names them, and with "
            "a larger one the same command goes on"
        )
