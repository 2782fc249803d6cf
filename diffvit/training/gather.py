"""Small things of every rank, brought to all of them."""

from __future__ import annotations

import torch
import torch.distributed as dist


def gather_bytes(content: bytes, device: torch.device) -> list[bytes]:
    """What each rank passed, by rank. A collective; bytes travel as tensors on `device`, which every backend can do."""
    if not dist.is_initialized():
        return [content]
    ranks = range(dist.get_world_size())
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in ranks]
    dist.all_gather(sizes, torch.tensor([len(content)], device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else 0
    gathered = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in ranks]
    dist.all_gather(gathered, padded.to(device))
    return [bytes(row[: int(size)].cpu().numpy()) for row, size in zip(gathered, sizes, strict=True)]
