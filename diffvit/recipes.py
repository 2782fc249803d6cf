"""Named starting points: a recipe is a function that returns a `RunConfig`; `JOB.py RECIPE --help` shows its docstring.

Any field can be changed on the command line: `pretrain.py sample --optim.lr 3e-4`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from diffvit.config import (
    AugmentConfig,
    DataConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScaleConfig,
    Variant,
    model_preset,
)
from diffvit.published_recipes import PUBLISHED, in_variants


def sample() -> RunConfig:
    """Diff-ViT V1 on the embedded Fashion-MNIST sample, two CPU workers, a few minutes.

        pretrain.py sample

    85.05 % top-1 after the last epoch (seed 0), two and a half minutes on two x86-64 cores. Our own recipe, which
    has no published score. One seed does not tell the arms apart: RESULTS.md compares them.
    """
    return _sample("sample", "diff", num_heads=2)


def sample_vit() -> RunConfig:
    """The plain ViT under the budget of `sample`, with the same number of maps.

        pretrain.py sample-vit

    85.20 % top-1 after the last epoch (seed 0), two and a half minutes on two x86-64 cores.
    """
    return _sample("sample-vit", "softmax", num_heads=4)


def sample_v2() -> RunConfig:
    """Diff-ViT V2 under the budget of `sample`, its MLP narrower by what its queries take.

        pretrain.py sample-v2

    86.25 % top-1 after the last epoch (seed 0), two and a half minutes on two x86-64 cores.
    """
    return _sample("sample-v2", "diff_v2", num_heads=4, mlp_ratio=1.5)


def _sample(name: str, variant: Variant, num_heads: int, mlp_ratio: float = 2.0) -> RunConfig:
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
            mlp_ratio=mlp_ratio,
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

        pretrain.py folder --data.path FOLDER --rehearse
        pretrain.py folder --data.path FOLDER

    What it reaches, and in what time, depends on the images: the first of the commands says how long it will take.

    Source: arXiv 2205.01580, "Better plain ViT baselines for ImageNet-1k": batch 1024, lr 1e-3, weight decay 0.1,
    RandAugment(2, 10), mean pooling, fixed sin-cos positions; with torchvision's operations and crops (of at least 8 %
    of an image, there 5 %), without its mixup and 10,000 warm-up steps, which suit data of ImageNet's size.
    """
    return RunConfig(
        name="folder",
        model=model_preset("small", "diff", class_token=False, pool="avg", pos_embed="sincos2d"),
        data=DataConfig(path=""),
        augment=AugmentConfig(crop="inception", rand_augment_layers=2, rand_augment_magnitude=30, policy_fill=128),
        optim=OptimConfig(epochs=90, batch_size=1024, lr=1e-3, warmup_epochs=5, weight_decay=0.1),
        scale=ScaleConfig(micro_batch_size=64),  # all 1,024 at once fit no laptop
    )


