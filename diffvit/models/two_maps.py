"""The product of differential attention, (softmax(q1 k1') - weight softmax(q2 k2')) v, by three equal ways.

`attend_two_maps` takes the fastest for the device: fused kernels on a GPU, on a CPU blocks whose maps stay in
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
    """What differential attention reads: queries (B, H, 2, N, K), keys (B, H, 2 or, shared, 1, N, K), values.

    Values (B, H, N, E) are both maps'.
    """

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def maps(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Queries and keys of the first map, and of the second."""
        return (self.q[:, :, 0], self.k[:, :, 0]), (self.q[:, :, 1], self.k[:, :, -1])


Split = Callable[[Tensor], TwoMaps]
"""Where queries, keys and values lie in a projection (B, N, rows): gives views of it."""

_BLOCK_ENTRIES = 2**18
"""Entries of both maps in a block, for each thread: 1 MiB in float32, what a core's own cache holds."""


def attend_two_maps(qkv: Tensor, split: Split, weight: Tensor) -> Tensor:
    """(softmax(q1 k1' / sqrt K) - weight softmax(q2 k2' / sqrt K)) v by token, (B, N, H, E).

    Args:
        qkv: (B, N, rows), the projected tokens.
        split: where the parts are in it.
        weight: lambda, a scalar or (B, H, N, 1); float32 or better.
    """
    if qkv.is_cuda:
        return subtract_outputs(qkv, split, weight)
    if torch.compiler.is_compiling() or qkv.dtype != weight.dtype or len(list(_blocks(split(qkv)))) == 1:
        return subtract_maps(qkv, split, weight)
    return subtract_in_blocks(qkv, split, weight)


def subtract_outputs(qkv: Tensor, split: Split, weight: Tensor) -> Tensor:
    """Multiply each map with the values in a fused kernel, which keeps no map in memory, then subtract."""
    parts = split(qkv)
    positive, negative = (F.scaled_dot_product_attention(q, k, parts.v) for q, k in parts.maps)
    out: Tensor = positive - torch.atleast_1d(weight) * negative  # a scalar would be rounded to bf16
    return out.to(qkv.dtype).transpose(1, 2)


def subtract_maps(qkv: Tensor, split: Split, weight: Tensor) -> Tensor:
    """Subtract the maps, then multiply with the values once: the fewest operations where no fused kernel is at hand."""
    q, k, v = split(qkv)
    B, H, _, N, K = q.shape
    queries_by_keys = 2 // k.shape[2] * N
    k, v = k.flatten(0, 2), _flat(v)  # contiguous, as the products and their gradients want them
    maps = softmax_map(q.reshape(k.shape[0], queries_by_keys, K), k)  # len() would fix an exported batch size
    positive, negative = maps.view(B * H, 2, N, N).unbind(1)
    weight = _flat(weight.expand(B, H, N, 1)) if weight.ndim else weight
    combined = torch.addcmul(positive, negative, -weight)
    out: Tensor = (combined.to(v.dtype) @ v).unflatten(0, (B, H))
    return out.transpose(1, 2)


def subtract_in_blocks(qkv: Tensor, split: Split, weight: Tensor) -> Tensor:
    """As `subtract_maps`, a few images or heads at a time, whose maps are worked on while they lie in the CPU's cache.

    Keeps both softmax maps for the backward pass, and no third one; gradients go straight into that of the projection.
    """
    out: Tensor = _InBlocks.apply(qkv, split, weight)
    return out


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, split: Split, weight: Tensor) -> Tensor:
        parts = split(qkv)
        B, H, _, N, K = parts.q.shape
        out = qkv.new_empty(B, N, H, parts.v.shape[-1])
        kept = qkv.new_empty(B, H, 2, N, N) if any(ctx.needs_input_grad) else None
        for block in _blocks(parts):
            q, k, v = _of_block(parts, block)
            maps = q.new_empty(len(v), 2, N, N) if kept is None else _flat(kept[block])
            scores = maps.view(len(k), -1, N)
            torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=K**-0.5, out=scores)
            positive, negative = torch.softmax(maps, -1, out=maps).unbind(1)
            combined = torch.addcmul(positive, negative, _weight_of_block(weight, block), value=-1)
            _multiply(combined, v, out.transpose(1, 2)[block])
        ctx.save_for_backward(qkv, weight, kept)
        ctx.split = split
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, Tensor]:
        """The second map's gradient is -weight times what the first one's would be in its place, row by row."""
        qkv, weight, kept = ctx.saved_tensors
        parts = ctx.split(qkv)
        grad_qkv, grad_weight = torch.empty_like(qkv), torch.zeros_like(weight)
        grads, grad_heads = ctx.split(grad_qkv), grad_out.transpose(1, 2)
        scale = parts.q.shape[-1] ** -0.5
        for block in _blocks(parts):
            q, k, v = _of_block(parts, block)
            maps, out = _flat(kept[block]), _flat(grad_heads[block])
            positive, negative = maps.unbind(1)
            minus = -_weight_of_block(weight, block)
            combined = torch.addcmul(positive, negative, minus)
            _multiply(combined.transpose(1, 2), out, grads.v[block])
            d_maps = torch.empty_like(maps)
            d_first, d_second = d_maps.unbind(1)
            torch.bmm(out, v.transpose(1, 2), out=d_first)
            share = torch.linalg.vecdot(d_first, negative)
            if weight.ndim:
                grad_weight[block].sub_(share.view_as(grad_weight[block]))
            else:
                grad_weight.sub_(share.sum())
            torch.mul(d_first, minus, out=d_second)
            d_scores = torch._softmax_backward_data(d_maps, maps, -1, qkv.dtype).view(len(k), -1, maps.shape[-1])
            _multiply(d_scores, k, grads.q[block], scale)
            _multiply(d_scores.transpose(1, 2), q, grads.k[block], scale)
        return grad_qkv, None, grad_weight


def _blocks(parts: TwoMaps) -> Iterator[tuple[slice, slice]]:
    """Of images and heads: some images with all their heads, or some heads of one image."""
    B, H, _, N, _ = parts.q.shape
    maps = _BLOCK_ENTRIES * torch.get_num_threads() // (2 * N * N)
    images, heads = max(maps // H, 1), min(max(maps, 1), H)
    for image in range(0, B, images):
        for head in range(0, H, heads):
            yield slice(image, min(image + images, B)), slice(head, min(head + heads, H))


def _of_block(parts: TwoMaps, block: tuple[slice, slice]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries by keys, keys, values, without a copy where the strides allow it.

    Of two maps that share keys the queries come one after the other, so that one product makes both maps.
    """
    k = parts.k[block].flatten(0, 2)
    q = parts.q[block].reshape(len(k), -1, k.shape[-1])
    return q, k, _flat(parts.v[block])


def _weight_of_block(weight: Tensor, block: tuple[slice, slice]) -> Tensor:
    """Of a block's images and heads: a scalar as it is, (B, H, N, 1) as (images heads, N, 1)."""
    return _flat(weight[block]) if weight.ndim else weight


def _flat(part: Tensor) -> Tensor:
    return part.flatten(0, 1)


def _multiply(a: Tensor, b: Tensor, where: Tensor, factor: float = 1.0) -> None:
    """Write `factor` a b into `where`, which has its entries in the same order and any strides."""
    flat = where.reshape(len(a), a.shape[1], b.shape[2])  # a copy where the strides do not allow a view
    torch.baddbmm(flat, a, b, beta=0, alpha=factor, out=flat)
    if flat.data_ptr() != where.data_ptr():
        where.copy_(flat.view(where.shape))


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
