"""Synthetic images have the size, the encoding and the length of those that they stand in for."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from conftest import with_fields
from PIL import Image

from diffvit.config import RunConfig
from diffvit.data.datasets import open_dataset
from diffvit.data.images import decode_image
from diffvit.data.synthetic import ImageKind, encode_noise, rehearsal_data
from diffvit.recipes import RECIPES


@pytest.mark.parametrize(("length", "mode"), [(9_000, "RGB"), (20_000, "RGB"), (6_000, "L")])
def test_jpegs_are_about_as_long_as_asked(length: int, mode: str) -> None:
    encoded = encode_noise(ImageKind(231, 173, "JPEG", mode, length), (3,))
    assert len(encoded) == pytest.approx(length, rel=0.1)
    assert Image.open(io.BytesIO(encoded)).mode == mode
    assert decode_image(encoded, 3, 10**6).shape == (3, 173, 231)


def test_noise_is_a_function_of_the_seed_and_uses_the_range() -> None:
    kind = ImageKind(37, 23, "PNG", "RGB", 0)
    first, second = (np.asarray(Image.open(io.BytesIO(encode_noise(kind, (0, n))))) for n in (1, 2))
    assert encode_noise(kind, (0, 1)) == encode_noise(kind, (0, 1))
    assert first.shape == second.shape == (23, 37, 3)
    assert np.abs(first.astype(int) - second).mean() > 20
    assert 30 < first.std() < 90


def test_the_runs_own_images_where_they_are(tiny_config: RunConfig) -> None:
    dataset, text = rehearsal_data(tiny_config)
    theirs, ours = (d.train.read_many(np.array([3, 1])) for d in (open_dataset(tiny_config.data), dataset))
    assert list(ours) == list(theirs)
    assert text == f"36 and 15 of {tiny_config.data.path}"


def test_data_that_cannot_be_used_are_not_replaced_by_noise(tiny_config: RunConfig, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="hold no images"):
        rehearsal_data(with_fields(tiny_config, data={"path": str(tmp_path)}))
    file = tmp_path / "file"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="it is a file"):
        rehearsal_data(with_fields(tiny_config, data={"path": str(file)}))


@pytest.mark.parametrize(
    ("image_size", "path", "train", "classes", "size", "format"),
    [
        (28, "", 60_000, 10, (28, 28), "PNG"),
        (32, "/nowhere", 50_000, 10, (32, 32), "PNG"),
        (224, "", 1_281_167, 1000, (500, 375), "JPEG"),
    ],
)
def test_without_data_the_well_known_set_of_that_size(
    tiny_config: RunConfig, image_size: int, path: str, train: int, classes: int, size: tuple[int, int], format: str
) -> None:
    config = with_fields(tiny_config, model={"image_size": image_size}, data={"path": path})
    dataset, text = rehearsal_data(config)
    assert (len(dataset.train), len(dataset.classes)) == (train, classes)
    assert set(dataset.train.labels.tolist()) == set(range(classes))
    (encoded,) = dataset.train.read_many(np.array([train - 1]))
    assert (Image.open(io.BytesIO(encoded)).size, Image.open(io.BytesIO(encoded)).format) == (size, format)
    assert f"no data at data.path = {path!r}" in text


def test_flowers_is_rehearsed_as_the_small_set_that_it_is() -> None:
    dataset, text = rehearsal_data(RECIPES["flowers"]())
    assert (len(dataset.train), len(dataset.classes)) == (1_020, 102)
    assert "like Flowers102" in text
