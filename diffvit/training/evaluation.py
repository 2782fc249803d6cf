"""Accuracy on a split, every sample counted once however many ranks share it, and how a batch enters the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffvit.config import DataConfig, RunConfig
from diffvit.data.batches import Batch
from diffvit.data.images import normalize
from diffvit.training.metrics import Sums, summed_cross_entropy
from diffvit.training.precision import autocast
from diffvit.training.sharding import is_sharded


def to_device(batch: Batch, config: DataConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Normalised images (B, C, S, S) and labels (B,) on `device`.

    To a GPU they are copied while it still computes and the host goes on. There the images lie channels-last, as its
    convolutions read them.
    """
    images, labels = _copied(batch.images, device), _copied(batch.labels, device)
    if device.type == "cuda":
        images = images.contiguous(memory_format=torch.channels_last)
    return normalize(images, config.mean, config.std), labels


def _copied(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """On a GPU the copy is made on a stream of its own, which the work that is queued next waits for."""
    on_gpu = device.type == "cuda"
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    host = torch.empty(array.shape, dtype=dtype, pin_memory=on_gpu)
    host.numpy()[...] = array  # which lies read-only in Ray's object store
    if not on_gpu:
        return host
    computing, copying = torch.cuda.current_stream(device), _copying_stream(device)
    with torch.cuda.stream(copying):
        copy = host.to(device, non_blocking=True)
    computing.wait_stream(copying)
    copy.record_stream(computing)  # or its memory might be given to the next copy while this one is still read
    return copy


@lru_cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], num_samples: int, config: RunConfig, device: torch.device
) -> dict[str, float]:
    """`loss`, `top1` and `top5` (percent) over all ranks' batches, `images` counted and `skipped`. A collective.

    Raises:
        RuntimeError: the ranks together saw another number of samples than `num_samples`.
    """
    was_training = model.training
    model.eval()
    sums = Sums(device)
    for batch in _until_all_end(batches, config, device) if is_sharded(model) else batches:
        images, labels = to_device(batch, config.data, device)
        with autocast(config, device):
            logits = model(images)
        sums.add(summed_cross_entropy(logits, labels), logits, labels)
    model.train(was_training)
    results = sums.read()
    seen = results["images"] + results["skipped"]
    if seen != num_samples:
        raise RuntimeError(f"evaluation must see each of the {num_samples} samples once, saw {seen:.0f}")
    return results


def _until_all_end(batches: Iterable[Batch], config: RunConfig, device: torch.device) -> Iterator[Batch]:
    """And then empty ones while another rank has some left: every rank takes part in putting the blocks together."""
    model, own = config.model, iter(batches)
    nothing = Batch(
        0, np.zeros((0, model.in_channels, model.image_size, model.image_size), np.uint8), np.zeros(0, np.int64)
    )
    while True:
        batch = next(own, None)
        left = torch.tensor(float(batch is not None), device=device)
        dist.all_reduce(left)
        if not left:
            return
        yield batch or nothing
