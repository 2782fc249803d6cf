"""Files that cameras and programs wrote, from Pillow's own tests: what is shown, kept and refused of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps
from test_packing import pack

from diffvit.data.images import ImageError, decode_image
from diffvit.data.packing import Limits

FOLDER = Path(__file__).parent / "pillow_images"
CUT_SHORT = ("truncated_jpeg.jpg", "shortfile.bmp")
WHOLE = [path for path in sorted(FOLDER.iterdir()) if path.name not in ("LICENSE", *CUT_SHORT)]
LIMITS = Limits(max_pixels=10**6, max_bytes=10**6, max_side=None)

WHITE, RED, GREEN, BLACK = (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 0)
SEEN = {  # width, height, and colours at (x, y), as the pictures are known to look
    "app13-multiple.jpg": (256, 160, {(145, 60): (104, 113, 118), (10, 150): (4, 28, 0)}),  # progressive: three dogs
    "orientation_rectangle.jpg": (1, 2, {}),  # stored as 2 x 1
    "xmp_tags_orientation_exiftool.png": (10, 10, {(4, 0): RED, (1, 1): GREEN, (0, 0): WHITE}),  # XMP says: upside down
    "uint16_1_4660.tif": (10, 10, {(0, 0): (18, 18, 18)}),  # 4660 of 65535
    "mode_16bit.png": (128, 64, {(0, 0): RED, (127, 63): RED}),  # RGBA of 16 bits; the frames that follow are green
    "i_trns.png": (64, 64, {(0, 0): BLACK, (63, 63): (1, 1, 1), (28, 36): WHITE}),  # 255 of 65535 is the clear value
    "pal8.png": (127, 64, {(0, 0): RED, (126, 63): (102, 85, 102)}),
    "hopper_resized.gif": (64, 64, {(60, 2): (74, 114, 182)}),  # palette, interlaced
    "p_trns_single.png": (64, 64, {(0, 0): RED, (62, 2): (0, 255, 203), (30, 30): WHITE}),  # palette with a clear entry
    "transparent.webp": (200, 150, {(0, 0): WHITE, (60, 30): (35, 36, 139), (150, 30): (45, 120, 45)}),  # dice
    "uncompressed_la.png": (128, 128, {(0, 0): WHITE, (80, 15): (198, 198, 198)}),  # grey with alpha
    "first_frame_transparency.gif": (75, 50, {(10, 25): WHITE, (37, 25): GREEN}),
    "dispose_bgnd.gif": (100, 100, {(0, 0): (135, 206, 235), (50, 50): (30, 144, 255)}),  # the first of five frames
    "multipage.tiff": (10, 10, {(5, 5): (0, 128, 0)}),  # the first of three pages; the others are red and blue
}


def shown(encoded: bytes, channels: int) -> np.ndarray:
    """(height, width, channels), by Pillow's own conversions."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    if picture.mode.startswith("I"):  # of 16 bits, which Pillow would clip
        values = np.asarray(picture)
        grey = np.where(values == picture.info.get("transparency", -1), 255, values // 257)
        return np.stack([grey] * channels, -1)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("L" if channels == 1 else "RGB")).reshape(picture.height, picture.width, channels)


def decoded(encoded: bytes, channels: int = 3) -> np.ndarray:
    """(height, width, channels), by diffvit."""
    return decode_image(encoded, channels, LIMITS.max_pixels).permute(1, 2, 0).numpy().astype(int)


def difference(first: str, second: str) -> float:
    """Of two pictures of the same thing, in grey levels."""
    return float(np.abs(decoded((FOLDER / first).read_bytes()) - decoded((FOLDER / second).read_bytes())).mean())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.name)
@pytest.mark.filterwarnings("ignore")  # PIL's, about what is odd in the metadata
def test_real_files_decode_to_what_pillow_shows(path: Path, channels: int) -> None:
    """And of inverted CMYK, 16-bit quantisation tables, MPO, broken or repeated EXIF, a late ICC profile."""
    encoded = path.read_bytes()
    ours, pillows = decoded(encoded, channels), shown(encoded, channels)
    assert ours.shape == pillows.shape
    assert np.abs(ours - pillows).mean() < 1


@pytest.mark.parametrize("name", SEEN)
def test_real_files_look_as_they_are_known_to(name: str) -> None:
    width, height, colours = SEEN[name]
    picture = decoded((FOLDER / name).read_bytes())
    assert picture.shape == (height, width, 3)
    for (x, y), colour in colours.items():
        assert picture[y, x] == pytest.approx(colour, abs=3), f"at {x}, {y}"


def test_the_same_picture_turned_and_stored_in_other_ways() -> None:
    """Orientation 6 and 7 in JPEG, 6 in WEBP; 1 and 6 in TIFF, where turning costs some dots of letters."""
    assert difference("hopper_orientation_6.jpg", "hopper_orientation_7.jpg") < 6
    assert difference("hopper_orientation_6.jpg", "hopper_orientation_6.webp") < 6
    assert difference("g4_orientation_1.tif", "g4_orientation_6.tif") < 1


@pytest.mark.parametrize("name", CUT_SHORT)
def test_a_real_file_that_is_cut_short_is_refused(name: str) -> None:
    with pytest.raises(ImageError, match="does not decode"):
        decoded((FOLDER / name).read_bytes())


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.name)
@pytest.mark.filterwarnings("ignore")
def test_cut_anywhere_a_real_file_is_refused_or_whole(path: Path) -> None:
    """Whole where only later frames, or nothing but metadata, lay behind the cut."""
    encoded = path.read_bytes()
    picture, refused = decoded(encoded), 0
    for share in (0.02, 0.2, 0.5, 0.9):
        try:
            rest = decoded(encoded[: int(len(encoded) * share)])
        except ImageError:
            refused += 1
        else:
            assert np.array_equal(rest, picture)
    assert refused


@pytest.mark.parametrize("max_side", [None, 50])
@pytest.mark.filterwarnings("ignore")
def test_real_files_are_kept_or_quarantined(tmp_path: Path, max_side: int | None) -> None:
    """As they are, or as smaller copies that look the same."""
    files = {path.name: path.read_bytes() for path in sorted(FOLDER.iterdir())}
    packed, target = pack(tmp_path, files, Limits(LIMITS.max_pixels, LIMITS.max_bytes, max_side))
    assert {name for name, _ in packed.quarantined} == {"LICENSE", *CUT_SHORT}
    table = pq.read_table(pa.BufferReader(target.read("train/00000.parquet")))
    kept = dict(zip(table["key"].to_pylist(), table["image"].to_pylist(), strict=True))
    for name, content in kept.items():
        original, copy = decoded(files[name]), decoded(content)
        if max_side is None or max(original.shape) <= max_side:
            assert content == files[name]
        else:
            assert max(copy.shape) == max_side
            assert copy.mean((0, 1)) == pytest.approx(original.mean((0, 1)), abs=4)
