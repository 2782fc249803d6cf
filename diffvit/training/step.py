"""One optimiser step over the global batch.

Letters: G global batch, W workers, A micro-batches accumulated in a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffvit.config import RunConfig
from diffvit.data.batches import Batch
from diffvit.data.order import TrainPlan, step_seed
from diffvit.training.bounds import hold_lambdas
from diffvit.training.checkpoint import TrainState
from diffvit.training.evaluation import to_device
from diffvit.training.health import skip_poisoned
from diffvit.training.metrics import Sums, summed_cross_entropy
from diffvit.training.mixing import Targets, mix
from diffvit.training.precision import autocast
from diffvit.training.sharding import averaging, is_sharded, whole


def replicate(model: nn.Module, workers: int, device: torch.device, *, compiles: bool = False) -> nn.Module:
    """The model whose gradients are averaged over the workers, optionally compiled.

    It shares the parameters of `model`, whose names stay. Compiled, it is cut where DDP's buckets of gradients end, so
    that averaging them overlaps with the backward pass there too. A sharded model averages them itself.
    """
    if compiles:
        model = cast(nn.Module, torch.compile(model))
    if workers == 1 or is_sharded(model):
        return model
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=device_ids, forward_sync_buffers=False, gradient_as_bucket_view=True
    )


def take_step(
    config: RunConfig,
    plan: TrainPlan,
    model: nn.Module,
    state: TrainState,
    batches: Iterator[Batch],
    sums: Sums,
    rank: int,
    device: torch.device,
) -> Tensor:
    """Take the step; the norm of its gradient, the same on every rank. Where it is not finite no weight changes.

    A micro-batch's loss is its sum over the rank's share of G; DDP's mean over ranks makes that the mean over G,
    whatever W and A are, and a skipped sample adds nothing.
    """
    draws = _drop_path_draws(config, plan, state.step)
    share = plan.batch_size // plan.workers
    for micro in range(plan.accumulation_steps):
        images, labels = to_device(next(batches), config.data, device)
        reduces = micro == plan.accumulation_steps - 1
        first = (rank * plan.accumulation_steps + micro) * plan.row_size
        mine = None if draws is None else draws[first : first + plan.row_size].to(device, non_blocking=True)
        images, targets = mix(images, labels, config.augment, config.seed, state.step)
        with averaging(model, now=reduces):
            with autocast(config, device):
                logits = model(images, mine)
            loss_sum = _summed_loss(logits, targets, config.optim.label_smoothing)
            (loss_sum / share).backward()
        sums.add(loss_sum, logits, labels, only_finite=True)
    if config.model.lambda_max is not None:
        hold_lambdas(state.model)
    grad_norm = whole(nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm or float("inf")))
    skip_poisoned(state.optimizer, grad_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.schedule.step()
    if state.ema is not None:
        state.ema.update_parameters(state.model)
    state.step += 1
    return grad_norm


def _drop_path_draws(config: RunConfig, plan: TrainPlan, step: int) -> Tensor | None:
    """What drop path decides by for each sample of the global batch, (G, 2 depth), whatever W and A are."""
    if not config.model.drop_path:
        return None
    generator = torch.Generator().manual_seed(step_seed(config.seed, step))
    return torch.rand(plan.batch_size, 2 * config.model.depth, generator=generator)


def _summed_loss(logits: Tensor, targets: Targets, smoothing: float) -> Tensor:
    if targets.partner_labels is None or targets.own_share is None:
        return summed_cross_entropy(logits, targets.labels, smoothing)
    own = summed_cross_entropy(logits, targets.labels, smoothing, targets.own_share)
    return own + summed_cross_entropy(logits, targets.partner_labels, smoothing, 1 - targets.own_share)
