"""Boxes from a file to what models attend to: by hand from pixels of the stored image to shares of patches."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_image, with_fields
from PIL import Image
from test_comparison import OPTIONS, Page, make_batches, make_run

from diffvit.analysis.comparison import compare
from diffvit.analysis.figures import draw
from diffvit.analysis.findings import findings
from diffvit.analysis.report import render
from diffvit.compare import CompareConfig, run_comparison
from diffvit.config import RunConfig
from diffvit.data.boxes import BoxedImage, BoxedSplit
from diffvit.data.datasets import open_dataset

SIDE, PATCH = 10, 5
NAMES = [f"val/{name}/{number:03d}.png" for name in ("blue", "green", "red") for number in range(5)]


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    """The picture of `NAMES[0]` is 40 x 20, and evaluation takes 15..25 x 5..15 of it as it is."""
    make_image(Path(tiny_config.data.path, NAMES[0]), hue=0, seed=1, size=(40, 20))
    return with_fields(
        tiny_config, model={"image_size": SIDE, "patch_size": PATCH}, augment={"eval_crop_ratio": 0.5, "crop": "none"}
    )


def boxed(config: RunConfig, *lines: str, header: str = "key,x0,y0,x1,y1") -> list[BoxedImage]:
    path = Path(config.data.path, "boxes.csv")
    path.write_text("\n".join([header, *lines]) + "\n")
    return list(BoxedSplit(str(path), open_dataset(config.data).val).images(config))


def test_images_come_in_an_order_that_a_seed_draws(config: RunConfig) -> None:
    path = Path(config.data.path, "boxes.csv")
    path.write_text("key,x0,y0,x1,y1\n" + "".join(f"{name},0,0,9,9\n" for name in NAMES[1:]))
    boxes = BoxedSplit(str(path), open_dataset(config.data).val)
    in_order, drawn, again = ([image.pixels.tobytes() for image in boxes.images(config, seed)] for seed in (None, 3, 3))
    assert drawn == again != in_order
    assert sorted(drawn) == sorted(in_order)


def shares(image: BoxedImage) -> list[float]:
    """Of the patches, by row."""
    return image.inside.reshape(2, PATCH, 2, PATCH).mean((1, 3)).flatten().tolist()


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ("15,5,25,15", [1, 1, 1, 1]),  # all that is seen
        ("0,0,20,10", [1, 0, 0, 0]),  # cut off at the left and at the top
        ("17,5,23,15", [0.6, 0.6, 0.6, 0.6]),
        ("20,10,22,11", [0, 0, 0, 2 / 25]),
        ("15,10,40,11.4", [0, 0, 0.2, 0.2]),  # the centre at 11.5 is outside
        ("0,0,15,20", [0, 0, 0, 0]),  # beside what is seen
    ],
)
def test_the_crop_is_followed(config: RunConfig, box: str, expected: list[float]) -> None:
    (image,) = boxed(config, f"{NAMES[0]},{box}")
    assert shares(image) == pytest.approx(expected)
    stored = np.asarray(Image.open(Path(config.data.path, NAMES[0])).convert("RGB"))
    assert np.array_equal(image.pixels.transpose(1, 2, 0), stored[5:15, 15:25])


def test_the_resize_is_followed(config: RunConfig) -> None:
    """80 x 40 becomes 40 x 20: the box is half as large, and then as (17, 5, 23, 15) above."""
    make_image(Path(config.data.path, NAMES[0]), hue=0, seed=1, size=(80, 40))
    (image,) = boxed(config, f"{NAMES[0]},34,10,46,30")
    assert shares(image) == pytest.approx([0.6, 0.6, 0.6, 0.6])


def test_exif_turns_the_box_with_its_picture(config: RunConfig) -> None:
    """Stored 20 x 40 lying on its side: people, and whoever draws boxes, see 40 x 20."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = Path(config.data.path, NAMES[0])
    Image.new("RGB", (20, 40)).save(path, exif=exif)
    (image,) = boxed(config, f"{NAMES[0]},17,5,40,15")
    assert shares(image) == pytest.approx([0.6, 1, 0.6, 1])


def test_several_boxes_are_one_object_and_images_keep_the_splits_order(config: RunConfig) -> None:
    last = f"{NAMES[-1]},0,0,20,17"
    images = boxed(config, last, f"{NAMES[0]},17,5,21,15", f"{NAMES[0]},19,5,23,15")
    assert len(images) == 2
    assert shares(images[0]) == pytest.approx([0.6, 0.6, 0.6, 0.6])
    assert shares(images[1]) == [1, 1, 1, 1]


