"""The model against timm's, with the same weights, and against its own rules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import nn

from diffvit.config import ModelConfig, model_preset
from diffvit.models.vit import DropPath, VisionTransformer, resample_positions, sincos_positions

SMALL: dict[str, Any] = {
    "image_size": 21,
    "patch_size": 7,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 5,
}


def randomised(model: nn.Module) -> nn.Module:
    """Fresh LayerScale, lambda and biases would hide differences."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + 0.02)
    return model


def timm_twin(**options: Any) -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(
        img_size=21, patch_size=7, embed_dim=24, depth=3, num_classes=5, **options
    )


PAIRS = {
    "class token": (ModelConfig(variant="softmax", **SMALL), lambda: timm_twin(num_heads=2)),
    "everything": (
        ModelConfig(variant="softmax", reg_tokens=2, init_values=0.1, mlp_ratio=3, qkv_bias=False, pool="avg", **SMALL),
        lambda: timm_twin(
            num_heads=2, reg_tokens=2, init_values=0.1, mlp_ratio=3, qkv_bias=False, global_pool="avg"
        ),
    ),
    "no class token": (
        ModelConfig(variant="softmax", class_token=False, reg_tokens=1, no_embed_class=True, pool="avg", **SMALL),
        lambda: timm_twin(num_heads=2, class_token=False, reg_tokens=1, no_embed_class=True, global_pool="avg"),
    ),
    "V1": (ModelConfig(variant="diff", **SMALL), lambda: timm_twin(num_heads=2, attn_layer="diff")),
    "vit_tiny_patch16_224": (
        model_preset("tiny", "softmax", num_classes=1000),
        lambda: timm.create_model("vit_tiny_patch16_224"),
    ),
    "vit_dwee_patch16_reg1_gap_256": (
        ModelConfig(
            variant="diff", image_size=256, embed_dim=256, depth=14, num_heads=4, mlp_ratio=5, init_values=1e-5,
            class_token=False, no_embed_class=True, reg_tokens=1, pool="avg", num_classes=1000,
        ),
        lambda: timm.create_model("vit_dwee_patch16_reg1_gap_256"),
    ),
    "vit_dlittle_patch16_reg1_gap_256": (
        ModelConfig(
            variant="diff", image_size=256, embed_dim=320, depth=14, num_heads=5, mlp_ratio=5.6, init_values=1e-5,
            class_token=False, no_embed_class=True, reg_tokens=1, pool="avg", num_classes=1000,
        ),
        lambda: timm.create_model("vit_dlittle_patch16_reg1_gap_256"),
    ),
}  # fmt: skip


_LARGE = ("vit_tiny_patch16_224", "vit_dwee_patch16_reg1_gap_256", "vit_dlittle_patch16_reg1_gap_256")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in _LARGE)) for n in PAIRS])
def test_same_logits_and_gradients_as_timm(name: str) -> None:
    config, build = PAIRS[name]
    theirs = randomised(build()).double()
    ours = VisionTransformer(config).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, config.image_size, config.image_size, dtype=torch.float64)
    logits, expected = ours(images), theirs(images)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-7)
    weights = torch.randn_like(logits)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    for key, parameter in ours.named_parameters():
        # timm rounds lambda to float32, whatever the model's dtype
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-6)


def test_another_image_size_resamples_as_timm_does() -> None:
    theirs = randomised(timm_twin(num_heads=2, dynamic_img_size=True)).double()
    ours = VisionTransformer(PAIRS["class token"][0]).double()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 35, 28, dtype=torch.float64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-6, atol=1e-7)


def test_a_side_that_the_patch_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"divisible by the patch of 7, got 22 x 21"):
        VisionTransformer(ModelConfig(**SMALL))(torch.zeros(1, 3, 22, 21))


@pytest.mark.parametrize("variant", ["softmax", "diff", "diff_v2"])
@pytest.mark.parametrize("pos_embed", ["learned", "sincos2d"])
def test_every_variant_runs_and_every_parameter_learns(variant: Any, pos_embed: Any) -> None:
    config = ModelConfig(variant=variant, pos_embed=pos_embed, reg_tokens=1, init_values=0.1, drop_path=0.2, **SMALL)
    torch.manual_seed(0)
    model = VisionTransformer(config)
    model(torch.randn(4, 3, 21, 21)).square().sum().backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert still == []
    assert ("pos_embed" in model.state_dict()) == (pos_embed == "learned")


