"""Whole training steps of every variant beside timm's plain and differential ViT, in one process.

The models take turns, in an order that rotates, so that what else the machine does falls on all of them; a ratio is
the median over rounds of a model's time to that of our plain ViT in the same round.

    python benchmarks/train_step.py
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from diffvit.config import ModelConfig, Variant, model_preset
from diffvit.models.vit import VisionTransformer
from diffvit.recipes import sample

try:
    import timm
    from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
except ImportError:
    raise SystemExit("this benchmark measures timm beside diffvit: pip install -e '.[timm]'") from None


@dataclass(frozen=True)
class Options:
    """What to measure."""

    rounds: int = 15
    """Times each model takes a step."""
    threads: int = 1
    """CPU threads."""
    small_batch: int = 8
    """Batch of ViT-S/16 at 224 px."""
    sample_batch: int = 64
    """Batch of the sample recipe's model."""
    device: str = "cpu"
    """cpu or cuda."""
    compile: bool = False
    """Through torch.compile."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    console = Console(width=100)
    console.print(
        f"{platform.processor() or platform.machine()}, {options.threads} thread(s), {options.device}, "
        f"torch {torch.__version__}, timm {timm.__version__}, {options.rounds} rounds"
    )
    shapes = {
        f"ViT-S/16, 224 px, batch {options.small_batch}": (
            model_preset("small", "softmax", num_classes=1000),
            options.small_batch,
        ),
        f"sample recipe, batch {options.sample_batch}": (
            dataclasses.replace(sample().model, num_classes=10, variant="softmax", num_heads=4),
            options.sample_batch,
        ),
    }
    for title, (plain, batch) in shapes.items():
        console.print(measure(title, plain, batch, options))


def measure(title: str, plain: ModelConfig, batch: int, options: Options) -> Table:
    """Step times of all models around the plain model's shape."""
    steps = {name: training_step(build(), plain, batch, options) for name, build in builders(plain).items()}
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for step in steps.values():  # warm-up
        step()
        step()
    for number in range(options.rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(timed(steps[name], options))
    table = Table(title=title, title_justify="left")
    for column in ("model", "ms a step", "to plain", "quartiles"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in names:
        ratios = [mine / base for mine, base in zip(times[name], times["plain ViT"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        median = f"{statistics.median(ratios):.3f}"
        table.add_row(name, f"{1e3 * statistics.median(times[name]):.1f}", median, f"{low:.3f} to {high:.3f}")
    return table


def builders(plain: ModelConfig) -> dict[str, Callable[[], nn.Module]]:
    """V1 has half the plain model's heads, as published; timm's get the same shape.

    V2 comes as published, with D^2 more parameters in a block, and as it is compared: its MLP narrower by as many.
    """

    def ours(variant: Variant, num_heads: int, mlp_ratio: float = plain.mlp_ratio) -> Callable[[], nn.Module]:
        config = dataclasses.replace(plain, variant=variant, num_heads=num_heads, mlp_ratio=mlp_ratio)
        return lambda: VisionTransformer(config)

    def timms(attention: str, num_heads: int) -> Callable[[], nn.Module]:
        return lambda: TimmVisionTransformer(
            img_size=plain.image_size,
            patch_size=plain.patch_size,
            in_chans=plain.in_channels,
            num_classes=plain.num_classes,
            embed_dim=plain.embed_dim,
            depth=plain.depth,
            num_heads=num_heads,
            mlp_ratio=plain.mlp_ratio,
            class_token=plain.class_token,
            global_pool=plain.pool,
            attn_layer=attention,
        )

    return {
        "plain ViT": ours("softmax", plain.num_heads),
        "V1": ours("diff", plain.num_heads // 2),
        "V2": ours("diff_v2", plain.num_heads),
        "V2, parameters as plain's": ours("diff_v2", plain.num_heads, plain.mlp_ratio - 0.5),
        "timm plain ViT": timms("", plain.num_heads),
        "timm diff": timms("diff", plain.num_heads // 2),
    }


def training_step(model: nn.Module, config: ModelConfig, batch: int, options: Options) -> Callable[[], None]:
    """Forward, cross-entropy, backward, AdamW."""
    device = torch.device(options.device)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.randn(batch, config.in_channels, config.image_size, config.image_size, device=device)
    labels = torch.randint(0, config.num_classes, (batch,), device=device)
    forward = torch.compile(model) if options.compile else model

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timed(step: Callable[[], None], options: Options) -> float:
    started = time.perf_counter()
    step()
    if options.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
