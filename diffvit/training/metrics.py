"""Loss and accuracy as sums: added on the device without waiting for it, read once over all ranks.

torchmetrics would do, at 2.7 s of import in every worker (2 cores) for what is one all-reduce of six numbers.

Letters: B samples, C classes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from diffvit.data.batches import SKIPPED_LABEL


class Sums:
    """Sums of loss, top-1 hits, top-5 hits, samples used, samples skipped and votes, in float64."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)

    def add(self, loss_sum: Tensor, logits: Tensor, labels: Tensor, *, only_finite: bool = False) -> None:
        """`loss_sum`: the loss summed over the used samples; `logits` (B, C); `labels` (B,), SKIPPED_LABEL for none.

        With `only_finite` a batch whose loss is not finite is left out.
        """
        used = labels != SKIPPED_LABEL
        top5 = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices
        hits = top5 == labels[:, None]
        parts = (loss_sum.detach(), hits[:, 0].sum(), hits.sum(), used.sum(), (~used).sum())
        stacked = torch.stack([part.double() for part in parts])
        self._sums[:-1] += torch.where(loss_sum.isfinite(), stacked, 0.0) if only_finite else stacked

    def read(self, vote: int = 0) -> dict[str, float]:
        """Means over all ranks: `loss`, `top1` and `top5` in percent; counts: `images`, `skipped`; sum of the `votes`.

        Resets the sums. A collective: every rank calls it at the same time.
        """
        self._sums[-1] = float(vote)
        if dist.is_initialized():
            dist.all_reduce(self._sums)
        loss, top1, top5, images, skipped, votes = self._sums.tolist()
        self._sums.zero_()
        used = max(images, 1.0)
        return {
            "loss": loss / used,
            "top1": 100 * top1 / used,
            "top5": 100 * top5 / used,
            "images": images,
            "skipped": skipped,
            "votes": votes,
        }


def summed_cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy summed over the samples that were not skipped; logits (B, C), labels (B,), `weights` (B,)."""
    losses = F.cross_entropy(
        logits.float(),
        labels,
        reduction="sum" if weights is None else "none",
        ignore_index=SKIPPED_LABEL,
        label_smoothing=label_smoothing,
    )
    return losses if weights is None else (weights * losses).sum()
