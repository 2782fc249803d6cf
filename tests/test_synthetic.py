"""Synthetic images have the size, the encoding and the length of those that they stand in for."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from conftest import with_fields
from PIL import Image

from diffvit.config import RunConfig
from diffvit.data.images import decode_image
from diffvit.data.sources import open_dataset
from diffvit.data.synthetic import ImageKind, SyntheticSplit, encode_noise, kinds_in, stand_in


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


def test_stands_in_for_what_is_there(tiny_config: RunConfig, folder: Path) -> None:
    Image.new("L", (50, 41)).save(folder / "train" / "red" / "000.png", "JPEG")  # a name says nothing
    (folder / "train" / "red" / "001.png").write_bytes(b"no image")
    dataset, text = stand_in(tiny_config)
    real = open_dataset(tiny_config.data)
    assert (len(dataset.train), len(dataset.val), dataset.classes) == (36, 15, real.classes)
    kinds = {(k.width, k.height, k.format, k.mode) for k in kinds_in(real.train)}
    assert (20, 17, "PNG", "RGB") in kinds
    images = list(dataset.train.read_many(np.array([0, 35, 1])))
    assert images[0] != images[1]
    assert Image.open(io.BytesIO(images[0])).size == (20, 17)
    assert "36 and 15 like those of" in text


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
    dataset, text = stand_in(config)
    assert (len(dataset.train), len(dataset.classes)) == (train, classes)
    assert set(dataset.train.labels.tolist()) == set(range(classes))
    (encoded,) = dataset.train.read_many(np.array([train - 1]))
    assert (Image.open(io.BytesIO(encoded)).size, Image.open(io.BytesIO(encoded)).format) == (size, format)
    assert f"no data at data.path = {path!r}" in text


def test_data_of_which_nothing_can_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="none of 3 images"):
        kinds_in(SyntheticSplit(np.zeros(3, np.int64), (b"no image",)))
