"""In which numbers a model computes, and what a device that is slow in them is told."""

from __future__ import annotations

import re
from typing import Literal

import torch

from diffvit.config import RunConfig, ScaleConfig
from diffvit.training.utilisation import device_name


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """bf16 autocast where `numbers` says so; else none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=numbers(config.scale, device) == "bf16")


def numbers(scale: ScaleConfig, device: torch.device) -> Literal["bf16", "tf32", "fp32"]:
    """What `scale.precision` comes to on the device: bf16 only where that has it, and on a CPU only if asked for."""
    wants_bf16 = scale.precision == "bf16" or (scale.precision == "auto" and device.type == "cuda")
    if wants_bf16 and has_bf16(device):
        return "bf16"
    return "fp32" if scale.precision == "fp32" or not _has_tf32(device) else "tf32"


def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere


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
        rounds = numbers(scale, device) != "fp32"
        torch.set_float32_matmul_precision("high" if rounds else "highest")
        torch.backends.cudnn.allow_tf32 = rounds


def unsupported(device: torch.device) -> str | None:
    """Why the installed torch cannot compute on a GPU; None where it can, or is not to."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    built_for = [int(found[1]) for found in map(re.compile(r"sm_(\d+)").match, torch.cuda.get_arch_list()) if found]
    if not built_for or 10 * major + minor >= min(built_for):
        return None
    oldest = divmod(min(built_for), 10)
    return (
        f"{device_name(device)} has compute capability {major}.{minor}, and the installed torch {torch.__version__} is "
        f"built for {oldest[0]}.{oldest[1]} and newer: train on a newer GPU, or install a torch that is built for it"
    )


def precision_warning(scale: ScaleConfig, device: torch.device) -> str | None:
    """What to say where a run falls back from bf16; None where it does not."""
    falls_back = scale.precision == "bf16" or (scale.precision == "auto" and device.type == "cuda")
    if not falls_back or has_bf16(device):
        return None
    what = "this CPU" if device.type == "cpu" else device_name(device)
    return (
        f"scale.precision = {scale.precision!r}, but {what} would emulate bf16, slower than float32: "
        f"the run computes in {numbers(scale, device)}"
    )
