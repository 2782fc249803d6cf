"""Attention in its three variants: plain, differential V1 and differential V2.

Differential attention subtracts a second softmax map from the first, so that the attention both maps spend on
irrelevant tokens cancels. The softmax of each map always comes before the subtraction.

Sources: V1: Differential Transformer, arXiv 2410.05258, section 2.1. V2: Differential Transformer V2, Microsoft,
January 2026 (microsoft/unilm, Diff-Transformer/Diff-Transformer-V2). Parameter names and row orders are timm's.

Letters: B batch, N tokens, D width (`embed_dim`), H heads (of V1 and V2: differential heads), K query/key size of
one map (the paper's d), E value size of one head (2K in V1, else K).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffvit.models.rms_norm import rms_norm
from diffvit.models.two_maps import TwoMaps, attend_two_maps, in_full_precision, scaled_scores, softmax_map


@dataclass(frozen=True)
class AttentionMaps:
    """What one layer attends to: `positive - weight * negative` is the map that is applied to the values.

    Attributes:
        positive: (B, H, N, N), a softmax map: its rows sum to 1.
        negative: (B, H, N, N), the softmax map that is subtracted; None for plain attention.
        weight: lambda, broadcastable to (B, H, N, 1); None for plain attention.
        largest_logit: (H,), the largest absolute value that a softmax of the head was taken of.
    """

    positive: Tensor
    negative: Tensor | None
    weight: Tensor | None
    largest_logit: Tensor

    @property
    def combined(self) -> Tensor:
        """(B, H, N, N); rows sum to 1 - weight (plain: to 1), and entries may be negative."""
        if self.negative is None or self.weight is None:
            return self.positive
        return self.positive - self.weight * self.negative


def depth_lambda_init(layer_index: int) -> float:
    """The paper's lambda_init = 0.8 - 0.6 exp(-0.3 layer_index), layer_index from 0 (arXiv 2410.05258, section 2.1)."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer_index)


class Attention(nn.Module):
    """Multi-head self-attention: out_h = softmax(Q_h K_h' / sqrt K) V_h, heads joined and projected; K = D / H.

    Parameters: `qkv` with 3D rows in the order Q, K, V, each by head; `proj`.

    Raises:
        ValueError: `embed_dim` is not divisible by `num_heads`.

    Source: arXiv 1706.03762, section 3.2.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, qkv_bias: bool = False, proj_bias: bool = True) -> None:
        super().__init__()
        _require_divisible(embed_dim, num_heads, "num_heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim, bias=proj_bias)

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q, k, v = self._heads(x_BND)
        out: Tensor = self.proj(_attend(q, k, v).transpose(1, 2).flatten(2))
        return out

    def attention_maps(self, x_BND: Tensor) -> AttentionMaps:
        """The maps of `forward` on the same input."""
        q, k, _ = self._heads(x_BND)
        return _maps_of(((q, k),), None)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # unbind, not chunk: its backward fills one tensor row by row, the cheapest of the equivalents.
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class DiffAttention(nn.Module):
    """Differential attention V1: out_h = (1 - lambda_init) RMSNorm((A1_h - lambda A2_h) V_h), heads joined, projected.

    A1 = softmax(Q1 K1' / sqrt K), A2 = softmax(Q2 K2' / sqrt K), K = D / 2H, values are E = 2K wide;
    lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init, one number for the layer.
    The RMSNorm is over the E values of one head, affine, its weight shared by the heads.

    Two departures from the paper, off by default: `head_norm="layer"` puts a LayerNorm (affine, with bias) in the place
    of the RMSNorm; `lambda_max` keeps lambda in [0, lambda_max]. Beyond these bounds its gradient is that of the lambda
    inside, so that it can come back; `diffvit.training.bounds.hold_lambdas`, before each step of an optimiser, keeps it
    from going further, and without that it runs away.

    Parameters: `qkv` with 3D rows in the order Q, K, V; the rows of Q and of K are those of 2H maps of size K, of
    which 2i and 2i + 1 are the two maps of head i. `lambda_q1`, `lambda_k1`, `lambda_q2`, `lambda_k2`, `sub_norm`,
    `proj`.

    Raises:
        ValueError: `embed_dim` is not divisible by `2 * num_heads`, or `lambda_max` is not positive.

    Source: arXiv 2410.05258, equations 1 to 3.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        lambda_init: float = depth_lambda_init(0),
        lambda_max: float | None = None,
        head_norm: Literal["rms", "layer"] = "rms",
    ) -> None:
        super().__init__()
        _require_divisible(embed_dim, 2 * num_heads, "2 * num_heads (a V1 head has two maps)")
        map_dim = embed_dim // (2 * num_heads)
        self.num_heads = num_heads
        if lambda_max is not None and lambda_max <= 0:
            raise ValueError(f"lambda_max must be positive, got {lambda_max}")
        self.lambda_init = lambda_init
        self.lambda_max = lambda_max
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        # float32 whatever the default dtype: exp() of a half-precision dot product would move lambda in steps of 1 %.
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(nn.init.normal_(torch.empty(map_dim, dtype=torch.float32), std=0.1)) for _ in range(4)
        )
        norm: type[nn.RMSNorm | nn.LayerNorm] = nn.RMSNorm if head_norm == "rms" else nn.LayerNorm
        self.sub_norm = norm(2 * map_dim, eps=1e-5)
        self.proj = nn.Linear(embed_dim, embed_dim, bias=proj_bias)

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        heads = attend_two_maps(self.qkv(x_BND), self._split, self.current_lambda())
        out: Tensor = self.proj(self._norm_heads(heads).flatten(2))
        return out

    def attention_maps(self, x_BND: Tensor) -> AttentionMaps:
        """The maps of `forward` on the same input, before the norm; `weight` is a scalar."""
        return _maps_of(self._split(self.qkv(x_BND)).maps, self.current_lambda())

    def current_lambda(self) -> Tensor:
        """Lambda, a scalar tensor, computed in float32 or better."""
        learned = self.learned_lambda(self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2)
        if self.lambda_max is None:
            return learned
        return learned + (learned.clamp(0.0, self.lambda_max) - learned).detach()

    def learned_lambda(self, *vectors: Tensor) -> Tensor:
        """Lambda without its bounds, of `lambda_q1`, `lambda_k1`, `lambda_q2` and `lambda_k2`, (K,) each."""
        q1, k1, q2, k2 = map(in_full_precision, vectors)
        return torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + self.lambda_init

    def _norm_heads(self, heads: Tensor) -> Tensor:
        """(1 - lambda_init) norm(heads), (..., E); the factor goes into the norm's weight, smaller than the heads."""
        norm, factor = self.sub_norm, 1 - self.lambda_init
        weight = (norm.weight * factor).to(heads.dtype)
        if isinstance(norm, nn.RMSNorm):
            return rms_norm(heads, weight, float(norm.eps or 0.0))
        return F.layer_norm(heads, norm.normalized_shape, weight, (norm.bias * factor).to(heads.dtype), norm.eps)

    def _split(self, qkv: Tensor) -> TwoMaps:
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, 2, -1)).unbind(2)
        return TwoMaps(q.movedim(1, 3), k.movedim(1, 3), v.flatten(3).transpose(1, 2))


