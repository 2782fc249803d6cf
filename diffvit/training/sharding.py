"""Models that fit no single GPU, spread over the workers by PyTorch's FSDP2 (arXiv 2304.11277).

Each worker keeps its rows of every parameter, of its average and of the optimiser's moments. A block is put together
for its forward and its backward pass and let go after each, so a worker holds its share and one block; in bf16 also
autocast's bf16 copy of every matrix, until the backward pass.

A checkpoint is the same as without: it is gathered on rank 0's host, a tensor at a time, and on the way back every rank
takes its rows of it. So a run goes on with another number of workers, or sharded no more, as it likes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from diffvit.models.vit import VisionTransformer


def shard(model: VisionTransformer, workers: int, device: torch.device) -> None:
    """Move the model to the workers' devices, block by block, each worker's rows of it. A collective."""
    mesh = init_device_mesh(device.type, (workers,))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@contextmanager
def averaging(model: nn.Module, *, now: bool) -> Iterator[None]:
    """Backward passes in here average the gradients over the workers, or else keep them for one that does.

    A sharded model always averages: what it kept would be whole gradients, which no worker has room for.
    """
    if isinstance(model, DistributedDataParallel) and not now:
        with model.no_sync():
            yield
    else:
        yield


def whole(value: Tensor) -> Tensor:
    """All rows of a tensor that may be sharded. A collective if it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def own_rows(value: Tensor) -> Tensor:
    """Those of a tensor that this rank holds, which may be all."""
    return value.to_local() if isinstance(value, DTensor) else value


def own_part(value: Tensor, like: Tensor) -> Tensor:
    """What this rank keeps of a whole tensor, which every rank has, where it is spread as the parameter `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def whole_copy(model: VisionTransformer) -> VisionTransformer:
    """On the CPU, as it is now. A collective if it is sharded."""
    copy = VisionTransformer(model.config)
    for mine, theirs in zip(_tensors(copy), _tensors(model), strict=True):
        mine.copy_(whole(theirs))
    return copy


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
