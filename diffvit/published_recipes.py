"""Recipes that carry the hyperparameters of published plain-ViT baselines, each also for V1 and V2.

A function gives the plain ViT exactly as published, as far as its docstring does not say otherwise; `in_variants` adds
the differential ones: `-v1` (half the heads, so that its maps are as wide as the plain model's), `-v1-heads` (the same
number of heads, maps half as wide, as timm's Diff-ViTs) and `-v2` (the plain model's heads). Scores are the papers',
for the plain ViT; none of the ImageNet recipes was run here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from diffvit.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, ScaleConfig, model_preset

Recipe = Callable[[], RunConfig]


def imagenet_s16(epochs: Literal[90, 150, 300]) -> RunConfig:
    """Big Vision's ViT-S/16 on ImageNet-1k: 76.5 / 78.5 / 80.0 % top-1 after 90 / 150 / 300 epochs.

    Source: arXiv 2205.01580, table 1. Its weight decay of 1e-4 is multiplied by the schedule alone, ours by schedule
    and peak rate, so 1e-4 there is 0.1 here. It trains on the first 99 % of the training set; so does this, by class.
    """
    return RunConfig(
        name=f"imagenet-s16-{epochs}ep",
        model=model_preset("small", "softmax", class_token=False, pool="avg", pos_embed="sincos2d"),
        data=DataConfig(path="", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        augment=AugmentConfig(
            crop="inception",
            crop_scale=(0.05, 1.0),
            rand_augment_layers=2,
            rand_augment_magnitude=10,
            mixup=0.2,
            eval_crop_ratio=0.875,
        ),
        optim=OptimConfig(
            epochs=epochs,
            batch_size=1024,
            lr=1e-3,
            warmup_epochs=0,
            warmup_steps=10_000,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        scale=ScaleConfig(gpu=True),
    )


def deit(size: Literal["tiny", "small", "base"]) -> RunConfig:
    """DeiT-Ti, -S or -B on ImageNet-1k, 300 epochs: 72.2 / 79.9 / 81.8 % top-1.

    Source: arXiv 2012.12877, table 9; lr 5e-4 x batch / 512. As in its sampler, an epoch of 3 copies of each image
    shows a third of them. What is erased is black instead of noise.
    """
    return RunConfig(
        name=f"deit-{size}",
        model=model_preset(size, "softmax", drop_path=0.1),
        data=DataConfig(path="", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        augment=AugmentConfig(
            crop="inception",
            rand_augment_layers=2,
            rand_augment_magnitude=9,
            rand_augment_magnitude_std=0.5,
            erasing=0.25,
            mixup=0.8,
            cutmix=1.0,
            repeats=3,
            eval_crop_ratio=0.875,
        ),
        optim=OptimConfig(
            epochs=300,
            batch_size=1024,
            lr=1e-3,
            min_lr_ratio=0.01,
            warmup_epochs=5,
            weight_decay=0.05,
            clip_norm=0.0,
            label_smoothing=0.1,
        ),
        scale=ScaleConfig(gpu=True),
    )


def cifar(classes: Literal[10, 100]) -> RunConfig:
    """The plain ViT of SPT_LSA_ViT on CIFAR-10 (93.58 % top-1) or CIFAR-100, from scratch, 300 passes over the data.

    Source: arXiv 2112.13492 and the code of its authors, aanna0701/SPT_LSA_ViT: 192 wide, 9 blocks, 12 heads, patches
    of 4 px, CutMix, mixup, AutoAugment, erasing, drop path 0.1. What is called repeated augmentation of 3 there repeats
    nothing in a batch, as far as its call tells: 1 repetition and epochs of 3 passes (the sampler itself was read only
    in copies of it elsewhere). So 100 epochs with 10 of warm-up are 300 and 30 here, and `augment.repeats` is 1. The
    code mixes half of its steps, this all of them. Prepare the data with `--source torchvision:CIFAR10`.
    """
    return RunConfig(
        name=f"cifar{classes}",
        model=ModelConfig(
            variant="softmax",
            image_size=32,
            patch_size=4,
            embed_dim=192,
            depth=9,
            num_heads=12,
            mlp_ratio=2.0,
            drop_path=0.1,
        ),
        data=DataConfig(path=""),
        augment=AugmentConfig(
            crop="pad", padding=4, auto_augment="cifar10", erasing=0.25, mixup=1.0, cutmix=1.0, eval_crop_ratio=1.0
        ),
        optim=OptimConfig(
            epochs=300, batch_size=128, lr=1e-3, warmup_epochs=30, weight_decay=0.05, label_smoothing=0.1
        ),
    )


def fashion_mnist() -> RunConfig:
    """A small ViT on the whole of Fashion-MNIST: the sample's model and recipe over 60,000 images, 50 epochs.

    To be compared with s-chh's 92.3 % (210k parameters, 200 epochs). Prepare the data with `--source
    torchvision:FashionMNIST`.
    """
    return RunConfig(
        name="fashion-mnist",
        model=ModelConfig(
            variant="softmax",
            image_size=28,
            patch_size=4,
            in_channels=1,
            embed_dim=96,
            depth=6,
            num_heads=4,
            mlp_ratio=2.0,
            class_token=False,
            pool="avg",
        ),
        data=DataConfig(path=""),
        augment=AugmentConfig(crop="pad", padding=2, erasing=0.1, eval_crop_ratio=1.0),
        optim=OptimConfig(epochs=50, batch_size=128, lr=1e-3, beta2=0.98, warmup_epochs=3, label_smoothing=0.1),
    )


def in_variants(name: str, plain: Recipe) -> dict[str, Recipe]:
    """The plain recipe and its differential forms, by name."""
    summary = (plain.__doc__ or "").strip().splitlines()[0]

    def variant(suffix: str, text: str, **shape: Any) -> Recipe:
        def build() -> RunConfig:
            base = plain()
            model = dataclasses.replace(base.model, **shape)
            return dataclasses.replace(base, name=f"{base.name}{suffix}", model=model)

        build.__doc__ = f"{text} of: {summary}"
        return build

    heads = plain().model.num_heads
    return {
        name: plain,
        f"{name}-v1": variant("-v1", "Diff-ViT V1, half the heads,", variant="diff", num_heads=-(-heads // 2)),
        f"{name}-v1-heads": variant("-v1-heads", "Diff-ViT V1, as many heads,", variant="diff", num_heads=heads),
        f"{name}-v2": variant("-v2", "Diff-ViT V2", variant="diff_v2", num_heads=heads),
    }


def _named(recipe: Callable[..., RunConfig], argument: object) -> Recipe:
    def build() -> RunConfig:
        return recipe(argument)

    build.__doc__ = recipe.__doc__
    return build


PUBLISHED: dict[str, Recipe] = {
    **in_variants("imagenet-s16-90ep", _named(imagenet_s16, 90)),
    **in_variants("imagenet-s16-150ep", _named(imagenet_s16, 150)),
    **in_variants("imagenet-s16-300ep", _named(imagenet_s16, 300)),
    **in_variants("deit-ti16", _named(deit, "tiny")),
    **in_variants("deit-s16", _named(deit, "small")),
    **in_variants("deit-b16", _named(deit, "base")),
    **in_variants("cifar10", _named(cifar, 10)),
    **in_variants("cifar100", _named(cifar, 100)),
    **in_variants("fashion-mnist", fashion_mnist),
}
