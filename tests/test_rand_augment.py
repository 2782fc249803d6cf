"""RandAugment's operations beside timm's own, and Big Vision's beside values computed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffvit.config import AugmentConfig
from diffvit.data import rand_augment
from diffvit.data.images import train_transform
from diffvit.data.rand_augment import RandAugment

timm_ops = pytest.importorskip("timm.data.auto_augment")

FILL = (124, 116, 104)
TIMM = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd",
    "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing",
    "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip
BIG_VISION = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast", "Brightness",
    "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd",
)  # fmt: skip


@pytest.fixture
def one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation is turned around by chance."""
    monkeypatch.setattr(rand_augment, "_either_way", lambda amount: amount)
    monkeypatch.setattr(timm_ops, "_randomly_negate", lambda amount: amount)


def picture(side: int = 64) -> Tensor:
    ramp = np.add.outer(np.linspace(0, 120, side), np.linspace(20, 100, side))[..., None]
    noisy = ramp + np.random.default_rng(0).normal(0, 8, (side, side, 3)) + np.array([0, 15, 30])
    return torch.from_numpy(np.clip(noisy, 0, 255).astype(np.uint8)).permute(2, 0, 1)


def operation(program: str, name: str, fill: Any = FILL) -> rand_augment.Operation:
    names = {"timm": TIMM, "big_vision": BIG_VISION}[program]
    operations = rand_augment._OPERATIONS[program](fill)
    assert len(operations) == len(names)
    return operations[names.index(name)]


@pytest.mark.parametrize("magnitude", [3.0, 9.0])
@pytest.mark.parametrize("name", TIMM)
def test_operations_are_timms(one_way: None, name: str, magnitude: float) -> None:
    image = picture()
    hparams = {"img_mean": FILL, "interpolation": Image.Resampling.BILINEAR}
    theirs = timm_ops.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)
    expected = torch.from_numpy(np.array(theirs(Image.fromarray(image.permute(1, 2, 0).numpy())))).permute(2, 0, 1)
    if name.startswith("Translate"):  # towards the other side, either of which is as likely
        axis = 2 if "X" in name else 1
        image, expected = image.flip(axis), expected.flip(axis)
    ours = operation("timm", name)(image, magnitude / 10)
    inner = (slice(None), slice(2, -2), slice(2, -2)) if name in ("Rotate", "ShearX", "ShearY") else ...
    difference = (ours.int() - expected.int())[inner].abs().float()
    assert difference.mean() < 1.2  # of 64 px, those along an uncovered edge differ
    assert difference.median() <= 1
    assert (ours.int() - image.int()).abs().float().mean() > 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Invert", [255, 205, 155, 105, 55, 0]),
        ("Posterize", [0, 48, 96, 144, 192, 240]),  # 4 bits are kept
        ("Solarize", [0, 50, 100, 150, 200, 255]),  # what is above 256
        ("SolarizeAdd", [110, 160, 210, 150, 200, 255]),
        ("Brightness", [0, 95, 190, 255, 255, 255]),
        ("Contrast", [0, 0, 13, 108, 203, 255]),  # away from 224 x 224 / 256 = 196
        ("Color", [0, 50, 100, 150, 200, 255]),  # grey stays grey
    ],
)
def test_big_visions_colours_at_their_largest_magnitude(name: str, expected: list[int]) -> None:
    levels = torch.tensor([0, 50, 100, 150, 200, 255], dtype=torch.uint8)
    image = levels.repeat_interleave(38)[:224].expand(3, 224, 224).contiguous()
    ours = operation("big_vision", name)(image, 1.0)
    assert ours[:, :, ::38].unique(dim=0).squeeze().unique(dim=0).shape == (1, 6)
    assert torch.allclose(ours[0, 0, ::38].int(), torch.tensor(expected, dtype=torch.int), atol=1)