def finetune() -> RunConfig:
    """What ray_jobs/finetune.py starts from: few epochs, a small rate that shrinks from block to block.

        finetune.py --init.weights runs/folder --data.path FOLDER

    What it reaches, and in what time, depends on the weights and the images: --rehearse says how long it will take.

    Source: MAE's fine-tuning (arXiv 2111.06377 and main_finetune.py): AdamW, layer-wise decay 0.75, weight decay 0.05,
    smoothing 0.1; without its RandAugment, erasing, mixup, CutMix and drop path of 0.1, with crops of 0.3 of an image
    at least (there 0.08) and in fewer epochs, for smaller data. Its base rate of 1e-3 is for batches of 256, this one
    for 128. Gradients are clipped here, images resized bilinearly (there bicubically), a new head starts from a
    deviation of 0.02 (there 2e-5), and the rate ends at 0 (there 1e-6).
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


def flowers() -> RunConfig:
    """Fine-tunes timm's ImageNet-trained Diff-ViT (V1, 13.4 million parameters, 256 px) on Flowers102.

        prepare.py --source torchvision:Flowers102 --root DIR --download --out flowers
        finetune.py flowers --data.path flowers

    The training is that of `finetune`, with more passes over the 1,020 training images. Not run here: the weights come
    from the Hugging Face hub (which needs the extra `timm`; a file of them is named by --init.weights), the images from
    Oxford (torchvision needs scipy for them). No published score is known to us. Meant for one GPU, in minutes (100
    epochs of 1,020 images, not measured); `finetune.py flowers --rehearse` tells what yours would take.
    """
    base = finetune()
    model = ModelConfig(
        variant="diff",
        image_size=256,
        num_classes=102,
        embed_dim=256,
        depth=14,
        num_heads=4,
        mlp_ratio=5.0,
        init_values=1e-5,
        class_token=False,
        no_embed_class=True,
        reg_tokens=1,
        pool="avg",
    )
    return dataclasses.replace(
        base,
        name="flowers",
        init=InitConfig(weights="hf-hub:timm/vit_dwee_patch16_reg1_gap_256.sbb_nadamuon_in1k"),
        model=model,
        data=DataConfig(path="", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        augment=dataclasses.replace(base.augment, interpolation="bicubic", eval_crop_ratio=0.95),
        optim=dataclasses.replace(base.optim, epochs=100, warmup_epochs=5),
    )


def fashion_mnist() -> RunConfig:
    """A small ViT on the whole of Fashion-MNIST, 50 epochs, at the size of a public one, s-chh's.

        prepare.py --source torchvision:FashionMNIST --root DIR --download --out fashion-mnist
        pretrain.py fashion-mnist --data.path fashion-mnist

    Seed 0 in bf16, after the last epoch: plain 93.47, V1 with half the heads 93.06, V2 93.29 %. Two hours for
    each on one core of an AMD EPYC, with other work beside them.

    s-chh's plain ViT has 210,058 parameters and the same patches, width, blocks, heads and MLP; its 92.3 % is the best
    of 200 test epochs of one run. The training is our own. Muon was ahead of AdamW on the sample, judged on its test
    images (85.85 to 83.95 %, or to 85.05 % in two processes; V1, one seed): it is not shown to be better.
    """
    return RunConfig(
        name="fashion-mnist",
        model=ModelConfig(
            variant="softmax",
            image_size=28,
            patch_size=4,
            in_channels=1,
            num_classes=10,
            embed_dim=64,
            depth=6,
            num_heads=4,
            mlp_ratio=2.0,
            class_token=False,
            pool="avg",
        ),
        data=DataConfig(path=""),
        augment=AugmentConfig(crop="pad", padding=2, erasing=0.1, eval_crop_ratio=1.0),
        optim=OptimConfig(
            epochs=50,
            batch_size=256,
            optimizer="muon",
            lr=3e-3,
            beta2=0.98,
            warmup_epochs=1,
            label_smoothing=0.1,
        ),
    )


def fashion_mnist_fast() -> RunConfig:
    """A Diff-ViT (V1) of 196,030 parameters that is to reach 90 % on Fashion-MNIST as soon as possible, on two cores.

        prepare.py --source torchvision:FashionMNIST --root DIR --download --out fashion-mnist
        pretrain.py fashion-mnist-fast --data.path fashion-mnist

    90 % after 6 minutes on an idle machine, start-up left out, and 90.71 % after the last epoch (mean of three seeds;
    RESULTS.md). Large patches (16 tokens), few and wide blocks, Muon, and a rate that ends at 0; chosen by the accuracy
    on the same test images, of short runs of one seed. `benchmarks/time_to_accuracy.py` measures it beside s-chh's ViT.
    """
    return RunConfig(
        name="fashion-mnist-fast",
        model=ModelConfig(
            variant="diff",
            image_size=28,
            patch_size=7,
            in_channels=1,
            num_classes=10,
            embed_dim=88,
            depth=3,
            num_heads=2,
            mlp_ratio=2.0,
            class_token=False,
            pool="avg",
        ),
        data=DataConfig(path=""),
        augment=AugmentConfig(crop="pad", padding=1, eval_crop_ratio=1.0),
        optim=OptimConfig(
            epochs=14,
            batch_size=256,
            optimizer="muon",
            lr=3e-3,
            beta2=0.98,
            warmup_epochs=0.5,
            label_smoothing=0.1,
        ),
        scale=ScaleConfig(workers=2),
    )


def cifar10_small() -> RunConfig:
    """A small ViT on CIFAR-10, 16 epochs: for a machine of two cores, where the recipe cifar10 takes days.

        prepare.py --source torchvision:CIFAR10 --root DIR --download --out cifar10
        pretrain.py cifar10-small --data.path cifar10

    From JPEG copies, bf16, after the last epoch, means of three seeds: plain 80.57, V1 with half the heads 79.43, V2
    80.43 %; 50 to 60 minutes each on one core of an AMD EPYC that was shared. Half a million parameters; few and wide
    blocks, Muon and little augmentation, because the epochs are few.
    """
    return RunConfig(
        name="cifar10-small",
        model=ModelConfig(
            variant="softmax",
            image_size=32,
            patch_size=4,
            num_classes=10,
            embed_dim=128,
            depth=4,
            num_heads=4,
            mlp_ratio=2.0,
            class_token=False,
            pool="avg",
        ),
        data=DataConfig(path=""),
        augment=AugmentConfig(crop="pad", padding=2, eval_crop_ratio=1.0),
        optim=OptimConfig(
            epochs=16,
            batch_size=128,
            optimizer="muon",
            lr=3e-3,
            beta2=0.98,
            warmup_epochs=1,
            label_smoothing=0.1,
        ),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "sample": sample,
    "sample-vit": sample_vit,
    "sample-v2": sample_v2,
    "folder": folder,
    "finetune": finetune,
    "flowers": flowers,
    **PUBLISHED,
    **in_variants("fashion-mnist", fashion_mnist, mlp_ratio=1.5),
    "fashion-mnist-fast": fashion_mnist_fast,
    **in_variants("cifar10-small", cifar10_small, mlp_ratio=1.5),
}
DEFAULT_RECIPE = "sample"
