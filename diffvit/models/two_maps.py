"""The product of differential attention, (softmax(q1 k1') - weight softmax(q2 k2')) v, by three equal ways.

`attend_two_maps` takes the fastest for the device: fused kernels on a GPU, on a CPU blocks of images whose maps stay in
its cache, and plain operations where all maps fit there, or something else is to read them (a compiler, an exporter,
autocast).

Letters: B batch, N tokens, H differential heads, K query/key size of one map, E value size of one head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class TwoMaps(NamedTuple):
    """What differential attention reads: queries and keys of two maps (B, H, N, K), shared values (B, H, N, E)."""

    q1: Tensor
    k1: Tensor
    q2: Tensor
    k2: Tensor
    v: Tensor


Split = Callable[[Tensor], TwoMaps]
"""Where queries, keys and values lie in a projection (B, N, rows): gives views of it, which may overlap."""

_BLOCK_ENTRIES = 2**18
"""Entries of both maps in a block, for each thread: 1 MiB in float32, what a core's own cache holds."""


def attend_two_maps(qkv: Tensor, split: Split, weight: Tensor) -> Tensor:
    """(softmax(q1 k1' / sqrt K) - weight softmax(q2 k2' / sqrt K)) v by token, (B, N, H, E).

    Args:
        qkv: (B, N, rows), the projected tokens.
        split: where the parts are in it.
        weight: lambda, broadcastable to (B, H, N, 1); float32 or better.
    """
    if qkv.is_cuda:
        return subtract_outputs(qkv, split, weight)
    if torch.compiler.is_compiling() or qkv.dtype != weight.dtype or len(list(_blocks(split(qkv)))) == 1:
        return subtract_maps(qkv, split, weight)
    return subtract_in_blocks(qkv, split, weight)


def subtract_outputs(qkv: Tensor, split: Split, weight: Tensor) -> Tensor:
    """Multiply each map with the values in a fused kernel, which keeps no map in memory, then subtract."""
    q1, k1, q2, k2, v = split(qkv)
    positive = F.scaled_dot_product_attention(q1, k1, v)
    out = (positive - weight * F.scaled_dot_product_attention(q2, k2, v)).to(v.dtype)
    return out.transpose(1, 2)


def subtract_maps(qkv: Tensor, split: Split, weight: Tensor) -> Tensor:
    """Subtract the maps, then multiply with the values once: the fewest operations where no fused kernel is at hand."""
    parts = split(qkv)
    B, H, N, _ = parts.v.shape
    q1, k1, q2, k2, v = (_flat(part) for part in parts)  # contiguous, as the products and their gradients want them
    weight = _flat(weight.expand(B, H, N, 1)) if weight.ndim else weight
    combined = torch.addcmul(softmax_map(q1, k1), softmax_map(q2, k2), -weight)
    out: Tensor = (combined.to(v.dtype) @ v).unflatten(0, (B, H))
    return out.transpose(1, 2)


def subtract_in_blocks(qkv: Tensor, split: Split, weight: Tensor) -> Tensor:
    """As `subtract_maps`, a few images at a time, so that their maps are worked on while they lie in the CPU's cache.

    Keeps both softmax maps for the backward pass, and no third one; gradients go straight into that of the projection.
    """
    out: Tensor = _InBlocks.apply(qkv, split, weight)
    return out


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, split: Split, weight: Tensor) -> Tensor:
        parts = split(qkv)
        B, H, N, _ = parts.q1.shape
        out = qkv.new_empty(B, N, H, parts.v.shape[-1])
        kept = qkv.new_empty(2, B * H, N, N) if any(ctx.needs_input_grad) else None
        for block in _blocks(parts):
            q1, k1, q2, k2, v = (_flat(part[block]) for part in parts)
            first, second = (None, None) if kept is None else kept[:, block.start * H : block.stop * H]
            positive, negative = _softmax(q1, k1, first), _softmax(q2, k2, second)
            heads = torch.addcmul(positive, negative, _of_block(weight, block), value=-1) @ v
            _put(out[block].transpose(1, 2), heads)
        ctx.save_for_backward(qkv, weight, kept)
        ctx.split = split
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, Tensor]:
        """The second map's gradient is -weight times what the first one's would be in its place, row by row."""
        qkv, weight, kept = ctx.saved_tensors
        parts = ctx.split(qkv)
        H, K = parts.q1.shape[1], parts.q1.shape[-1]
        grad_qkv = torch.empty_like(qkv)
        grads = ctx.split(grad_qkv)
        shares_keys = parts.k1.data_ptr() == parts.k2.data_ptr()
        grad_weight = torch.zeros_like(weight)
        for block in _blocks(parts):
            q1, k1, q2, k2, v = (_flat(part[block]) for part in parts)
            positive, negative = kept[:, block.start * H : block.stop * H]
            minus = -_of_block(weight, block)
            out = _flat(grad_out[block].transpose(1, 2))
            combined = torch.addcmul(positive, negative, minus)
            d_v = combined.transpose(1, 2) @ out
            d_map = torch.bmm(out, v.transpose(1, 2), out=combined)
            if weight.ndim:
                _put(grad_weight[block], -torch.linalg.vecdot(d_map, negative).unsqueeze(-1))
            else:
                grad_weight -= torch.dot(d_map.flatten(), negative.flatten())
            d_first = torch._softmax_backward_data(d_map, positive, -1, qkv.dtype)
            d_second = torch._softmax_backward_data(d_map, negative, -1, qkv.dtype)
            scale = K**-0.5
            minus = minus * scale
            _put(grads.q1[block], (d_first @ k1).mul_(scale))
            _put(grads.q2[block], (d_second @ k2).mul_(minus))
            d_k1 = (d_first.transpose(1, 2) @ q1).mul_(scale)
            d_k2 = d_second.transpose(1, 2) @ (q2 * minus)
            _put(grads.k1[block], d_k1.add_(d_k2) if shares_keys else d_k1)
            if not shares_keys:
                _put(grads.k2[block], d_k2)
            _put(grads.v[block], d_v)
        return grad_qkv, None, grad_weight


def _blocks(parts: TwoMaps) -> Iterator[slice]:
    """The batch in pieces."""
    B, H, N, _ = parts.q1.shape
    images = max(_BLOCK_ENTRIES // (2 * H * N * N), 1) * torch.get_num_threads()
    for first in range(0, B, images):
        yield slice(first, min(first + images, B))


def _of_block(weight: Tensor, block: slice) -> Tensor:
    """Of a block's images: a scalar as it is, (B, H, N, 1) as (images H, N, 1)."""
    return _flat(weight[block]) if weight.ndim else weight


def _flat(part: Tensor) -> Tensor:
    return part.flatten(0, 1)


def _put(where: Tensor, part: Tensor) -> None:
    """(images H, ...) into (images, H, ...)."""
    where.copy_(part.unflatten(0, where.shape[:2]))


def _softmax(q: Tensor, k: Tensor, out: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt K), written into `out` where it is kept."""
    scores = q.new_empty(len(q), q.shape[1], k.shape[1]) if out is None else out
    torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5, out=scores)
    return torch.softmax(scores, -1, out=scores)


def softmax_map(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k' / sqrt K), (..., N, N), in float32 or better also where autocast gives half-precision scores."""
    return in_full_precision(scaled_scores(q, k)).softmax(dim=-1)


def scaled_scores(q: Tensor, k: Tensor) -> Tensor:
    """Q k' / sqrt K, (..., N, N)."""
    scores: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return scores


def in_full_precision(t: Tensor) -> Tensor:
    """Float32, or wider where it is."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
