"""Recipes that carry the hyperparameters of published plain-ViT baselines, each also for V1 and V2.

A function gives the plain ViT as published, as far as its docstring does not say otherwise; `in_variants` adds the
differential ones: `-v1` (half the heads, so that its maps are as wide as the plain model's; DeiT-Ti's three become two,
with narrower maps), `-v1-heads` (the same number of heads, maps half as wide, as timm's Diff-ViTs) and `-v2` (the plain
model's heads). V1 has the plain model's parameters within 0.3 %; V2 has 8 to 13 % more (DeiT-S: 23.85 million to
22.05), because its queries are twice as wide. `compare` and the small recipes (`sample-v2`, `fashion-mnist-v2`,
`cifar10-small-v2`) take as many from its MLP.

Scores, hardware and times are the papers', for the plain ViT; none of the ImageNet recipes was run here. What one
would take on your machines is what `pretrain.py RECIPE --rehearse` tells. Their micro-batches, which change no result,
are such that activations take 12 GiB at most (counted, not run).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Literal

from diffvit.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, ScaleConfig, model_preset

Recipe = Callable[[], RunConfig]

VARIANTS = {"-v1": "Diff-ViT V1, half the heads", "-v1-heads": "Diff-ViT V1, as many heads", "-v2": "Diff-ViT V2"}
"""What `in_variants` adds to a name, and what that then is."""
_SCORES = {
    "imagenet-s16-90ep": 76.5,
    "imagenet-s16-150ep": 78.5,
    "imagenet-s16-300ep": 80.0,
    "deit-ti16": 72.2,
    "deit-s16": 79.9,
    "deit-b16": 81.8,
    "cifar10": 93.58,
    "cifar100": 73.81,
}
"""Published top-1 of the plain ViTs, in per cent."""


def imagenet_s16(epochs: Literal[90, 150, 300]) -> RunConfig:
    """Big Vision's ViT-S/16 on ImageNet-1k.

        prepare.py --source TRAIN_FOLDER --out imagenet --val-fraction 0.01
        pretrain.py imagenet-s16-90ep --data.path imagenet

    Source: arXiv 2205.01580, table 1: 90 epochs in under seven hours, 300 in less than a day, on a TPUv3-8; the time of
    150 is not told (half of 300's, by their number). Its weight decay of 1e-4 is multiplied by the schedule alone, ours
    by schedule and peak rate, so 1e-4 there is 0.1 here. It trains on 99 % of the training set: for shards that is
    prepare's to decide, for a folder `data.val_fraction`, which a folder with a validation set of its own does not ask;
    its scores are those of the official one (`predict.py`).

    What differs: it normalises tokens before their mean, and its head, with which it has these scores, is a tanh layer
    and one that starts from 0; the matrices of its blocks start from Xavier's distribution, its patch projection from
    LeCun's, with biases of 0; its GELU is the one approximated by tanh. It resizes crops without antialiasing and, to
    evaluate, by area (here both bilinear with antialiasing), computes in float32 but for AdamW's first moment, which it
    keeps in bf16, and its first step has a rate of 0.
    """
    return RunConfig(
        name=f"imagenet-s16-{epochs}ep",
        model=model_preset("small", "softmax", num_classes=1000, class_token=False, pool="avg", pos_embed="sincos2d"),
        data=DataConfig(path="", val_fraction=0.01, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        augment=AugmentConfig(
            crop="inception_tf",
            crop_scale=(0.05, 1.0),
            rand_augment_layers=2,
            rand_augment="big_vision",
            rand_augment_magnitude=30,  # 10 of 10
            policy_fill=128,
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
        scale=ScaleConfig(gpu=True, micro_batch_size=256),
    )


def deit(size: Literal["tiny", "small", "base"]) -> RunConfig:
    """DeiT-Ti, -S or -B on ImageNet-1k, 300 epochs.

        prepare.py --source FOLDER --out imagenet
        pretrain.py deit-s16 --data.path imagenet

    Source: arXiv 2012.12877, table 9, and the authors' code; B takes 53 hours on 8 V100 there, Ti and S under three
    days on 4 GPUs. lr 5e-4 x batch / 512. As in its sampler, an epoch of 3 copies of each image shows a third of them.
    timm's rand-m9-mstd0.5-inc1 counts strength to 10 and applies an operation with probability 0.5.

    What differs: its RandAugment turns, shears and shifts bicubically (here bilinearly, which is what torchvision has);
    its erasing noise is not kept within black and white; its mixup pairs a batch with its reverse, and each GPU's share
    of the batch draws for itself (here one draw for all); its learning rate changes by the epoch, warms up from 1e-6
    (where it stays for two epochs), and its cosine counts the epochs of warm-up too; its class token starts from a
    deviation of 0.02 (here 1e-6, as in newer versions of timm); it trains in fp16 (here bf16).
    """
    return RunConfig(
        name=f"deit-{'ti' if size == 'tiny' else size[0]}16",
        model=model_preset(size, "softmax", num_classes=1000, drop_path=0.1),
        data=DataConfig(path="", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        augment=AugmentConfig(
            crop="inception",
            interpolation="bicubic",
            rand_augment_layers=2,
            rand_augment="timm",
            rand_augment_magnitude=27,  # 9 of 10
            rand_augment_magnitude_std=1.5,  # 0.5 of 10
            rand_augment_probability=0.5,
            policy_fill=(124, 116, 104),
            erasing=0.25,
            erasing_fill="noise",
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
        scale=ScaleConfig(gpu=True, micro_batch_size=128 if size == "base" else 256),
    )


def cifar(classes: Literal[10, 100]) -> RunConfig:
    """The plain ViT of SPT_LSA_ViT on CIFAR-10 or CIFAR-100, from scratch, 300 passes.

        prepare.py --source torchvision:CIFAR10 --root DIR --download --out cifar10
        pretrain.py cifar10 --data.path cifar10

    Source: arXiv 2112.13492 and the code of its authors, aanna0701/SPT_LSA_ViT: 192 wide, 9 blocks, 12 heads, patches
    of 4 px, CutMix or mixup in half of the steps, AutoAugment, erasing. What is called repeated augmentation of 3 there
    is a sampler whose epochs are 3 passes with 1 copy of an image each: 100 epochs with 10 of warm-up are 300 and 30
    here, and `augment.repeats` is 1. Hardware and time are not given, nor whether the published score is that of the
    last epoch or of the best, both of which its program prints.

    What differs: its drop path is 0.1 in every block, its AdamW decays every parameter, it erases up to 40 % of an
    image, with other proportions, and writes the mean into what is normalised already, a light grey (here up to a
    third, and black), its AutoAugment shears bicubically (here nearest) and turns one way only, it mixes any two
    images of a batch (here neighbours), its LayerNorms add 1e-5 (here 1e-6), and its matrices start from Xavier's
    distribution, class token and positions from N(0, 1). It trains in float32 (here bf16 on a GPU that has it).
    """
    return RunConfig(
        name=f"cifar{classes}",
        model=ModelConfig(
            variant="softmax",
            image_size=32,
            patch_size=4,
            num_classes=classes,
            embed_dim=192,
            depth=9,
            num_heads=12,
            mlp_ratio=2.0,
            qkv_bias=False,
            drop_path=0.1,
        ),
        data=DataConfig(
            path="",
            mean=(0.4914, 0.4822, 0.4465) if classes == 10 else (0.5070, 0.4865, 0.4409),
            std=(0.2470, 0.2435, 0.2616) if classes == 10 else (0.2673, 0.2564, 0.2762),
        ),
        augment=AugmentConfig(
            crop="pad",
            padding=4,
            auto_augment="cifar10",
            policy_fill=128,
            erasing=0.25,
            mixup=1.0,
            cutmix=1.0,
            mix_probability=0.5,
            eval_crop_ratio=1.0,
        ),
        optim=OptimConfig(
            epochs=300,
            batch_size=128,
            lr=1e-3,
            min_lr_ratio=1e-3,
            warmup_epochs=30,
            weight_decay=0.05,
            clip_norm=0.0,
            label_smoothing=0.1,
        ),
    )


def _of(name: str, text: str | None) -> str:
    """The docstring with the recipe's own name, and data set, in its commands."""
    text = re.sub(r"pretrain\.py \S+", f"pretrain.py {name}", text or "")
    return re.sub(r"(?<=CIFAR|cifar)10\b", "100", text) if name.startswith("cifar100") else text


def in_variants(name: str, plain: Recipe, **v2_shape: Any) -> dict[str, Recipe]:
    """The plain recipe and its differential forms, by name; `v2_shape` are fields of V2's model that differ."""
    summary, _, details = (plain.__doc__ or "").strip().partition("\n")
    if name in _SCORES:
        plain.__doc__ = f"{summary} Published: {_SCORES[name]:g} % top-1.\n{details}"

    def variant(suffix: str, **shape: Any) -> Recipe:
        def build() -> RunConfig:
            base = plain()
            model = dataclasses.replace(base.model, **shape)
            return dataclasses.replace(base, name=f"{base.name}{suffix}", model=model)

        build.__doc__ = _of(f"{name}{suffix}", f"{VARIANTS[suffix]} of: {summary} No score is published.\n{details}")
        return build

    heads = plain().model.num_heads
    return {
        name: plain,
        f"{name}-v1": variant("-v1", variant="diff", num_heads=-(-heads // 2)),
        f"{name}-v1-heads": variant("-v1-heads", variant="diff", num_heads=heads),
        f"{name}-v2": variant("-v2", variant="diff_v2", num_heads=heads, **v2_shape),
    }


def _named(recipe: Callable[..., RunConfig], argument: object) -> Recipe:
    def build() -> RunConfig:
        return recipe(argument)

    build.__doc__ = _of(recipe(argument).name, recipe.__doc__)
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
}