def test_big_visions_shifts_and_turns(one_way: None) -> None:
    image = torch.full((3, 224, 224), 200, dtype=torch.uint8)

    def uncovered(name: str, at: Tensor = image, share: float = 1.0) -> Tensor:
        out = operation("big_vision", name)(at, share)
        assert out[:, out[0] != 200].unique(dim=1).flatten().tolist() == list(FILL)
        return out[0] != 200

    assert uncovered("TranslateX")[:, :100].all()
    assert uncovered("TranslateX").sum() == 100 * 224
    assert uncovered("TranslateY", share=0.5).sum() == 50 * 224
    assert uncovered("TranslateX", image[:, :112, :112]).sum() == 50 * 112
    assert uncovered("ShearX").float().mean() == pytest.approx(0.15, abs=0.01)
    assert uncovered("ShearY").float().mean() == pytest.approx(0.15, abs=0.01)
    assert 0.1 < uncovered("Rotate").float().mean() < 0.3
    sizes = {int(uncovered("Cutout").sum()) for _ in range(60)}
    assert max(sizes) == 80 * 80
    assert 40 * 40 <= min(sizes) < 80 * 80
    assert image.unique().tolist() == [200]


@pytest.mark.parametrize("program", ["torchvision", "big_vision", "timm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_strength_gives_an_image_and_strength_shows(program: str, channels: int) -> None:
    image = picture()[:channels]
    changes = []
    for magnitude in (0, 15, 30):
        options = AugmentConfig(rand_augment_layers=2, rand_augment=program, rand_augment_magnitude=magnitude)
        augment, change = RandAugment(options), 0.0
        for seed in range(100):
            torch.default_generator.manual_seed(seed)
            out = augment(image)
            assert (out.shape, out.dtype) == (image.shape, torch.uint8)
            change += (out.int() - image.int()).abs().float().mean().item()
        changes.append(change / 100)
    assert changes[1] != changes[2]
    assert program == "big_vision" or changes[0] < changes[1] < changes[2]  # whose weakest enhancing is by 0.1


def test_every_operation_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def recording(fill: object) -> list[rand_augment.Operation]:
        return [lambda image, share, n=n: drawn.append(n) or image for n in range(5)]  # type: ignore[misc]

    monkeypatch.setitem(rand_augment._OPERATIONS, "timm", recording)
    augment = RandAugment(AugmentConfig(rand_augment_layers=2, rand_augment="timm"))
    torch.default_generator.manual_seed(0)
    for _ in range(250):
        augment(picture())
    assert all(60 < drawn.count(n) < 140 for n in range(5))


def test_tensorflows_crop_takes_small_parts_more_often() -> None:
    image = torch.zeros(3, 375, 500, dtype=torch.uint8)

    def areas(crop: str, count: int) -> Tensor:
        augment = AugmentConfig(crop=crop, crop_scale=(0.05, 1.0))  # type: ignore[arg-type]
        transform = train_transform(augment, 224).transforms[0]
        torch.default_generator.manual_seed(0)
        drawn = [transform.make_params([image]) for _ in range(count)]
        for part in drawn:
            assert 0 <= part["top"] <= 375 - part["height"]
            assert 0 <= part["left"] <= 500 - part["width"]
            assert 0.73 < part["width"] / part["height"] < 1.36
        return torch.tensor([part["height"] * part["width"] for part in drawn]) / (375 * 500)

    theirs, torchvisions = areas("inception_tf", 3000), areas("inception", 3000)
    assert theirs.min() > 0.045
    assert theirs.mean() == pytest.approx(0.34, abs=0.02)  # by a separate simulation of TensorFlow's operation
    assert theirs.median() == pytest.approx(0.30, abs=0.02)
    assert (theirs < 0.25).float().mean() == pytest.approx(0.43, abs=0.03)
    assert torchvisions.mean() == pytest.approx(0.42, abs=0.02)


def test_tensorflows_crop_of_a_strip_is_all_of_it() -> None:
    transform = train_transform(AugmentConfig(crop="inception_tf", crop_scale=(0.5, 1.0)), 16).transforms[0]
    whole = {"top": 0, "left": 0, "height": 3, "width": 400}
    assert transform.make_params([torch.zeros(3, 3, 400, dtype=torch.uint8)]) == whole
