"""How noisy attention is, by layer and head: sums over batches, read once.

What differential attention claims is that the second map cancels attention on what does not matter. These are the
figures with which that can be looked at, the same for all variants; A is the map that is applied to the values,
A1 - lambda A2 (plain: A1), and |A| its absolute weights, because negative weight moves the output as well.

entropy_1, entropy_2        of each softmax map, in nats, mean over queries; `_relative`: over log N, its largest value
negative_share              sum of |A| where A < 0, over the sum of |A|
high_norm_mass              sum of |A| on high-norm tokens (`diffvit.analysis.features`), over the sum of |A|
distance_pixels             sum_j |A_ij| d_ij / sum_j |A_ij| over patches i, j, mean over i; d between patch centres
                            (arXiv 2010.11929, appendix D.7)
largest_logit               of q k' / sqrt K, in magnitude, over all images
effective_lambda            mean over images and tokens of what A2 is multiplied by
head_similarity             cosine of a head's A with those of the layer's other heads, mean over them
inside_mass, inside_lift    |A| of the pooled query on the patches of a given mask, over that on all patches; and this
                            over the mask's share of the patches, which is what attending blindly would give. A patch
                            that is inside in part counts in part
largest_activation          of a block's output, in magnitude; `_to_rms`: over their root mean square (2402.17762)

Letters: B images, H heads, L layers, N tokens, P patches of a side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from diffvit.models.attention import AttentionMaps
from diffvit.models.vit import Block, VisionTransformer

Ratio = tuple[Tensor, Tensor]
"""Numerator and denominator, (H,) each, or (1,) where heads play no part; both are summed over batches."""


class AttentionNoise:
    """Sums of one model over batches of images. float64, on the device of the images."""

    def __init__(self) -> None:
        self.images = 0
        self._ratios: dict[str, Ratio] = {}
        self._peaks: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(
        self,
        model: VisionTransformer,
        images_BCSS: Tensor,
        high_norm: Tensor | None = None,
        inside: Tensor | None = None,
    ) -> None:
        """Add a batch. The maps of one layer at a time are in memory.

        Args:
            model: in evaluation mode, the same in every call.
            images_BCSS: normalised.
            high_norm: (B, P P), True for high-norm patches; None leaves `high_norm_mass` out.
            inside: (B, P P), True for the object's patches, or the share of each that is the object's, 0 to 1; None
                leaves `inside_mass` and `inside_lift` out.

        Raises:
            ValueError: a mask of another shape than (B, P P).
        """
        x = model.embed(images_BCSS)
        prefix = model.num_prefix_tokens
        for name, mask in (("high_norm", high_norm), ("inside", inside)):
            if mask is not None and mask.shape != (x.shape[0], x.shape[1] - prefix):
                raise ValueError(
                    f"{name} must be a mask of patches, ({x.shape[0]}, {x.shape[1] - prefix}); got {tuple(mask.shape)}"
                )
        distances = patch_distances(images_BCSS.shape[-1], model.config.patch_size).to(x.device)
        ratios: list[dict[str, Ratio]] = []
        peaks: list[dict[str, Tensor]] = []
        for block in cast(list[Block], list(model.blocks)):
            maps = block.attn.attention_maps(block.norm1(x))
            x = block(x)
            A = maps.combined.abs()
            found = _entropies(maps) | _differences(maps, A) | {"head_similarity": _head_similarity(maps.combined)}
            found["distance_pixels"] = _distance(A[:, :, prefix:, prefix:], distances)
            if high_norm is not None:
                found["high_norm_mass"] = (_on_patches(A, high_norm, prefix), _sum(A))
            if inside is not None:
                found |= _inside(A, inside, prefix, model.config.pool == "token")
            found["square_activation"] = (x.double().square().mean()[None] * len(x), x.new_full((1,), len(x)).double())
            ratios.append(found)
            peaks.append(
                {
                    "largest_logit": maps.largest_logit.double(),
                    "largest_activation": x.abs().amax()[None].double(),
                }
            )
        self._add(
            {name: cast(Ratio, tuple(torch.stack([row[name][i] for row in ratios]) for i in (0, 1))) for name in found},
            {name: torch.stack([row[name] for row in peaks]) for name in peaks[0]},
        )
        self.images += len(x)

    def compute(self) -> dict[str, Tensor]:
        """(L, H) by name, (L, 1) for activations; float64 on the CPU.

        A figure that the variant does not have (`entropy_2` of the plain ViT) is missing; NaN where there is nothing
        to compare (`head_similarity` of a single head).
        """
        found = {name: (above / below).cpu() for name, (above, below) in self._ratios.items()}
        found |= {name: peak.cpu() for name, peak in self._peaks.items()}
        if found:
            found["largest_activation_to_rms"] = found["largest_activation"] / found.pop("square_activation").sqrt()
        return found

    def _add(self, ratios: dict[str, Ratio], peaks: dict[str, Tensor]) -> None:
        for name, (above, below) in ratios.items():
            mine = self._ratios.get(name)
            self._ratios[name] = (above, below) if mine is None else (mine[0] + above, mine[1] + below)
        for name, peak in peaks.items():
            self._peaks[name] = torch.maximum(self._peaks[name], peak) if name in self._peaks else peak


def patch_distances(image_size: int, patch_size: int) -> Tensor:
    """(P P, P P): distance in pixels between the centres of patches, in row-major order."""
    places = torch.arange(image_size // patch_size, dtype=torch.float32) * patch_size
    centres = torch.cartesian_prod(places, places)
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")


def _sum(t: Tensor) -> Tensor:
    """(B, H, ...) -> (H,), float64."""
    return t.sum(dim=[d for d in range(t.ndim) if d != 1], dtype=torch.float64)


def _count(t: Tensor) -> Tensor:
    """How many values `_sum` adds for each head."""
    return torch.full((t.shape[1],), t.numel() / t.shape[1], dtype=torch.float64, device=t.device)


def _mean(t: Tensor) -> Ratio:
    return _sum(t), _count(t)


def _entropies(maps: AttentionMaps) -> dict[str, Ratio]:
    found = {}
    for number, softmax in ((1, maps.positive), (2, maps.negative)):
        if softmax is not None:
            above, below = _mean(torch.special.entr(softmax).sum(dim=-1))
            found[f"entropy_{number}"] = (above, below)
            found[f"entropy_{number}_relative"] = (above, below * math.log(softmax.shape[-1]))
    return found


def _differences(maps: AttentionMaps, A: Tensor) -> dict[str, Ratio]:
    if maps.weight is None:
        return {}
    B, H, N, _ = A.shape
    return {
        "negative_share": (_sum((-maps.combined).clamp(min=0)), _sum(A)),
        "effective_lambda": _mean(maps.weight.expand(B, H, N, 1)),
    }


def _head_similarity(combined: Tensor) -> Ratio:
    flat = torch.nn.functional.normalize(combined.flatten(2), dim=-1)
    cosines = flat @ flat.transpose(1, 2)
    others = cosines.sum(dim=2) - cosines.diagonal(dim1=1, dim2=2)
    return _sum(others), _count(others) * (others.shape[1] - 1)


def _distance(among_patches: Tensor, distances: Tensor) -> Ratio:
    weight = among_patches.sum(dim=-1)
    # a query that sees no patch at all has no distance, and does not count
    seen = weight > 0
    return _sum((among_patches * distances).sum(dim=-1) / weight.where(seen, 1)), _sum(seen)


def _on_patches(A: Tensor, mask: Tensor, prefix: int) -> Tensor:
    return _sum(A[..., prefix:] * mask[:, None, None, :])


def _inside(A: Tensor, mask: Tensor, prefix: int, class_token: bool) -> dict[str, Ratio]:
    """Each image counts the same."""
    query: Callable[[Tensor], Tensor] = (lambda t: t[:, :, 0]) if class_token else (lambda t: t[:, :, prefix:].mean(2))
    weights = query(A)[..., prefix:].double()
    whole = weights.sum(-1)
    seen = whole > 0  # a query that sees no patch at all does not count
    share = (weights * mask[:, None, :]).sum(-1) / whole.where(seen, 1)
    area = mask.double().mean(dim=1)[:, None] * seen
    return {"inside_mass": (_sum(share), _sum(seen)), "inside_lift": (_sum(share), _sum(area))}