def test_activations_by_name() -> None:
    model = randomised(VisionTransformer(ModelConfig(reg_tokens=2, init_values=0.5, **SMALL))).eval()
    images = torch.randn(2, 3, 21, 21)
    features = model.forward_features(images)
    assert list(features) == ["blocks.0", "blocks.1", "blocks.2", "norm", "pooled"]
    assert features["blocks.1"].shape == (2, 1 + 2 + 9, 24)
    torch.testing.assert_close(model.head(features["pooled"]), model(images))
    one = model.forward_features(images, ["blocks.1.mlp", "blocks.1.attn"])
    assert list(one) == ["blocks.1.attn", "blocks.1.mlp"]
    rebuilt = features["blocks.0"] + 0.0
    block = model.blocks[1]
    rebuilt = rebuilt + block.ls1(one["blocks.1.attn"])
    torch.testing.assert_close(rebuilt + block.ls2(one["blocks.1.mlp"]), features["blocks.1"])
    with pytest.raises(ValueError, match=r"got blocks.7$"):
        model.forward_features(images, ["blocks.7"])


@pytest.mark.parametrize(("variant", "layers"), [("softmax", 0), ("diff", 3), ("diff_v2", 0)])
def test_maps_and_lambdas_by_layer(variant: Any, layers: int) -> None:
    model = VisionTransformer(ModelConfig(variant=variant, **SMALL))
    maps = model.attention_maps(torch.randn(2, 3, 21, 21))
    assert [m.positive.shape for m in maps] == [(2, 2, 10, 10)] * 3
    assert len(model.lambdas()) == layers


def test_lambda_init_follows_depth_or_is_constant() -> None:
    by_depth = [block.attn.lambda_init for block in VisionTransformer(ModelConfig(**SMALL)).blocks]
    assert by_depth == pytest.approx([0.8 - 0.6 * math.exp(-0.3 * i) for i in range(3)])
    constant = VisionTransformer(ModelConfig(lambda_init=0.5, **SMALL))
    assert [block.attn.lambda_init for block in constant.blocks] == [0.5] * 3


def test_options_of_v1_reach_every_layer() -> None:
    model = VisionTransformer(ModelConfig(variant="diff", lambda_init=0.6, lambda_max=0.25, head_norm="layer", **SMALL))
    assert model.lambdas() == pytest.approx([0.25] * 3)
    assert all(isinstance(block.attn.sub_norm, nn.LayerNorm) for block in model.blocks)
    assert model.state_dict()["blocks.2.attn.sub_norm.bias"].shape == (12,)
    default = VisionTransformer(ModelConfig(variant="diff", lambda_init=0.6, **SMALL))
    assert all(isinstance(block.attn.sub_norm, nn.RMSNorm) for block in default.blocks)


def test_sincos_positions_by_hand() -> None:
    positions = sincos_positions(3, 8)[0]  # frequencies 1 and 1/10000
    row, column = 2, 1
    expected = [math.sin(column), math.sin(column / 1e4), math.cos(column), math.cos(column / 1e4),
                math.sin(row), math.sin(row / 1e4), math.cos(row), math.cos(row / 1e4)]  # fmt: skip
    assert positions[row * 3 + column].tolist() == pytest.approx(expected)


def test_resampling_keeps_the_prefix_and_a_constant() -> None:
    positions = torch.full((1, 2 + 9, 4), 3.0)
    positions[:, :2] = torch.tensor([7.0, 8.0])[None, :, None]
    resampled = resample_positions(positions, 2, (5, 4))
    assert resampled.shape == (1, 2 + 20, 4)
    assert resampled[0, :2, 0].tolist() == [7, 8]
    torch.testing.assert_close(resampled[:, 2:], torch.full((1, 20, 4), 3.0))


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer = DropPath(0.25)
    out = layer(torch.ones(4000, 3, 2))
    kept = out[:, 0, 0]
    assert sorted(kept.unique().tolist()) == pytest.approx([0, 1 / 0.75])
    assert torch.equal(out, kept[:, None, None].expand_as(out))
    assert kept.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(layer.eval()(torch.ones(2, 3)), torch.ones(2, 3))


def test_mean_gates_are_those_of_the_attention_maps() -> None:
    model = VisionTransformer(ModelConfig(variant="diff_v2", **SMALL)).eval()
    images = torch.randn(3, 3, SMALL["image_size"], SMALL["image_size"])
    with torch.no_grad():
        expected = [float(maps.weight.mean()) for maps in model.attention_maps(images)]
        assert model.mean_gates(images) == pytest.approx(expected)
    assert len(expected) == SMALL["depth"]


def test_drop_path_rises_with_depth() -> None:
    model = VisionTransformer(ModelConfig(drop_path=0.2, **SMALL))
    assert [getattr(block.drop_path, "rate", 0.0) for block in model.blocks] == pytest.approx([0, 0.1, 0.2])


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_presets_have_the_plain_models_parameters_within_a_percent(size: Any) -> None:
    def parameters(variant: Any) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in VisionTransformer(model_preset(size, variant, num_classes=1000)).parameters())

    published = {"tiny": 5_717_416, "small": 22_050_664, "base": 86_567_656, "large": 304_326_632}
    assert parameters("softmax") == published[size]
    assert parameters("diff") == pytest.approx(published[size], rel=0.01)
    assert 1.05 < parameters("diff_v2") / published[size] < 1.12  # a second set of queries
