"""Which activations of a model are compared, and which of its tokens are outliers.

Trained ViTs turn a few patches of little content into *high-norm tokens* that hold global information (arXiv
2309.16588). A few of them can rule a similarity, so everything is computed with and without them.

Letters: B images, N tokens, P patches of a side, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffvit.models.vit import VisionTransformer

STREAMS = ("class token", "patch mean", "attention output", "MLP output")
"""class token and patch mean: of what a block hands on; outputs: what the branch adds, its mean over patches."""

_ROBUST_SIGMAS = 5.0
_TIMES_MEDIAN = 2.0


def layer_names(model: VisionTransformer) -> list[str]:
    """What `representations` and `patch_norms` need of `forward_features`."""
    return [f"blocks.{i}{part}" for i in range(model.config.depth) for part in ("", ".attn", ".mlp")]


def representations(
    features: Mapping[str, Tensor], model: VisionTransformer, left_out: Tensor | None = None
) -> dict[str, dict[str, Tensor]]:
    """`{stream: {"block I": (B, D)}}` from `forward_features(images, layer_names(model))`.

    Args:
        features: activations by name.
        model: whose activations they are; without a class token it has no such stream.
        left_out: (B, P P), True for patches that the means leave out. An image with all of its patches left out keeps
            them all. The class token is never left out.
    """
    blocks = range(model.config.depth)
    patches = slice(model.num_prefix_tokens, None)
    found = {
        stream: {f"block {i}": _mean(features[f"blocks.{i}{part}"][:, patches], left_out) for i in blocks}
        for stream, part in zip(STREAMS[1:], ("", ".attn", ".mlp"), strict=True)
    }
    if model.config.class_token:
        found = {STREAMS[0]: {f"block {i}": features[f"blocks.{i}"][:, 0] for i in blocks}} | found
    return found


def patch_norms(features: Mapping[str, Tensor], model: VisionTransformer) -> Tensor:
    """(B, P P): the L2 norm of each patch token as the last block hands it on."""
    last = features[f"blocks.{model.config.depth - 1}"][:, model.num_prefix_tokens :]
    norms: Tensor = torch.linalg.vector_norm(last.float(), dim=-1)
    return norms


def high_norm_threshold(norms: Tensor) -> float:
    """The norm above which a patch is a high-norm token: max(median + 5 sigma, 2 median), of any number of norms.

    sigma = 1.4826 times the median absolute deviation, which outliers do not move. The second bound keeps a model
    whose norms hardly vary from having any: the tokens meant here are several times longer than the others.
    """
    flat = norms.detach().flatten().double()
    median = flat.median()
    sigma = 1.4826 * (flat - median).abs().median()
    return float(torch.maximum(median + _ROBUST_SIGMAS * sigma, _TIMES_MEDIAN * median))


def _mean(tokens: Tensor, left_out: Tensor | None) -> Tensor:
    """(B, P P, D) -> (B, D), at least float32: sums of bf16 would lose what tells images apart."""
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    if left_out is None:
        return tokens.mean(dim=1)
    kept = ~left_out | left_out.all(dim=1, keepdim=True)
    return (tokens * kept[..., None]).sum(dim=1) / kept.sum(dim=1, keepdim=True)
