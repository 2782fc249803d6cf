from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffvit.analysis.robustness import CORRUPTIONS, corrupt


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_repeat_and_grow(kind: Any) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 24, 24), dtype=np.uint8)
    before = images.copy()
    changes = []
    for severity in (1, 2, 3):
        worse = corrupt(images, kind, severity, patch_size=6, seed=1)
        assert (worse.shape, worse.dtype) == (images.shape, np.uint8)
        np.testing.assert_array_equal(worse, corrupt(images, kind, severity, patch_size=6, seed=1))
        changes.append(np.abs(worse.astype(float) - images).mean())
    assert 0 < changes[0] < changes[1] < changes[2]
    np.testing.assert_array_equal(images, before)
    with pytest.raises(ValueError, match="severity must be 1, 2 or 3, got 4"):
        corrupt(images, kind, 4, patch_size=6, seed=1)


def test_corruptions_by_hand() -> None:
    grey = np.full((8, 1, 40, 40), 100, np.uint8)
    noisy = corrupt(grey, "noise", 1, patch_size=10, seed=0).astype(float)
    assert noisy.mean() == pytest.approx(100, abs=1)
    assert noisy.std() == pytest.approx(0.08 * 255, rel=0.03)
    covered = (corrupt(grey, "occlusion", 1, patch_size=10, seed=0) == 128)[:, 0, ::10, ::10]
    assert (covered.sum(axis=(1, 2)) == 4).all()  # a quarter of 16 patches in every image
    assert len({c.tobytes() for c in covered}) > 1
    point = np.zeros((1, 1, 100, 100), np.uint8)
    point[0, 0, 50, 50] = 255
    spread_out = corrupt(point, "blur", 2, patch_size=10, seed=0)[0, 0].astype(float)
    assert spread_out[50, 50] == pytest.approx(255 / (2 * np.pi * 3**2), abs=1)  # sigma 3
    assert spread_out[50, 53] == pytest.approx(255 / (2 * np.pi * 3**2) * np.exp(-0.5), abs=1)
