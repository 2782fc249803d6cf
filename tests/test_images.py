import io
import struct

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageCms

from diffvit.config import AugmentConfig
from diffvit.data.images import ImageError, decode_image, eval_transform, normalize, train_transform

ANY_SIZE = 10**6


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def photo(mode: str = "RGB", size: tuple[int, int] = (37, 23)) -> Image.Image:
    """Smooth, so that JPEG keeps it nearly."""
    x, y = np.meshgrid(np.linspace(0, 200, size[0]), np.linspace(0, 200, size[1]))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], -1).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_formats_decode_to_what_pil_shows(format: str, channels: int) -> None:
    encoded = encode(photo(), format)
    decoded = decode_image(encoded, channels, ANY_SIZE)
    shown = np.asarray(Image.open(io.BytesIO(encoded)).convert("L" if channels == 1 else "RGB")).reshape(
        23, 37, channels
    )
    assert decoded.dtype == torch.uint8
    assert decoded.shape == (channels, 23, 37)
    assert np.abs(decoded.permute(1, 2, 0).numpy().astype(int) - shown).max() <= 3


def test_grey_is_replicated() -> None:
    decoded = decode_image(encode(photo("L")), 3, ANY_SIZE)
    assert torch.equal(decoded[0], decoded[1])
    assert torch.equal(decoded[0], decoded[2])


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_rotation_is_applied(format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    decoded = decode_image(encode(photo(), format, exif=exif), 3, ANY_SIZE)
    assert decoded.shape == (3, 37, 23)
    upright = torch.rot90(decode_image(encode(photo(), format), 3, ANY_SIZE), -1, (1, 2))
    assert (decoded.int() - upright.int()).abs().max() <= 1


def test_cmyk_jpeg() -> None:
    decoded = decode_image(encode(photo("CMYK"), "JPEG"), 3, ANY_SIZE)
    assert (decoded.permute(1, 2, 0).int() - torch.from_numpy(np.array(photo())).int()).abs().max() < 12


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    image = Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16))
    assert decode_image(encode(image), 1, ANY_SIZE).flatten().tolist() == [0, 1, 128, 255]


def test_twelve_bits_are_scaled() -> None:
    """A TIFF of 2 x 1 pixels by hand, for PIL writes none: eight entries of 12 bytes, and the pixels behind them."""
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 8 * 12 + 4, 277: 1, 279: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    tiff = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + bytes.fromhex("fff800")
    assert decode_image(tiff, 1, ANY_SIZE).flatten().tolist() == [255, 128]  # of 4095 and 2048


def test_floats_are_scaled_or_refused() -> None:
    def decoded(values: list[float]) -> list[int]:
        image = Image.fromarray(np.array([values], np.float32))
        return decode_image(encode(image, "TIFF"), 1, ANY_SIZE).flatten().tolist()

    assert decoded([0.0, 0.1, 0.5, 1.0]) == [0, 26, 128, 255]
    assert decoded([0.0, 1.4, 128.0, 255.0]) == [0, 1, 128, 255]
    for values in ([0.0, 256.0], [-0.1, 1.0], [0.5, float("nan")]):
        with pytest.raises(ImageError, match=r"pixels from .* expected 0 to 1 or 0 to 255"):
            decoded(values)
    with pytest.raises(ImageError, match=r"pixels from 0 to 70000, expected 0 to 65535"):
        decode_image(encode(Image.fromarray(np.array([[0, 70_000]], np.int32)), "TIFF"), 1, ANY_SIZE)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "1", "P", "LA", "RGBA"])
def test_modes_of_tiff_and_png_decode_to_what_they_show(mode: str) -> None:
    shown = photo("L") if mode == "LA" else photo("1") if mode == "1" else photo()
    match mode:
        case "LAB":
            profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
            image = ImageCms.profileToProfile(photo(), *profiles, outputMode="LAB")
        case "P":
            image = photo().quantize(256)
        case "LA":
            image = photo("L").convert("LA")
        case _:
            image = photo(mode)
    decoded = decode_image(encode(image, "PNG" if mode == "P" else "TIFF"), 3, ANY_SIZE)
    difference = (decoded.permute(1, 2, 0).int() - torch.from_numpy(np.array(shown.convert("RGB"))).int()).abs()
    assert difference.float().mean() < 8


