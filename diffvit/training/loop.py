"""A run from its first step to its last: `fit`, read top to bottom. Nothing here knows of Ray.

What a run needs of whoever started it (its rank, where to report, a checkpoint to go on from) comes in `Worker`; its
batches come from a `Stream`. One loop then serves Ray Train, a Tune trial and a plain call in a test.

Letters: G global batch, W workers, A micro-batches accumulated in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffvit.config import RunConfig
from diffvit.data.batches import Batch, Stream
from diffvit.data.order import EvalPlan, TrainPlan, step_seed
from diffvit.models.vit import VisionTransformer
from diffvit.models.weights import load_weights
from diffvit.training.audit import Audit
from diffvit.training.checkpoint import TrainState, checkpoint_name, load_checkpoint, save_checkpoint
from diffvit.training.evaluation import autocast, evaluate, to_device
from diffvit.training.metrics import Sums, summed_cross_entropy
from diffvit.training.mixing import Targets, mix
from diffvit.training.optim import build_ema, build_optimizer, build_schedule
from diffvit.training.tracking import Publish, Tracker

LOG_EVERY_STEPS = 10
"""How often ranks agree on their metrics; a gradient that is not finite is found then at the latest, with its step."""


class RunStopped(RuntimeError):
    """The run cannot go on, and trying again from the last checkpoint would end the same way."""


@dataclass(frozen=True)
class Worker:
    """One of the W processes of a run."""

    device: torch.device
    report: Callable[[dict[str, Any], Path | None], None]
    """Collective: hands the metrics, and on rank 0 the folder of a finished checkpoint, to whoever started the run."""
    publish: Publish
    """Tells the console; may be lost without harm."""
    rank: int = 0
    workers: int = 1
    checkpoint: Path | None = None
    """Where to go on from."""


def fit(config: RunConfig, train_plan: TrainPlan, eval_plan: EvalPlan, stream: Stream, worker: Worker) -> None:
    """Train to the end of the plan. What comes out goes through `worker.report` and into TensorBoard.

    Raises:
        RunStopped: a gradient that is not finite, or more images than allowed that cannot be used.
    """
    state = _start(config, train_plan, worker)
    model = _replicate(state.model, worker)
    tracker = Tracker(config, train_plan, state, worker.publish, enabled=worker.rank == 0)
    audit = Audit(config.folder, train_plan, stream, worker.rank, state.step) if config.data.audit else None
    batches = tracker.timed(_announce_skipped(stream.train(state.step), worker))
    batches = audit.watch(batches) if audit else batches
    sums = Sums(worker.device)
    grad_norms: list[Tensor] = []
    every_minutes = config.checkpoint.every_minutes or float("inf")

    while state.step < train_plan.total_steps:
        _open_gates(config, state)
        grad_norms.append(_take_step(config, train_plan, model, state, batches, sums, worker))
        ends_epoch = state.step % train_plan.steps_per_epoch == 0
        saves = ends_epoch or state.step % (config.checkpoint.every_steps or train_plan.total_steps) == 0
        if saves or state.step % LOG_EVERY_STEPS == 0:
            _require_finite(grad_norms, state.step, tracker.last_saved)
            read = sums.read(vote=worker.rank == 0 and tracker.minutes_since_save >= every_minutes)
            tracker.log_steps(read)
            saves = saves or read["votes"] > 0
            _require_usable(tracker.epoch_skipped, train_plan.num_samples, config, "training")
        if ends_epoch:
            evaluation = _announce_skipped(stream.evaluate(), worker)
            evaluated = evaluate(state.evaluated_model, evaluation, eval_plan.num_samples, config, worker.device)
            tracker.log_epoch(evaluated, stream)
            _require_usable(evaluated["skipped"], eval_plan.num_samples, config, "validation")
        if saves:
            if audit:
                audit.write(state.step)
            _save(config, state, tracker.report(), worker)
            tracker.saved()
    tracker.close()


def _start(config: RunConfig, plan: TrainPlan, worker: Worker) -> TrainState:
    """The state before the first step, or that of the checkpoint in hand."""
    torch.manual_seed(config.seed)
    model = VisionTransformer(config.model)
    if worker.checkpoint is None and config.init.weights:
        load_weights(model, config.init.weights, replace_head=True, from_plain=True)
    if config.init.train == "head":
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    model = model.to(worker.device)
    optimizer = build_optimizer(model, config.optim)
    schedule = build_schedule(optimizer, config.optim, plan.steps_per_epoch)
    state = TrainState(model, optimizer, schedule, build_ema(model, config.optim.ema_decay))
    if worker.checkpoint is not None:
        try:
            load_checkpoint(worker.checkpoint, state)
        except (ValueError, FileNotFoundError) as error:
            raise RunStopped(str(error)) from None
    state.world_sizes.append(worker.workers)
    return state


def _open_gates(config: RunConfig, state: TrainState) -> None:
    """Let the second maps of a converted plain ViT in, a little more each step."""
    steps = config.init.gate_opening_steps
    if state.step <= steps and steps:
        state.model.open_gates(state.step / steps)
        if state.ema is not None:
            state.evaluated_model.open_gates(state.step / steps)


def _replicate(model: nn.Module, worker: Worker) -> nn.Module:
    if worker.workers == 1:
        return model
    device_ids = [worker.device] if worker.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def _take_step(
    config: RunConfig,
    plan: TrainPlan,
    model: nn.Module,
    state: TrainState,
    batches: Iterator[Batch],
    sums: Sums,
    worker: Worker,
) -> Tensor:
    """One optimiser step over the global batch; the norm of its gradient, which is the same on every rank.

    A micro-batch's loss is its sum over the rank's share of G; DDP's mean over ranks makes that the mean over G,
    whatever W and A are, and a skipped sample adds nothing.
    """
    torch.manual_seed(step_seed(config.seed, state.step, worker.rank))
    share = plan.batch_size // plan.workers
    for micro in range(plan.accumulation_steps):
        images, labels = to_device(next(batches), config.data, worker.device)
        reduces = micro == plan.accumulation_steps - 1
        images, targets = mix(images, labels, config.augment, config.seed, state.step)
        with nullcontext() if reduces or not isinstance(model, DistributedDataParallel) else model.no_sync():
            with autocast(config, worker.device):
                logits = model(images)
            loss_sum = _summed_loss(logits, targets, config.optim.label_smoothing)
            (loss_sum / share).backward()
        sums.add(loss_sum, logits, labels)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm or float("inf"))
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.schedule.step()
    if state.ema is not None:
        state.ema.update_parameters(state.model)
    state.step += 1
    return grad_norm


def _summed_loss(logits: Tensor, targets: Targets, smoothing: float) -> Tensor:
    if targets.partner_labels is None or targets.own_share is None:
        return summed_cross_entropy(logits, targets.labels, smoothing)
    own = summed_cross_entropy(logits, targets.labels, smoothing, targets.own_share)
    return own + summed_cross_entropy(logits, targets.partner_labels, smoothing, 1 - targets.own_share)


def _announce_skipped(batches: Iterator[Batch], worker: Worker) -> Iterator[Batch]:
    for batch in batches:
        if batch.skipped:
            worker.publish("skipped", {"images": list(batch.skipped)})
        yield batch


def _require_finite(grad_norms: list[Tensor], step: int, last_saved: int | None) -> None:
    """Check the gradients of the last steps, up to `step`, and forget them."""
    finite = torch.stack(grad_norms).isfinite().tolist()
    grad_norms.clear()
    if not all(finite):
        bad_step = step - len(finite) + finite.index(False) + 1
        saved = f"is {checkpoint_name(last_saved)}" if last_saved is not None else "does not exist: none was saved yet"
        raise RunStopped(
            f"the loss or its gradient is not finite at step {bad_step}; the last good checkpoint {saved}. "
            "A lower optim.lr, a longer optim.warmup_epochs or a smaller optim.clip_norm are the usual remedies"
        )


def _require_usable(skipped: float, num_samples: int, config: RunConfig, split: str) -> None:
    """One image may always be skipped, so that a small folder with a single bad file is still of use."""
    allowed = max(1, int(config.data.max_skipped_fraction * num_samples))
    if skipped > allowed:
        raise RunStopped(
            f"{skipped:.0f} of the {num_samples} {split} images cannot be used, more than the {allowed} that "
            f"data.max_skipped_fraction = {config.data.max_skipped_fraction} allows; skipped.txt names them"
        )


def _save(config: RunConfig, state: TrainState, metrics: dict[str, Any], worker: Worker) -> None:
    if worker.rank != 0:
        worker.report(metrics, None)
        return
    with TemporaryDirectory(prefix="diffvit-") as folder:
        save_checkpoint(Path(folder), state, config, metrics)
        worker.report(metrics, Path(folder))
