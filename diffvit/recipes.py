"""Named starting points: a recipe is a function that returns a `RunConfig`; its docstring is what `--help` shows.

Any field can be changed on the command line: `pretrain.py sample --optim.lr 3e-4`.
"""

from __future__ import annotations

from collections.abc import Callable

from diffvit.config import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScaleConfig,
    Variant,
    model_preset,
)
from diffvit.published_recipes import PUBLISHED


def sample() -> RunConfig:
    """Diff-ViT V1 on the embedded Fashion-MNIST sample, two CPU workers, a few minutes."""
    return _sample("sample", "diff", num_heads=2)


def sample_vit() -> RunConfig:
    """The plain ViT under the budget of `sample`, with the same number of maps."""
    return _sample("sample-vit", "softmax", num_heads=4)


def sample_v2() -> RunConfig:
    """Diff-ViT V2 under the budget of `sample`."""
    return _sample("sample-v2", "diff_v2", num_heads=4)


def _sample(name: str, variant: Variant, num_heads: int) -> RunConfig:
    return RunConfig(
        name=name,
        model=ModelConfig(
            variant=variant,
            image_size=28,
            patch_size=7,
            in_channels=1,
            embed_dim=96,
            depth=6,
            num_heads=num_heads,
            mlp_ratio=2.0,
            class_token=False,
            pool="avg",
            pos_embed="learned",
        ),
        data=DataConfig(mean=(0.2860,), std=(0.3530,)),
        augment=AugmentConfig(crop="pad", padding=1, eval_crop_ratio=1.0),
        optim=OptimConfig(epochs=12, batch_size=64, lr=1e-3, beta2=0.98, warmup_epochs=2, label_smoothing=0.1),
        scale=ScaleConfig(workers=2),
    )


def folder() -> RunConfig:
    """Diff-ViT V1, small, on your own image folder (--data.path), with Big Vision's ViT-S/16 hyperparameters.

    Source: arXiv 2205.01580, "Better plain ViT baselines for ImageNet-1k": batch 1024, lr 1e-3, weight decay 0.1,
    RandAugment(2, 10), mean pooling, fixed sin-cos positions; without its mixup and 10,000 warm-up steps, which suit
    data of ImageNet's size.
    """
    return RunConfig(
        name="folder",
        model=model_preset("small", "diff", class_token=False, pool="avg", pos_embed="sincos2d"),
        data=DataConfig(path=""),
        augment=AugmentConfig(crop="inception", rand_augment_layers=2, rand_augment_magnitude=10),
        optim=OptimConfig(epochs=90, batch_size=1024, lr=1e-3, warmup_epochs=5, weight_decay=0.1),
        scale=ScaleConfig(micro_batch_size=64),  # all 1,024 at once fit no laptop
    )


def finetune() -> RunConfig:
    """What ray_jobs/finetune.py starts from: few epochs, a small rate that shrinks from block to block.

    Source: BEiT's fine-tuning of ViT-B (arXiv 2106.08254): AdamW, layer-wise decay 0.75, weight decay 0.05, smoothing
    0.1, drop path 0.1 (here 0); the rate is lower for batches of 128.
    """
    return RunConfig(
        name="finetune",
        data=DataConfig(path=""),
        augment=AugmentConfig(crop="inception", crop_scale=(0.3, 1.0)),
        optim=OptimConfig(
            epochs=20,
            batch_size=128,
            lr=5e-4,
            warmup_epochs=2,
            layer_decay=0.75,
            weight_decay=0.05,
            label_smoothing=0.1,
        ),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "sample": sample,
    "sample-vit": sample_vit,
    "sample-v2": sample_v2,
    "folder": folder,
    "finetune": finetune,
    **PUBLISHED,
}
DEFAULT_RECIPE = "sample"
