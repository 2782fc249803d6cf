"""In which numbers a model computes, and what a device that is slow in them is told."""

from __future__ import annotations

import torch

from diffvit.config import RunConfig, ScaleConfig
from diffvit.training.utilisation import device_name


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """bf16 autocast where the config asks for it, or leaves it open and the GPU has it; else none."""
    precision = config.scale.precision
    on_gpu = precision == "auto" and device.type == "cuda" and has_bf16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" or on_gpu)


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 itself; others emulate it, slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def set_float32_products(scale: ScaleConfig, device: torch.device) -> None:
    """Let a GPU round the factors of float32 products to TF32, unless `scale.precision` is fp32; for this process.

    In bf16 these are what autocast leaves in float32.
    """
    if device.type == "cuda":
        rounds = scale.precision != "fp32"
        torch.set_float32_matmul_precision("high" if rounds else "highest")
        torch.backends.cudnn.allow_tf32 = rounds


def precision_warning(scale: ScaleConfig, device: torch.device) -> str | None:
    """What to say where the precision asked for is slow on the device; None where it is not."""
    if scale.precision != "bf16" or has_bf16(device):
        return None
    what = "this CPU" if device.type == "cpu" else device_name(device)
    return (
        f"scale.precision = 'bf16' on {what}, which must emulate it, slower than float32; the run goes on with it: "
        "'auto' takes bf16 only where the device has it"
    )
