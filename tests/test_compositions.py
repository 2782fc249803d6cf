from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from diffvit.analysis.compositions import compose


def flat_images(count: int, channels: int = 3, side: int = 15) -> npt.NDArray[np.uint8]:
    """Image b is b + 1 everywhere at its border and 100 + b in its middle 9 x 9."""
    images = np.zeros((count, channels, side, side), np.uint8)
    images += np.arange(1, count + 1, dtype=np.uint8)[:, None, None, None]
    images[:, :, 3:12, 3:12] += 99
    return images


def test_the_object_lies_where_the_mask_says_and_nowhere_else() -> None:
    images = flat_images(7)
    made = compose(images, patch_size=3, seed=5, object_share=0.6)
    assert (made.images.shape, made.images.dtype) == ((7, 3, 15, 15), np.uint8)
    assert (made.inside.shape, made.inside.dtype) == ((7, 25), np.bool_)
    pixels = made.inside.reshape(7, 5, 5).repeat(3, axis=1).repeat(3, axis=2)
    for b in range(7):
        assert made.inside[b].sum() == 9
        assert set(made.images[b][:, pixels[b]].ravel()) == {100 + b}
        assert not {b + 1, 100 + b} & set(made.images[b][:, ~pixels[b]].ravel())  # clutter is of other images


def test_the_object_is_the_middle_of_its_image() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 20, 20), dtype=np.uint8)
    made = compose(images, patch_size=5, seed=1)  # 2 x 2 of 4 x 4 patches
    for b in range(3):
        rows, columns = np.nonzero(made.inside[b].reshape(4, 4))
        top, left = 5 * rows.min(), 5 * columns.min()
        np.testing.assert_array_equal(made.images[b, :, top : top + 10, left : left + 10], images[b, :, 5:15, 5:15])


def test_clutter_patches_are_pieces_of_other_images() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8), dtype=np.uint8)
    made = compose(images, patch_size=4, seed=3, object_share=0.1)
    outside = np.nonzero(~made.inside[0].reshape(2, 2))
    pieces = {images[1, :, top : top + 4, left : left + 4].tobytes() for top in range(5) for left in range(5)}
    for row, column in zip(*outside, strict=True):
        assert made.images[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].tobytes() in pieces


def test_the_seed_decides() -> None:
    images = flat_images(5)
    before = images.copy()
    first, again, other = (compose(images, 3, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.inside, again.inside)
    assert (first.images != other.images).any()
    np.testing.assert_array_equal(images, before)


def test_objects_are_more_often_in_the_middle() -> None:
    made = compose(np.zeros((6000, 1, 9, 9), np.uint8), patch_size=1, seed=0, object_share=1 / 3)
    often = made.inside.reshape(6000, 9, 9).mean(0)
    assert often[4, 4] > 2 * often[4, 1] > 0
    assert often[0, 0] > 0
    # neither side is preferred: 9 patches, each off by less than 0.08 (0.25 if halves were always rounded down)
    for axis in (0, 1):
        assert abs(often.sum(axis) @ np.arange(-4, 5)) < 9 * 0.08


@pytest.mark.parametrize(("count", "patch", "message"), [(1, 3, "at least 2 images.*got 1"), (3, 15, "2 or more whole"),
                                                         (3, 4, "whole patches of 4 pixels, got 15")])  # fmt: skip
def test_what_cannot_be_composed_is_refused(count: int, patch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose(flat_images(count), patch, seed=0)
