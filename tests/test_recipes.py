"""The published values, written down a second time, and what the variants of a recipe share."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from conftest import with_fields

from diffvit.config import RunConfig, differing_fields, from_json, to_json
from diffvit.data.datasets import open_dataset
from diffvit.models.pretrained import TIMM_MODELS
from diffvit.models.vit import VisionTransformer
from diffvit.recipes import RECIPES
from diffvit.training.resolve import resolve

EVERYWHERE = {
    "model.proj_bias": True, "model.init_values": None, "model.reg_tokens": 0, "model.no_embed_class": False,
    "optim.optimizer": "adamw", "optim.layer_decay": 1, "optim.beta1": 0.9, "optim.beta2": 0.999, "optim.ema_decay": 0,
    "augment.color_jitter": 0, "augment.flip": 0.5, "model.in_channels": 3, "optim.no_decay": (),
}  # fmt: skip
OURS = {  # what no paper has, or another field of the table decides
    "model.variant", "model.position_grid", "model.lambda_init", "model.lambda_max", "model.head_norm",
    "optim.epochs", "optim.muon_lr", "optim.muon_momentum", "optim.max_skipped_steps", "optim.max_rollbacks",
}  # fmt: skip
BIG_VISION = EVERYWHERE | {
    "model.patch_size": 16, "model.embed_dim": 384, "model.depth": 12, "model.num_heads": 6, "model.mlp_ratio": 4,
    "model.pool": "avg", "model.pos_embed": "sincos2d", "model.class_token": False, "model.drop_path": 0,
    "model.image_size": 224, "model.num_classes": 1000, "model.qkv_bias": True,
    "optim.batch_size": 1024, "optim.lr": 1e-3, "optim.weight_decay": 0.1, "optim.warmup_steps": 10_000,
    "optim.clip_norm": 1.0, "optim.min_lr_ratio": 0, "optim.label_smoothing": 0, "optim.warmup_epochs": 0,
    "augment.crop": "inception_tf", "augment.crop_scale": (0.05, 1.0), "augment.auto_augment": "none",
    "augment.rand_augment": "big_vision",
    "augment.rand_augment_layers": 2, "augment.rand_augment_magnitude": 10 * 3, "augment.rand_augment_magnitude_std": 0,
    "augment.rand_augment_probability": 1, "augment.policy_fill": 128, "augment.interpolation": "bilinear",
    "augment.mixup": 0.2, "augment.mix_probability": 1, "augment.cutmix": 0, "augment.erasing": 0,
    "augment.repeats": 1, "augment.eval_crop_ratio": 224 / 256,
    "data.mean": (0.5, 0.5, 0.5), "data.std": (0.5, 0.5, 0.5), "data.val_fraction": 0.01,
}  # fmt: skip
DEIT = EVERYWHERE | {
    "model.patch_size": 16, "model.depth": 12, "model.class_token": True, "model.pool": "token",
    "model.drop_path": 0.1, "optim.epochs": 300, "optim.batch_size": 1024, "optim.lr": 5e-4 * 1024 / 512,
    "optim.weight_decay": 0.05, "optim.warmup_epochs": 5, "optim.label_smoothing": 0.1, "optim.clip_norm": 0,
    "model.image_size": 224, "model.num_classes": 1000, "model.qkv_bias": True, "model.mlp_ratio": 4,
    "optim.min_lr_ratio": 1e-5 / 1e-3, "optim.warmup_steps": None, "model.pos_embed": "learned",
    "augment.crop": "inception", "augment.policy_fill": (124, 116, 104), "augment.auto_augment": "none",
    "augment.rand_augment": "timm",
    "augment.rand_augment_magnitude": 9 * 3, "augment.rand_augment_magnitude_std": 0.5 * 3,
    "augment.rand_augment_layers": 2, "augment.rand_augment_probability": 0.5, "augment.interpolation": "bicubic",
    "augment.mixup": 0.8, "augment.cutmix": 1.0, "augment.mix_probability": 1, "augment.crop_scale": (0.08, 1.0),
    "augment.erasing": 0.25, "augment.erasing_fill": "noise",
    "augment.repeats": 3, "augment.eval_crop_ratio": 224 / 256,
    "data.mean": (0.485, 0.456, 0.406), "data.std": (0.229, 0.224, 0.225),
}  # fmt: skip
CIFAR = EVERYWHERE | {
    "data.mean": (0.4914, 0.4822, 0.4465), "data.std": (0.2470, 0.2435, 0.2616),
    "model.image_size": 32, "model.patch_size": 4, "model.embed_dim": 192, "model.depth": 9, "model.num_heads": 12,
    "model.mlp_ratio": 2, "model.drop_path": 0.1, "optim.epochs": 3 * 100, "optim.batch_size": 128, "optim.lr": 1e-3,
    "optim.weight_decay": 0.05, "optim.warmup_epochs": 3 * 10, "optim.label_smoothing": 0.1,
    "model.qkv_bias": False, "model.class_token": True, "model.pos_embed": "learned", "augment.padding": 4,
    "augment.crop": "pad", "augment.policy_fill": 128, "augment.mix_probability": 0.5, "model.pool": "token",
    "augment.eval_crop_ratio": 1, "optim.clip_norm": 0, "optim.min_lr_ratio": 1e-6 / 1e-3, "optim.warmup_steps": None,
    "augment.rand_augment_layers": 0, "augment.erasing_fill": "black",
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
    "cifar10": CIFAR | {"model.num_classes": 10},
    "cifar100": CIFAR
    | {"model.num_classes": 100, "data.mean": (0.5070, 0.4865, 0.4409), "data.std": (0.2673, 0.2564, 0.2762)},
    "fashion-mnist": {  # the size of s-chh's model; the training is our own
        "model.image_size": 28,
        "model.patch_size": 4,
        "model.in_channels": 1,
        "model.num_classes": 10,
        "model.embed_dim": 64,
        "model.depth": 6,
        "model.num_heads": 4,
        "model.mlp_ratio": 2,
        "augment.crop": "pad",
        "augment.padding": 2,
        "augment.flip": 0.5,
        "augment.eval_crop_ratio": 1,
        "optim.epochs": 200 // 4,
    },
}
PARAMETERS = {
    "imagenet-s16-90ep": 22_050_664 - 384 * (1 + 197),  # DeiT-S without class token and learned positions
    "deit-ti16": 5_717_416, "deit-s16": 22_050_664, "deit-b16": 86_567_656,  # timm's deit_*_patch16_224
    "deit-s16-v2": 23_852_392,
}  # fmt: skip
LARGEST = {"fashion-mnist": 210_058, "fashion-mnist-v1": 210_058, "fashion-mnist-v2": 210_058}  # s-chh's


def value(config: RunConfig, name: str) -> object:
    section, field = name.split(".")
    return getattr(getattr(config, section), field)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str) -> None:
    config = RECIPES[name]()
    assert {field: value(config, field) for field in PUBLISHED[name]} == PUBLISHED[name]
    assert config.model.variant == "softmax"


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "fashion-mnist"])
def test_no_hyperparameter_is_left_out_of_the_table(name: str) -> None:
    """But for details of what the recipe does not do."""
    config, table = RECIPES[name](), PUBLISHED[name]
    unused = {"rand_augment": not config.augment.rand_augment_layers, "crop_scale": config.augment.crop == "pad",
              "padding": config.augment.crop != "pad", "erasing_fill": not config.augment.erasing,
              "interpolation": config.augment.crop == "pad"}  # fmt: skip
    for section in ("model", "optim", "augment"):
        for field in dataclasses.fields(getattr(config, section)):
            skipped = any(field.name.startswith(prefix) and off for prefix, off in unused.items())
            assert skipped or f"{section}.{field.name}" in table.keys() | OURS, field.name


def test_folder_is_big_visions_but_for_what_it_says() -> None:
    config = RECIPES["folder"]()
    assert {field for field, published in BIG_VISION.items() if value(config, field) != published} == {
        "augment.mixup", "augment.crop", "augment.crop_scale", "augment.rand_augment",
        "optim.warmup_steps", "optim.warmup_epochs",
        "model.num_heads", "model.num_classes", "data.mean", "data.std", "data.val_fraction",  # V1's; the images' own
    }  # fmt: skip


def test_finetune_has_maes_hyperparameters() -> None:
    published = {
        "optim.optimizer": "adamw", "optim.lr": 1e-3 * 128 / 256, "optim.batch_size": 128, "optim.beta1": 0.9,
        "optim.beta2": 0.999, "optim.layer_decay": 0.75, "optim.weight_decay": 0.05, "optim.label_smoothing": 0.1,
    }  # fmt: skip
    config = RECIPES["finetune"]()
    assert {field: value(config, field) for field in published} == published


def test_a_recipes_command_names_it() -> None:
    for name, recipe in RECIPES.items():
        for told in re.findall(r"pretrain\.py (\S+)", recipe.__doc__ or ""):
            assert told == name


def num_parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in VisionTransformer(RECIPES[name]().model).parameters())


def test_sizes() -> None:
    assert {name: num_parameters(name) for name in PARAMETERS} == PARAMETERS
    for name, most in LARGEST.items():
        assert 0.97 * most < num_parameters(name) <= most, name


@pytest.mark.parametrize("name", PUBLISHED)
def test_variants_share_everything_but_attention(name: str) -> None:
    plain = RECIPES[name]()
    heads = plain.model.num_heads
    expected = {"-v1": ("diff", -(-heads // 2)), "-v1-heads": ("diff", heads), "-v2": ("diff_v2", heads)}
    for suffix, shape in expected.items():
        config = RECIPES[name + suffix]()
        assert (config.model.variant, config.model.num_heads) == shape
        smaller = {"model.mlp_ratio"} if (name, suffix) == ("fashion-mnist", "-v2") else set()
        assert set(differing_fields(plain, config)) <= {"model.variant", "model.num_heads"} | smaller


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_is_and_survives_json(name: str) -> None:
    config = RECIPES[name]()
    assert from_json(to_json(config), name) == config
    assert len((RECIPES[name].__doc__ or "").strip()) > 30
    assert config.name == name


def test_flowers_is_the_model_whose_weights_it_names() -> None:
    config = RECIPES["flowers"]()
    (model,) = (model for name, model in TIMM_MODELS.items() if name in config.init.weights)
    assert dataclasses.replace(config.model, num_classes=0) == model
    assert config.model.num_classes == 102


def test_variants_of_a_recipe_say_all_that_it_says() -> None:
    details = (RECIPES["deit-s16"].__doc__ or "").strip().partition("\n")[2]
    assert "What differs" in details
    assert all(
        (RECIPES[f"deit-s16{suffix}"].__doc__ or "")
        .strip()
        .endswith(details.replace(" deit-s16 ", f" deit-s16{suffix} "))
        for suffix in ("-v1", "-v1-heads", "-v2")
    )


def test_a_recipe_of_other_data_is_refused_with_the_way_to_train_it(tiny_config: RunConfig) -> None:
    recipe, dataset = RECIPES["imagenet-s16-90ep"](), open_dataset(tiny_config.data)
    with pytest.raises(ValueError, match=r"number of classes in the data, 3, got 1000; .* --model\.num-classes 0"):
        resolve(recipe, dataset)
    assert resolve(with_fields(recipe, model={"num_classes": 0}), dataset).model.num_classes == 3
