"""Arithmetic done in a second, and how much of the device's peak that is."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch

from diffvit.config import RunConfig
from diffvit.models.flops import training_flops

_PEAK_BF16_FLOPS: dict[str, float] = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}
"""Dense bf16 FLOP/s by what CUDA calls the device. Source: NVIDIA's data sheets of each (where they give the rate with
sparsity, half of it)."""


def device_name(device: torch.device) -> str:
    """What CUDA calls it; 'cpu'."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_bytes(device: torch.device) -> int:
    """Largest memory so far: what torch took of the GPU's, or of this process where it trains on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def arithmetic(results: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """`flops_per_image`, `flops_per_second` over all workers and `utilisation`, for a run's results.

    `utilisation` is the share of the workers' bf16 peak, in whatever precision the run is; None where the peak of the
    device is not known. Nothing where the run has no speed yet.
    """
    if "images_per_second" not in results:
        return {}
    flops = training_flops(config.model, config.init.train)
    rate = flops * results["images_per_second"]
    device, workers = results.get("device", ""), (results.get("world_sizes") or [1])[-1]
    return {
        "flops_per_image": flops,
        "flops_per_second": rate,
        "utilisation": utilisation(rate, device, workers),
    }


def utilisation(flops_per_second: float, device: str, workers: int) -> float | None:
    """Share of the bf16 peak of so many devices; None where that is not known."""
    peak = _PEAK_BF16_FLOPS.get(device)
    return flops_per_second / (peak * workers) if peak else None
