"""Files that cameras and programs wrote, from Pillow's own tests, against what Pillow shows of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from diffvit.data.images import ImageError, decode_image

FOLDER = Path(__file__).parent / "pillow_images"
WHOLE = [path for path in sorted(FOLDER.iterdir()) if path.name not in ("LICENSE", "truncated_jpeg.jpg")]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.name)
@pytest.mark.filterwarnings("ignore")  # PIL's, about what is odd in the metadata
def test_real_files_decode_to_what_pillow_shows(path: Path, channels: int) -> None:
    """Orientations, inverted CMYK, 16-bit quantisation tables, MPO, broken or repeated EXIF, a late ICC profile."""
    encoded = path.read_bytes()
    decoded = decode_image(encoded, channels, 10**6).permute(1, 2, 0).numpy().astype(int)
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("L" if channels == 1 else "RGB")
    shown = np.asarray(picture).reshape(decoded.shape).astype(int)
    assert np.abs(decoded - shown).mean() < 1


def test_a_real_file_that_is_cut_short_is_refused() -> None:
    with pytest.raises(ImageError, match="does not decode"):
        decode_image((FOLDER / "truncated_jpeg.jpg").read_bytes(), 3, 10**6)