def test_an_image_that_cannot_be_read_shows_no_box(config: RunConfig) -> None:
    Path(config.data.path, NAMES[1]).write_bytes(b"no image")
    (image,) = boxed(config, f"{NAMES[1]},0,0,5,5")
    assert not image.inside.any()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("val/red/999.png,0,0,1,1", r"line 3: .* the key 'val/red/999.png'; one that there is: 'val/blue/000.png'"),
        (f"{NAMES[1]},0,0,one,1", r"line 3: corners must be four numbers, got 0, 0, one, 1"),
        (f"{NAMES[1]},0,0,1", r"line 3: corners must be four numbers, got 0, 0, 1, None"),
        (f"{NAMES[1]},0,nan,1,1", r"line 3: a box must have 0 <= x0 < x1 and 0 <= y0 < y1, got 0, nan, 1, 1"),
        (f"{NAMES[1]},5,0,5,1", r"line 3: a box must have"),
        (f"{NAMES[1]},0,-1,5,1", r"line 3: a box must have"),
        (f"{NAMES[1]},0,0,inf,1", r"line 3: a box must have"),
        (
            f"{NAMES[1]},0,0,20.5,17",
            r"line 3: .* within its image, got 0, 0, 20.5, 17 in 'val/blue/001.png' of 20 x 17",
        ),
        (f"{NAMES[1]},0,0,20,18", r"line 3: .* within its image"),
    ],
)
def test_wrong_lines_are_named(config: RunConfig, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        boxed(config, f"{NAMES[0]},0,0,40,20", line)


def test_files_that_are_none(config: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"line 1: a header must name key,x0,y0,x1,y1; it lacks key, x0, y0, x1, y1"):
        boxed(config, header=f"{NAMES[0]},0,0,1,1")
    with pytest.raises(ValueError, match="holds no boxes, only a header"):
        boxed(config)
    with pytest.raises(ValueError, match=r"boxes must be a CSV file, .* cannot be read"):
        BoxedSplit("nowhere.csv", open_dataset(config.data).val)


def test_boxes_are_looked_at_before_anything_is_trained(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffvit.compare.train_arms", lambda *_: pytest.fail("arms are trained"))
    wrong = tmp_path / "wrong.csv"
    wrong.write_text(f"key,x0,y0,x1,y1\n{NAMES[1]},0,0,21,17\n")
    options = dataclasses.replace(OPTIONS, boxes=str(wrong))
    with pytest.raises(ValueError, match=r"wrong\.csv, line 2"):
        run_comparison(CompareConfig(config, out=str(tmp_path / "out"), compare=options), lambda *_: None)
    assert not (tmp_path / "out").exists()


class Given(BoxedSplit):
    """Nine validation images, eight of them with boxes, as `make_run`'s models see them."""

    def __init__(self, insides: list[Any]) -> None:
        self._insides = insides

    def __len__(self) -> int:
        return len(self._insides)

    @property
    def images_in_split(self) -> int:
        return 9

    def images(self, config: RunConfig, shuffle_seed: int | None = None) -> Any:
        generator = np.random.default_rng(1)
        for inside in self._insides:
            yield BoxedImage(generator.integers(0, 256, (1, 12, 12), dtype=np.uint8), inside)


def test_attention_in_boxes_against_a_loop() -> None:
    """12 x 12 pixels, 4 x 4 patches of 3: a box of 4 x 6 pixels covers whole patches and thirds of them."""
    inside = np.zeros((12, 12), np.bool_)
    inside[2:6, 3:9] = True
    nowhere = np.zeros((12, 12), np.bool_)
    whole = np.ones((12, 12), np.bool_)
    insides = [nowhere, inside, inside, whole, nowhere, inside, inside, whole]
    options = dataclasses.replace(OPTIONS, noise_images=5, batch_size=4, boxes="given.csv")
    arms = {"plain": [make_run("softmax", seed) for seed in (0, 1)], "V1": [make_run("diff", seed) for seed in (0, 1)]}
    given = Given(insides)
    result = compare(arms, make_batches(), options, boxes=given)
    assert result["boxes"] == {"images": 5, "without_box": 1, "out_of_view": 2}
    share = torch.zeros(4, 4)
    share[0, 1:3], share[1, 1:3] = 1 / 3, 1
    run = make_run("diff", 1)
    masses = []
    for image in list(given.images(run.config))[:7]:
        if image.inside.any():
            pixels = (torch.from_numpy(image.pixels)[None].float() / 255 - 0.5) / 0.25
            A = run.model.eval().attention_maps(pixels)[1].combined[0, 0, 0, 1:].detach().abs()  # the class token's row
            covered = torch.ones(16) if image.inside.all() else share.flatten()
            masses.append(float((A * covered).sum() / A.sum()))
    assert len(masses) == 5
    found = result["arms"]["V1"]["noise"]
    assert found["box_mass"]["per_head"][1][1][0] == pytest.approx(np.mean(masses), rel=1e-5)
    area = (4 * 24 / 144 + 1) / 5
    assert found["box_lift"]["per_head"][1][1][0] == pytest.approx(np.mean(masses) / area, rel=1e-5)
    assert np.shape(result["arms"]["plain"]["noise"]["box_lift"]["per_head"]) == (2, 2, 2)

    (row,) = [row for row in draw(result) if row.name == "boxes"]
    assert len(row.panels) == 1
    (axes,) = row.panels[0].figure.axes
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert lines["V1"] == pytest.approx(found["box_lift"]["per_layer"])
    text = " ".join(Page(render(result, [])).text.split())
    assert "those of given.csv, on 5 images. Left out: 1 images without a box, and 2 whose boxes" in text
    assert f"{found['box_lift']['overall']['mean']:.2f}" in text
    assert any("attention in the boxes" in sentence for sentence in findings(result))


def test_without_boxes_nothing_is_said_of_them() -> None:
    result = compare({"plain": [make_run("softmax", 0)]}, make_batches(), OPTIONS)
    assert result["boxes"] is None
    assert "box_lift" not in result["arms"]["plain"]["noise"]
    assert "boxes" not in {row.name for row in draw(result)}
    assert "Boxes: those of" not in render(result, [])
    assert math.isfinite(result["arms"]["plain"]["noise"]["inside_lift"]["overall"]["mean"])