def test_a_strangers_postscript_reaches_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    eps = encode(photo(), "EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    with pytest.raises(ImageError, match="not a readable image"):
        decode_image(eps, 3, ANY_SIZE)


def test_a_strip_is_refused_before_it_fills_the_memory() -> None:
    strip = decode_image(encode(Image.new("1", (20_000, 1))), 3, ANY_SIZE)
    for transform in (eval_transform(AugmentConfig(), 224), train_transform(AugmentConfig(crop="pad"), 224)):
        with pytest.raises(ImageError, match="20000 x 1 pixels, too narrow to be resized to"):
            transform(strip)
    long = torch.zeros(3, 700, 2, dtype=torch.uint8)  # at 256 x 89,600 still within the bound
    assert eval_transform(AugmentConfig(), 224)(long).shape == (3, 224, 224)
    assert train_transform(AugmentConfig(), 224)(strip).shape == (3, 224, 224)


def test_transparency_is_white() -> None:
    clear = Image.new("RGBA", (3, 2), (10, 20, 30, 0))
    assert decode_image(encode(clear), 3, ANY_SIZE).unique().tolist() == [255]
    palette = Image.new("P", (3, 2), 0)
    palette.putpalette([10, 20, 30] * 256)
    assert decode_image(encode(palette, transparency=0), 3, ANY_SIZE).unique().tolist() == [255]
    deep = Image.fromarray(np.array([[0, 777, 65535]], np.uint16))
    assert decode_image(encode(deep, transparency=777), 1, ANY_SIZE).flatten().tolist() == [0, 255, 255]


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "not a readable image"),
        (b"this is text", "not a readable image: none of JPEG, PNG, .* JPEG2000$"),
        (encode(photo(size=(400, 300)), "JPEG")[:900], "^does not decode: Image is incomplete or truncated$"),
        (encode(photo(size=(400, 300)), "PNG")[:500], "does not decode"),
    ],
)
def test_broken_images_say_why(encoded: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode_image(encoded, 3, ANY_SIZE)


def test_size_is_refused_from_the_header() -> None:
    bomb = encode(Image.new("1", (10_000, 10_000)))[:100]  # whose header alone is read
    with pytest.raises(ImageError, match=r"10000 x 10000 pixels, more than max_pixels = 50000000"):
        decode_image(bomb, 1, 50_000_000)
    decode_image(encode(photo()), 3, 37 * 23)
    with pytest.raises(ImageError, match=r"37 x 23 pixels, more than max_pixels = 850"):
        decode_image(encode(photo()), 3, 850)


@pytest.mark.parametrize("crop", ["inception", "pad", "none"])
@pytest.mark.parametrize("size", [(37, 23), (16, 16), (9, 50)])
def test_transforms_give_the_models_size(crop: str, size: tuple[int, int]) -> None:
    image = decode_image(encode(photo(size=size)), 3, ANY_SIZE)
    augment = AugmentConfig(crop=crop, rand_augment_layers=2, erasing=0.5)
    for transform in (train_transform(augment, 16), eval_transform(augment, 16)):
        out = transform(image)
        assert out.shape == (3, 16, 16)
        assert out.dtype == torch.uint8


def test_augmentation_depends_on_the_seed_alone() -> None:
    image = decode_image(encode(photo()), 3, ANY_SIZE)
    transform = train_transform(AugmentConfig(rand_augment_layers=2, erasing=0.5), 16)

    def draw(seed: int) -> torch.Tensor:
        torch.default_generator.manual_seed(seed)
        return transform(image)

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))


def mean_change(augment: AugmentConfig, image: torch.Tensor) -> list[float]:
    """How far 40 augmented copies are from the image, on average, in grey levels."""
    transform = train_transform(augment, image.shape[-1])
    changes = []
    for seed in range(40):
        torch.default_generator.manual_seed(seed)
        changes.append((transform(image).float() - image.float()).abs().mean().item())
    return changes


STILL = {"crop": "none", "eval_crop_ratio": 1.0, "flip": 0.0}


def test_colour_jitter_moves_colours_and_nothing_else() -> None:
    flat = torch.tensor([60, 120, 180], dtype=torch.uint8).view(3, 1, 1).expand(3, 16, 16)
    assert mean_change(AugmentConfig(**STILL), flat) == [0.0] * 40
    small, large = (mean_change(AugmentConfig(**STILL, color_jitter=by), flat) for by in (0.05, 0.5))
    assert 0 < np.mean(small) < np.mean(large) / 4
    torch.default_generator.manual_seed(1)
    out = train_transform(AugmentConfig(**STILL, color_jitter=0.5), 16)(flat)
    assert (out == out[:, :1, :1]).all()


