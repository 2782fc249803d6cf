"""AdamW or Muon with weight decay where it belongs, warm-up and cosine per step, and the average of the weights."""

from __future__ import annotations

import difflib
import math
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from diffvit.config import OptimConfig
from diffvit.training.muon import MuonAdamW

_NOT_DECAYED = ("pos_embed", "cls_token", "reg_token")


def build_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """AdamW (arXiv 1711.05101), or Muon beside it, over what is not frozen; it decays matrices and convolutions only.

    Biases, norms, lambda vectors and LayerScale (all with one dimension), tokens and position embeddings are not
    decayed, as in DeiT and Big Vision, nor is what `no_decay` names. With `layer_decay` each block learns slower than
    the one above it (BEiT, arXiv 2106.08254): the classifier and the last norm at the full rate, block i of L at
    layer_decay^(L - i), and what comes before the blocks at layer_decay^(L + 1).
    """
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    depth = 1 + max((_layer(name) for name, _ in model.named_parameters()), default=0)
    groups: dict[tuple[int, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        layer = _layer(name, depth) if config.layer_decay < 1 else depth
        spared = name in _NOT_DECAYED or any(fnmatchcase(name, pattern) for pattern in config.no_decay)
        decays = parameter.ndim >= 2 and not spared
        muon = config.optimizer == "muon" and parameter.ndim == 2 and name.startswith("blocks.")
        groups.setdefault((layer, decays, muon), []).append(parameter)
    kind = MuonAdamW if config.optimizer == "muon" else AdamW
    return kind(
        [
            {
                "params": members,
                "weight_decay": config.weight_decay if decays else 0.0,
                "lr": (config.muon_lr if muon else config.lr) * config.layer_decay ** (depth - layer),
                **({"muon": True, "momentum": config.muon_momentum} if muon else {}),
            }
            for (layer, decays, muon), members in sorted(groups.items(), reverse=True)
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def require_no_decay(model: nn.Module, config: OptimConfig) -> None:
    """Check that each entry of `no_decay` names parameters of the model.

    Raises:
        ValueError: one names none.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in config.no_decay:
        if not any(fnmatchcase(name, pattern) for name in names):
            nearest = difflib.get_close_matches(pattern, names, n=1, cutoff=0.4)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ", such as 'head.weight'"
            raise ValueError(f"optim.no_decay must name parameters of the model, got {pattern!r}{hint}")


def _layer(name: str, above: int = 0) -> int:
    """Number of the block that a parameter belongs to; -1 for what comes before the blocks, `above` for what after."""
    if name.startswith("blocks."):
        return int(name.split(".")[1])
    return -1 if name in _NOT_DECAYED or name.startswith("patch_embed") else above


def lr_ratio(step: int, total_steps: int, warmup_steps: int, min_ratio: float) -> float:
    """Share of the peak learning rate that step `step` (from 0) is taken with.

    Rises linearly to 1 over the warm-up, then (1 + cos) / 2 down to `min_ratio` after the last step.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def build_schedule(optimizer: AdamW, config: OptimConfig, steps_per_epoch: int) -> LambdaLR:
    total = config.epochs * steps_per_epoch
    warmup = round(config.warmup_epochs * steps_per_epoch) if config.warmup_steps is None else config.warmup_steps
    return LambdaLR(optimizer, lambda step: lr_ratio(step, total, warmup, config.min_lr_ratio))


def build_ema(model: nn.Module, decay: float) -> AveragedModel | None:
    """Exponential moving average of the weights, updated every step; None when `decay` is 0."""
    return _MovingAverage(model, decay) if decay else None


class _MovingAverage(AveragedModel):
    """As torch's with `get_ema_multi_avg_fn`, which copies the count to the GPU and so waits for it at every step."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self._decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        averages: list[Tensor] = list(self.module.parameters())
        weights: list[Tensor] = list(model.parameters())
        if self.n_averaged == 0:
            for average, weight in zip(averages, weights, strict=True):
                average.copy_(weight)
        else:
            torch._foreach_lerp_(averages, weights, 1 - self._decay)
        self.n_averaged += 1
