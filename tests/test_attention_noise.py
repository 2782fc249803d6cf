"""Every figure of attention noise against small maps worked out by hand, and against loops on real models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffvit.analysis.attention_noise import AttentionNoise, patch_distances
from diffvit.analysis.features import high_norm_threshold, layer_names, patch_norms, representations
from diffvit.config import ModelConfig
from diffvit.models.attention import AttentionMaps
from diffvit.models.vit import VisionTransformer

# one class token and 2 x 2 patches of 3 pixels: N = 5
SHAPE: dict[str, Any] = {"image_size": 6, "patch_size": 3, "embed_dim": 12, "num_classes": 3}


class Fixed(nn.Module):
    """Attention that attends as it is told, and adds nothing."""

    def __init__(self, positive: Tensor, negative: Tensor | None = None, weight: Tensor | None = None) -> None:
        super().__init__()
        self.maps = AttentionMaps(positive, negative, weight, torch.tensor([6.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def attention_maps(self, x: Tensor) -> AttentionMaps:
        return self.maps


def measure(attention: nn.Module, images: int = 1, **options: Any) -> dict[str, Tensor]:
    model = VisionTransformer(ModelConfig(variant="softmax", depth=1, num_heads=2, **SHAPE)).eval()
    model.blocks[0].attn = attention
    noise = AttentionNoise()
    noise.update(model, torch.randn(images, 3, 6, 6, generator=torch.Generator().manual_seed(0)), **options)
    return noise.compute()


def rows(*values: float) -> Tensor:
    """(5, 5), every query attending alike."""
    return torch.tensor(values, dtype=torch.float32).expand(5, 5)


UNIFORM = rows(0.2, 0.2, 0.2, 0.2, 0.2)
ONE = rows(0, 1, 0, 0, 0)  # all on the first patch
TWO = rows(0, 0.5, 0, 0, 0.5)  # on the first and the last patch, a diagonal apart
CLASS = rows(1, 0, 0, 0, 0)


def test_entropy_of_each_branch() -> None:
    found = measure(Fixed(torch.stack([UNIFORM, ONE])[None], torch.stack([TWO, UNIFORM])[None], torch.tensor(0.5)))
    assert found["entropy_1"].tolist() == [pytest.approx([math.log(5), 0])]
    assert found["entropy_2"].tolist() == [pytest.approx([math.log(2), math.log(5)])]
    assert found["entropy_2_relative"].tolist() == [pytest.approx([math.log(2) / math.log(5), 1])]


def test_negative_share_and_lambda() -> None:
    # head 0: ONE - 0.5 TWO = 0.75 and -0.25; head 1: ONE - 0.5 ONE, nothing negative
    found = measure(Fixed(torch.stack([ONE, ONE])[None], torch.stack([TWO, ONE])[None], torch.tensor(0.5)))
    assert found["negative_share"].tolist() == [pytest.approx([0.25, 0])]
    assert found["effective_lambda"].tolist() == [[0.5, 0.5]]
    by_token = torch.stack([torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]), torch.ones(5)])[None, :, :, None]
    found = measure(Fixed(torch.stack([ONE, ONE])[None], torch.stack([TWO, ONE])[None], by_token))
    assert found["effective_lambda"].tolist() == [pytest.approx([0.2, 1])]


def test_mass_on_high_norm_patches_counts_weight_of_either_sign() -> None:
    high_norm = torch.tensor([[False, False, False, True]])
    maps = Fixed(torch.stack([ONE, UNIFORM])[None], torch.stack([TWO, CLASS])[None], torch.tensor(0.5))
    found = measure(maps, high_norm=high_norm)
    # head 1: |0.2 - 0.5| on the class token and 0.2 on each patch: 0.2 of 1.1
    assert found["high_norm_mass"].tolist() == [pytest.approx([0.25, 0.2 / 1.1])]


def test_distance_in_pixels() -> None:
    assert patch_distances(6, 3)[0].tolist() == pytest.approx([0, 3, 3, 3 * math.sqrt(2)])
    found = measure(Fixed(torch.stack([ONE, TWO])[None]))
    to_first = [0, 3, 3, 3 * math.sqrt(2)]
    to_both = [(a + b) / 2 for a, b in zip(to_first, reversed(to_first), strict=True)]
    assert found["distance_pixels"].tolist() == [pytest.approx([sum(to_first) / 4, sum(to_both) / 4])]


def test_queries_that_see_no_patch_have_no_distance() -> None:
    only_class = CLASS.clone()
    only_class[2] = torch.tensor([0.5, 0.5, 0, 0, 0])  # the second patch alone looks at the first, 3 pixels away
    found = measure(Fixed(torch.stack([only_class, CLASS])[None]))
    assert found["distance_pixels"][0, 0] == pytest.approx(3)
    assert math.isnan(found["distance_pixels"][0, 1])


def test_largest_logit_and_activation() -> None:
    found = measure(Fixed(torch.stack([ONE, ONE])[None]))
    assert found["largest_logit"].tolist() == [[6, 1]]
    model = VisionTransformer(ModelConfig(depth=2, num_heads=1, **SHAPE)).eval()
    images = torch.randn(3, 3, 6, 6)
    noise = AttentionNoise()
    noise.update(model, images[:2])
    noise.update(model, images[2:])
    out = torch.cat([model.forward_features(part)["blocks.1"] for part in (images[:2], images[2:])])
    found = noise.compute()
    assert found["largest_activation"].shape == (2, 1)
    assert found["largest_activation"][1].item() == pytest.approx(out.abs().max().item())
    to_rms = out.abs().max() / out.square().mean().sqrt()
    assert found["largest_activation_to_rms"][1].item() == pytest.approx(to_rms.item())


def test_head_similarity_is_the_cosine_of_maps() -> None:
    found = measure(Fixed(torch.stack([ONE, TWO, CLASS])[None]))
    cosine = 0.5 / math.sqrt(0.5)
    assert found["head_similarity"].tolist() == [pytest.approx([cosine / 2, cosine / 2, 0])]
    alone = measure(Fixed(ONE[None, None]))
    assert math.isnan(alone["head_similarity"].item())


def test_mass_inside_an_object() -> None:
    inside = torch.tensor([[True, False, False, False], [False, True, True, True]])
    maps = torch.stack([TWO, UNIFORM])[None].expand(2, 2, 5, 5)
    found = measure(Fixed(maps), images=2, inside=inside)
    # head 0: 1/2 of the first image and 1/2 of the second; head 1: as large as the masks, 1/4 and 3/4
    assert found["inside_mass"].tolist() == [pytest.approx([0.5, 0.5])]
    assert found["inside_lift"].tolist() == [pytest.approx([1, 1])]
    found = measure(Fixed(maps[:1]), images=1, inside=inside[:1])
    assert found["inside_lift"].tolist() == [pytest.approx([2, 1])]


def test_the_class_tokens_row_is_read_where_it_is_pooled() -> None:
    looks = ONE.clone()
    looks[0] = torch.tensor([0.0, 0, 0, 0, 1])  # the class token alone looks at the last patch
    inside = torch.tensor([[False, False, False, True]])
    maps = Fixed(torch.stack([looks, looks])[None])
    assert measure(maps, inside=inside)["inside_mass"].tolist() == [[1, 1]]
    model = VisionTransformer(ModelConfig(variant="softmax", depth=1, num_heads=2, pool="avg", **SHAPE)).eval()
    model.blocks[0].attn = maps
    noise = AttentionNoise()
    noise.update(model, torch.randn(1, 3, 6, 6), inside=inside)
    assert noise.compute()["inside_mass"].tolist() == [[0, 0]]


@pytest.mark.parametrize("variant", ["softmax", "diff", "diff_v2"])
def test_batches_add_up(variant: Any) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(ModelConfig(variant=variant, depth=3, num_heads=2, reg_tokens=1, **SHAPE)).eval()
    images = torch.randn(7, 3, 6, 6)
    masks = {"high_norm": torch.rand(7, 4) < 0.4, "inside": torch.rand(7, 4) < 0.6}
    masks["inside"][:, 0] = True
    whole, parts = AttentionNoise(), AttentionNoise()
    whole.update(model, images, **masks)
    for part in (slice(0, 2), slice(2, 3), slice(3, 7)):
        parts.update(model, images[part], **{name: mask[part] for name, mask in masks.items()})
    assert parts.images == whole.images == 7
    expected = whole.compute()
    for name, value in parts.compute().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
        assert value.shape == ((3, 1) if "activation" in name else (3, 2))
    assert ("entropy_2" in expected) == ("effective_lambda" in expected) == (variant != "softmax")
    if variant == "diff":
        torch.testing.assert_close(expected["effective_lambda"][:, 0].float(), torch.tensor(model.lambdas()))


@pytest.mark.parametrize("variant", ["softmax", "diff", "diff_v2"])
def test_the_largest_logit_is_that_of_either_map(variant: Any) -> None:
    attention = VisionTransformer(ModelConfig(variant=variant, depth=1, num_heads=2, **SHAPE)).blocks[0].attn
    x = 5 * torch.randn(3, 5, 12)
    rows = attention.qkv(x)
    maps, size = {"softmax": (2, 6), "diff": (4, 3), "diff_v2": (4, 6)}[variant]
    q, k = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in rows.split([maps * size, 12, 12], -1)[:2])
    k = k.repeat_interleave(2, dim=1) if variant == "diff_v2" else k  # both maps of a head share its keys
    logits = (q @ k.transpose(2, 3)).abs().amax(dim=(0, 2, 3)) / size**0.5
    expected = logits.view(2, -1).amax(dim=1)
    torch.testing.assert_close(attention.attention_maps(x).largest_logit, expected)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"inside must be a mask of patches, \(1, 4\); got \(1, 5\)"):
        measure(Fixed(torch.stack([ONE, ONE])[None]), inside=torch.ones(1, 5, dtype=torch.bool))


def test_high_norm_threshold_by_hand() -> None:
    # median 10, absolute deviations 0 1 1 2 2 90: lower median 1
    assert high_norm_threshold(torch.tensor([10.0, 9, 11, 8, 12, 100])) == 20  # 2 x 10 > 10 + 5 x 1.4826
    # median 10, deviations 0 4 4 5 5: 4
    assert high_norm_threshold(torch.tensor([10.0, 6, 14, 5, 15])) == pytest.approx(10 + 5 * 1.4826 * 4)
    assert not (torch.full((5,), 3.0) > high_norm_threshold(torch.full((5,), 3.0))).any()


def test_representations_with_and_without_patches() -> None:
    model = VisionTransformer(ModelConfig(variant="diff_v2", depth=2, num_heads=2, reg_tokens=2, **SHAPE)).eval()
    features = model.forward_features(torch.randn(3, 3, 6, 6), layer_names(model))
    found = representations(features, model)
    assert list(found) == ["class token", "patch mean", "attention output", "MLP output"]
    assert list(found["class token"]) == ["block 0", "block 1"]
    torch.testing.assert_close(found["class token"]["block 1"], features["blocks.1"][:, 0])
    torch.testing.assert_close(found["MLP output"]["block 0"], features["blocks.0.mlp"][:, 3:].mean(1))
    left_out = torch.tensor([[True, False, False, True], [False] * 4, [True] * 4])
    without = representations(features, model, left_out)
    patches = features["blocks.1.attn"][:, 3:]
    expected = torch.stack([patches[0, 1:3].mean(0), patches[1].mean(0), patches[2].mean(0)])
    torch.testing.assert_close(without["attention output"]["block 1"], expected)
    torch.testing.assert_close(without["class token"]["block 1"], found["class token"]["block 1"])
    assert patch_norms(features, model)[2, 3].item() == pytest.approx(features["blocks.1"][2, 6].norm().item())
    pooled = VisionTransformer(ModelConfig(depth=1, num_heads=1, class_token=False, pool="avg", **SHAPE)).eval()
    features = pooled.forward_features(torch.randn(3, 3, 6, 6), layer_names(pooled))
    assert "class token" not in representations(features, pooled)