@pytest.mark.parametrize("policy", ["imagenet", "cifar10", "svhn", "trivial"])
def test_learned_policies_change_most_images(policy: str) -> None:
    image = decode_image(encode(photo(size=(16, 16))), 3, ANY_SIZE)
    changes = mean_change(AugmentConfig(**STILL, auto_augment=policy), image)
    assert sum(change > 0 for change in changes) > 20
    filled = mean_change(AugmentConfig(**STILL, auto_augment=policy, policy_fill=200), image)
    assert any(change != other for change, other in zip(changes, filled, strict=True))


def test_rand_augment_draws_its_magnitude_from_around_the_one_asked_for() -> None:
    drawn = []

    class Spy(torch.nn.Module):
        def __init__(self, layers: int, magnitude: int, fill: int) -> None:
            super().__init__()
            assert (layers, fill) == (1, 128)
            self.magnitude = magnitude

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            drawn.append(self.magnitude)
            return image

    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.transforms.v2.RandAugment", Spy)
        options = {"rand_augment_layers": 2, "rand_augment_magnitude": 29, "policy_fill": 128}
        noisy = train_transform(AugmentConfig(**STILL, **options, rand_augment_magnitude_std=2.0), 16)
        steady = train_transform(AugmentConfig(**STILL, **options), 16)
        half = train_transform(AugmentConfig(**STILL, **options, rand_augment_probability=0.5), 16)
    torch.default_generator.manual_seed(3)
    for _ in range(300):
        noisy(image)
    assert max(drawn) == 30  # and not beyond, where torchvision has no strength
    below = [magnitude for magnitude in drawn if magnitude < 29]
    assert len(drawn) == 600
    assert 0.3 < len(below) / 600 < 0.5  # P(N(0, 1) < -0.25) = 0.40
    assert min(below) < 26
    drawn.clear()
    steady(image)
    assert drawn == [29, 29]
    drawn.clear()
    for _ in range(300):
        half(image)
    assert 250 < len(drawn) < 350


def test_erased_pixels_are_black_or_noise() -> None:
    image = torch.full((3, 64, 64), 200, dtype=torch.uint8)
    torch.default_generator.manual_seed(2)
    black, noise = (
        train_transform(AugmentConfig(**STILL, erasing=1.0, erasing_fill=fill), 64)(image)
        for fill in ("black", "noise")
    )
    assert black.unique().tolist() == [0, 200]
    erased = noise[(noise != 200).any(0).expand(3, -1, -1)].float()
    assert erased.mean() == pytest.approx(114, abs=8)
    assert erased.std() == pytest.approx(57, abs=8)


def test_what_a_policy_uncovers_has_the_fill() -> None:
    image = torch.full((1, 16, 16), 200, dtype=torch.uint8)
    seen = set()
    transform = train_transform(
        AugmentConfig(**STILL, rand_augment_layers=1, rand_augment_magnitude=30, policy_fill=77), 16
    )
    for seed in range(40):
        torch.default_generator.manual_seed(seed)
        seen |= set(transform(image).unique().tolist())
    assert 77 in seen


def test_interpolation_is_that_of_training_and_of_evaluation() -> None:
    image = decode_image(encode(photo()), 3, ANY_SIZE)
    for transform in (train_transform, eval_transform):
        linear, cubic = (
            transform(AugmentConfig(crop="none", flip=0, interpolation=how), 16)(image)
            for how in ("bilinear", "bicubic")
        )
        assert not torch.equal(linear, cubic)
        assert (linear.int() - cubic.int()).abs().float().mean() < 3


def test_eval_crop_is_the_centre() -> None:
    image = torch.zeros(1, 32, 64, dtype=torch.uint8)
    image[:, :, 16:48] = 200
    assert eval_transform(AugmentConfig(eval_crop_ratio=1.0), 32)(image).unique().tolist() == [200]


def test_normalize() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    out = normalize(images, (0.0, 0.1, 0.5), (1.0, 0.2, 0.25))
    assert out.flatten().tolist() == pytest.approx([0.0, 0.5, 2.0])
    assert normalize(images, (0.5,), (0.5,)).flatten().tolist() == pytest.approx([-1.0, -0.6, 1.0])