class DiffAttentionV2(nn.Module):
    """Differential attention V2: out_h = A_2h V_h - sigmoid(lambda_h) A_2h+1 V_h, heads joined and projected.

    A_j = softmax(Q_j K_h' / sqrt K), K = D / H: both maps of a head have queries of their own and share its keys and
    values. lambda = W x, one number for each token and head. No head norm and no lambda_init.

    Parameters: `qkv` with 4D rows in the order Q (2D), K (D), V (D); the rows of Q are those of 2H maps, of which 2i
    and 2i + 1 belong to head i. `lambda_proj` is W (H, D), without bias as published. `proj`.

    Raises:
        ValueError: `embed_dim` is not divisible by `num_heads`.

    Source: microsoft/unilm, Diff-Transformer-V2/multihead_flashdiffv2.py.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, qkv_bias: bool = False, proj_bias: bool = True) -> None:
        super().__init__()
        _require_divisible(embed_dim, num_heads, "num_heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 4 * embed_dim, bias=qkv_bias)
        self.lambda_proj = nn.Linear(embed_dim, num_heads, bias=False)
        # a factor of the gate, 1 but while a converted plain ViT grows its second map (models/convert.py)
        self.gate_opening: Tensor
        self.register_buffer("gate_opening", torch.ones(()), persistent=False)
        self.proj = nn.Linear(embed_dim, embed_dim, bias=proj_bias)

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        out: Tensor = self.proj(attend_two_maps(self.qkv(x_BND), self._split, self.gate(x_BND)).flatten(2))
        return out

    def attention_maps(self, x_BND: Tensor) -> AttentionMaps:
        """The maps of `forward` on the same input; `weight` is sigmoid(lambda), (B, H, N, 1)."""
        return _maps_of(self._split(self.qkv(x_BND)).maps, self.gate(x_BND))

    def gate(self, x: Tensor) -> Tensor:
        """sigmoid(lambda) of `x` (B, N, D): (B, H, N, 1)."""
        gate = torch.sigmoid(in_full_precision(self.lambda_proj(x))) * self.gate_opening
        return gate.transpose(1, 2).unsqueeze(-1)

    def _split(self, qkv: Tensor) -> TwoMaps:
        D = qkv.shape[-1] // 4
        q, k, v = qkv.split((2 * D, D, D), dim=-1)
        q = q.unflatten(-1, (self.num_heads, 2, -1))
        k, v = k.unflatten(-1, (self.num_heads, 1, -1)), v.unflatten(-1, (self.num_heads, -1))
        return TwoMaps(q.movedim(1, 3), k.movedim(1, 3), v.transpose(1, 2))


def _require_divisible(embed_dim: int, parts: int, rule: str) -> None:
    if parts < 1 or embed_dim % parts:
        raise ValueError(f"embed_dim must be divisible by {rule}, got embed_dim={embed_dim} and {parts}")


def _maps_of(queries_and_keys: tuple[tuple[Tensor, Tensor], ...], weight: Tensor | None) -> AttentionMaps:
    """Of one or two maps; queries and keys are (B, H, N, K)."""
    logits = [in_full_precision(scaled_scores(q, k)) for q, k in queries_and_keys]
    positive, *negative = (logit.softmax(dim=-1) for logit in logits)
    largest = torch.stack([logit.abs().amax(dim=(0, 2, 3)) for logit in logits]).amax(dim=0)
    return AttentionMaps(positive, negative[0] if negative else None, weight, largest)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt K) v, (B, H, N, K), by a fused kernel where that is the faster way.

    It is not in bf16 on a CPU, where its backward pass takes two to nine times as long as that of plain operations.
    """
    if q.is_cpu and q.dtype == torch.bfloat16 and q.requires_grad:
        out: Tensor = softmax_map(q, k).to(v.dtype) @ v
        return out
    return F.scaled_dot_product_attention(q, k, v)
