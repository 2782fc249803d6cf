"""FLOPs against a count by hand; the share of a peak."""

from __future__ import annotations

import pytest

from diffvit.config import InitConfig, ModelConfig, RunConfig
from diffvit.console import format_flops
from diffvit.models.flops import training_flops
from diffvit.training.utilisation import arithmetic

CHANNELS, PATCH, GRID, WIDTH, DEPTH, HIDDEN, CLASSES = 3, 5, 3, 24, 2, 36, 7
TOKENS = GRID**2 + 1


def shape(variant: str, heads: int) -> ModelConfig:
    return ModelConfig(
        variant=variant, image_size=PATCH * GRID, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=heads,
        mlp_ratio=HIDDEN / WIDTH, num_classes=CLASSES,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "heads", "qkv_rows", "map_dims", "extra_rows"),
    [
        ("softmax", 3, 3 * WIDTH, WIDTH, 0),
        ("diff", 2, 3 * WIDTH, WIDTH, 0),  # 2 x 2 maps of 6: as many numbers as 3 maps of 8
        ("diff_v2", 3, 4 * WIDTH, 2 * WIDTH, 3),  # two maps of full width, and W of lambda
    ],
)
def test_forward_and_backward_by_hand(variant: str, heads: int, qkv_rows: int, map_dims: int, extra_rows: int) -> None:
    """A product of (a, b) and (b, c) is 2abc; backward is one such product for each of the two factors."""
    patches = 2 * GRID**2 * (CHANNELS * PATCH**2) * WIDTH
    rows = qkv_rows + extra_rows + WIDTH + 2 * HIDDEN  # Q, K, V, lambda; projection; the MLP's two layers
    linear = 2 * TOKENS * WIDTH * rows
    attention = 2 * TOKENS**2 * map_dims + 2 * TOKENS**2 * WIDTH  # Q K', and the maps with V
    head = 2 * WIDTH * CLASSES
    forward = DEPTH * (linear + attention) + head
    # nobody wants the gradient of the image, so the patches' backward is one product and not two
    assert training_flops(shape(variant, heads)) == 3 * forward + 2 * patches


def test_of_a_linear_probe_only_the_head_has_a_backward_pass() -> None:
    config = shape("diff", 2)
    head, patches = 2 * WIDTH * CLASSES, 2 * GRID**2 * (CHANNELS * PATCH**2) * WIDTH
    forward = (training_flops(config) - 2 * patches) // 3 + patches
    assert training_flops(config, "head") == forward + head
    run = RunConfig(model=config, init=InitConfig(weights="x", train="head"))
    assert arithmetic({"images_per_second": 1.0, "world_sizes": [1]}, run)["flops_per_image"] == forward + head


def test_vit_s_is_three_times_its_published_4_6_billion_multiply_adds() -> None:
    config = ModelConfig(variant="softmax", num_heads=6, num_classes=1000)
    assert training_flops(config) == pytest.approx(3 * 2 * 4.6e9, rel=0.02)


def test_utilisation_is_the_share_of_all_workers_peak() -> None:
    config = shape("diff", 2)
    flops = training_flops(config)
    results = {"images_per_second": 3e12 / flops, "world_sizes": [1, 4], "device": "NVIDIA L4"}
    run = RunConfig(model=config)
    assert arithmetic(results, run)["flops_per_second"] == pytest.approx(3e12)
    assert arithmetic(results, run)["utilisation"] == pytest.approx(3 / (4 * 121))
    assert arithmetic({**results, "device": "cpu"}, run)["utilisation"] is None
    assert arithmetic({}, run) == {}


def test_rates_are_readable() -> None:
    assert format_flops(3.46e9) == "3.5 GFLOP/s"
    assert format_flops(1.2345e15) == "1,234.5 TFLOP/s"
