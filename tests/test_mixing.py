"""Mixup and CutMix: the same pairs and shares whatever the number of workers, and targets that match the pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from diffvit.config import AugmentConfig
from diffvit.data.batches import SKIPPED_LABEL
from diffvit.training.mixing import cut_box, mix

S = 8


def flat_images(labels: Tensor) -> Tensor:
    """Image i is all label i, so the share of each sample can be read off the pixels."""
    return labels.float().view(-1, 1, 1, 1).expand(-1, 3, S, S).clone()


@pytest.mark.parametrize("config", [AugmentConfig(mixup=0.8), AugmentConfig(cutmix=1.0)], ids=["mixup", "cutmix"])
def test_targets_match_pixels(config: AugmentConfig) -> None:
    labels = torch.tensor([0, 10, 20, 50])
    shares = set()
    for step in range(20):
        images, targets = mix(flat_images(labels), labels, config, seed=0, step=step)
        assert targets.partner_labels.tolist() == [10, 0, 50, 20]
        expected = targets.own_share * labels + (1 - targets.own_share) * targets.partner_labels
        torch.testing.assert_close(images.mean((1, 2, 3)), expected.float())
        (share,) = set(targets.own_share.tolist())  # the same for all
        shares.add(share)
    assert len(shares) > 10


def test_does_not_depend_on_the_number_of_workers() -> None:
    labels = torch.arange(8)
    config = AugmentConfig(mixup=0.8, cutmix=1.0)
    whole, targets = mix(flat_images(labels), labels, config, seed=3, step=5)
    for first in (0, 4):
        part = labels[first : first + 4]
        images, part_targets = mix(flat_images(part), part, config, seed=3, step=5)
        assert torch.equal(images, whole[first : first + 4])
        assert torch.equal(part_targets.own_share, targets.own_share[first : first + 4])


def test_steps_and_seeds_differ_and_both_kinds_come() -> None:
    labels = torch.arange(4)
    config = AugmentConfig(mixup=1.0, cutmix=1.0)
    shares = {mix(flat_images(labels), labels, config, s, t)[1].own_share[0].item() for s in (0, 1) for t in range(5)}
    assert len(shares) > 8
    pixels = [len(mix(flat_images(labels), labels, config, 0, t)[0][1].unique()) for t in range(20)]
    assert {1, 2} <= set(pixels)  # blended to one value, or pasted: two


def test_a_skipped_sample_mixes_with_nobody() -> None:
    labels = torch.tensor([5, SKIPPED_LABEL, 7, 9])
    images, targets = mix(flat_images(labels), labels, AugmentConfig(mixup=1.0), seed=0, step=0)
    assert targets.own_share[:2].tolist() == [1.0, 1.0]
    assert targets.own_share[2] < 1
    assert images[0].unique().tolist() == [5.0]


def test_off_by_default() -> None:
    labels = torch.arange(3)
    images = flat_images(labels)
    mixed, targets = mix(images, labels, AugmentConfig(), seed=0, step=0)
    assert mixed is images
    assert targets.partner_labels is None


def test_cut_box_by_hand() -> None:
    """A quarter of the area, centred or sticking out at a corner."""

    class Centre:
        def __init__(self, y: int, x: int) -> None:
            self.at = (y, x)

        def integers(self, side: int, size: int) -> tuple[int, int]:
            return self.at

    assert cut_box(8, 0.75, Centre(4, 4)) == (slice(2, 6), slice(2, 6), 0.75)
    assert cut_box(8, 0.75, Centre(0, 7)) == (slice(0, 2), slice(5, 8), 1 - 6 / 64)
    y, x, share = cut_box(8, 1.0, np.random.default_rng(0))
    assert (y.stop - y.start) * (x.stop - x.start) == 0
    assert share == 1.0


def test_a_share_of_the_steps_mixes_nothing() -> None:
    labels = torch.tensor([0, 10])
    config = AugmentConfig(mixup=1.0, mix_probability=0.25)
    mixed = [mix(flat_images(labels), labels, config, 0, step)[1].partner_labels is not None for step in range(400)]
    assert 70 < sum(mixed) < 130
