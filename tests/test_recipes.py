"""The published values, written down a second time, and what the variants of a recipe share."""

from __future__ import annotations

import dataclasses

import pytest

from diffvit.config import RunConfig, differing_fields, from_json, to_json
from diffvit.recipes import RECIPES

BIG_VISION = {
    "model.patch_size": 16, "model.embed_dim": 384, "model.depth": 12, "model.num_heads": 6, "model.mlp_ratio": 4,
    "model.pool": "avg", "model.pos_embed": "sincos2d", "model.class_token": False, "model.drop_path": 0,
    "optim.batch_size": 1024, "optim.lr": 1e-3, "optim.weight_decay": 0.1, "optim.warmup_steps": 10_000,
    "optim.clip_norm": 1.0, "optim.min_lr_ratio": 0, "optim.label_smoothing": 0, "optim.ema_decay": 0,
    "augment.crop": "inception", "augment.flip": 0.5, "augment.rand_augment_layers": 2,
    "augment.rand_augment_magnitude": 10, "augment.mixup": 0.2, "augment.cutmix": 0, "augment.erasing": 0,
    "augment.repeats": 1,
}  # fmt: skip
DEIT = {
    "model.patch_size": 16, "model.depth": 12, "model.class_token": True, "model.pool": "token",
    "model.drop_path": 0.1, "optim.epochs": 300, "optim.batch_size": 1024, "optim.lr": 5e-4 * 1024 / 512,
    "optim.weight_decay": 0.05, "optim.warmup_epochs": 5, "optim.label_smoothing": 0.1, "optim.clip_norm": 0,
    "augment.rand_augment_magnitude": 9, "augment.rand_augment_magnitude_std": 0.5, "augment.rand_augment_layers": 2,
    "augment.mixup": 0.8, "augment.cutmix": 1.0, "augment.erasing": 0.25, "augment.crop_scale": (0.08, 1.0),
    "augment.repeats": 3,
}  # fmt: skip
CIFAR = {
    "model.image_size": 32, "model.patch_size": 4, "model.embed_dim": 192, "model.depth": 9, "model.num_heads": 12,
    "model.mlp_ratio": 2, "model.drop_path": 0.1, "optim.epochs": 3 * 100, "optim.batch_size": 128, "optim.lr": 1e-3,
    "optim.weight_decay": 0.05, "optim.warmup_epochs": 3 * 10, "optim.label_smoothing": 0.1,
    "augment.repeats": 1,  # an epoch there is 3 passes
    "augment.auto_augment": "cifar10", "augment.mixup": 1.0, "augment.cutmix": 1.0, "augment.erasing": 0.25,
}  # fmt: skip
PUBLISHED = {
    "imagenet-s16-90ep": BIG_VISION | {"optim.epochs": 90},
    "imagenet-s16-150ep": BIG_VISION | {"optim.epochs": 150},
    "imagenet-s16-300ep": BIG_VISION | {"optim.epochs": 300},
    "deit-ti16": DEIT | {"model.embed_dim": 192, "model.num_heads": 3},
    "deit-s16": DEIT | {"model.embed_dim": 384, "model.num_heads": 6},
    "deit-b16": DEIT | {"model.embed_dim": 768, "model.num_heads": 12},
    "cifar10": CIFAR,
    "cifar100": CIFAR,
}


def value(config: RunConfig, name: str) -> object:
    section, field = name.split(".")
    return getattr(getattr(config, section), field)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str) -> None:
    config = RECIPES[name]()
    assert {field: value(config, field) for field in PUBLISHED[name]} == PUBLISHED[name]
    assert config.model.variant == "softmax"


@pytest.mark.parametrize("name", [*PUBLISHED, "fashion-mnist"])
def test_variants_share_everything_but_attention(name: str) -> None:
    plain = RECIPES[name]()
    heads = plain.model.num_heads
    expected = {"-v1": ("diff", -(-heads // 2)), "-v1-heads": ("diff", heads), "-v2": ("diff_v2", heads)}
    for suffix, shape in expected.items():
        config = RECIPES[name + suffix]()
        assert (config.model.variant, config.model.num_heads) == shape
        assert set(differing_fields(plain, config)) <= {"model.variant", "model.num_heads"}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_is_and_survives_json(name: str) -> None:
    config = RECIPES[name]()
    assert from_json(to_json(config), name) == config
    assert len((RECIPES[name].__doc__ or "").strip()) > 30
    assert dataclasses.replace(config) == config
