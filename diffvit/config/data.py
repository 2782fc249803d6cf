"""Which images are trained on, and how they are varied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffvit.config.checks import STRICT, require, require_fraction, require_pixels


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they become tensors."""

    __pydantic_config__ = STRICT

    path: str = "sample"
    """'sample' (10,000 + 2,000 Fashion-MNIST images inside the package); shards that prepare made (local, s3://, gs://);
    or an image folder: train/<class>/* with val/<class>/*, or <class>/* alone, which is split."""
    val_fraction: float = 0.1
    """Share of each class held out for validation where the data has no validation set of its own."""
    split_seed: int = 0
    """Seed of that split; apart from the run's seed, so that several seeds share one validation set."""
    mean: tuple[float, ...] = ()
    """Channel means subtracted from pixels in [0, 1]; one value stands for every channel. Empty: those that
    init.weights were trained with, else those that prepare counted, else ImageNet's."""
    std: tuple[float, ...] = ()
    """Channel standard deviations, likewise."""
    classes: tuple[str, ...] = ()
    """Names of the classes in the order of their labels; empty: those of the data, which others must equal."""
    audit: bool = False
    """Write (epoch, step, rank, position, key) of every sample trained on to audit/."""
    max_pixels: int = 50_000_000
    """A larger image is skipped as not sane (or hostile)."""
    max_skipped_fraction: float = 0.01
    """The run ends when more than this share of a split's images cannot be decoded."""

    def __post_init__(self) -> None:
        require(0.0 < self.val_fraction < 1.0, f"data.val_fraction must be between 0 and 1, got {self.val_fraction}")
        require(len(self.mean) == len(self.std), f"data.mean and data.std must pair up, got {self.mean}, {self.std}")
        require(all(s > 0 for s in self.std), f"data.std must be positive, got {self.std}")
        require_pixels("data.max_pixels", self.max_pixels)
        require_fraction("data.max_skipped_fraction", self.max_skipped_fraction)


@dataclass(frozen=True)
class AugmentConfig:
    """How a training image is varied; the same (seed, epoch, sample) gives the same variation anywhere."""

    __pydantic_config__ = STRICT

    crop: Literal["inception", "inception_tf", "pad", "none"] = "inception"
    """inception: a random part of the image resized (arXiv 1409.4842); inception_tf: as TensorFlow draws it, small
    parts more often; pad: shifted by up to `padding` pixels; none: the evaluation crop."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that an inception crop may take."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How images are resized, in training and in evaluation; antialiased either way."""
    padding: int = 4
    """Largest shift of a pad crop, in pixels of the model's input."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.0
    """Largest change of brightness, contrast and saturation, as a share; 0 for none."""
    auto_augment: Literal["none", "imagenet", "cifar10", "svhn", "trivial"] = "none"
    """AutoAugment's learned policy (arXiv 1805.09501), or TrivialAugment (arXiv 2103.10158)."""
    rand_augment_layers: int = 0
    """RandAugment operations on an image (arXiv 1909.13719); 0 for none."""
    rand_augment: Literal["torchvision", "big_vision", "timm"] = "torchvision"
    """Which program's operations those are; timm: those that all get stronger with the magnitude ("inc1")."""
    rand_augment_magnitude: int = 9
    """RandAugment magnitude, 0 to 30, full strength (a rotation by 30 degrees). Where a paper's scale ends at 10, as
    Big Vision's and timm's do, three times its number."""
    rand_augment_magnitude_std: float = 0.0
    """Standard deviation of a normal distribution around it, from which each operation draws its own (timm's mstd, on
    this scale)."""
    rand_augment_probability: float = 1.0
    """Probability that an operation is applied at all (0.5 in timm)."""
    policy_fill: int | tuple[int, int, int] = 0
    """Grey level, 0 to 255, or colour, of what shifts and turns of AutoAugment, TrivialAugment and RandAugment
    uncover."""
    erasing: float = 0.0
    """Probability of erasing a random rectangle (arXiv 1708.04896)."""
    erasing_fill: Literal["black", "noise"] = "black"
    """noise: each erased pixel is drawn from a normal distribution with about the mean and deviation of photographs."""
    mixup: float = 0.0
    """Alpha of mixup (arXiv 1710.09412), the share of two images drawn from Beta(alpha, alpha); 0 for none."""
    cutmix: float = 0.0
    """Alpha of CutMix (arXiv 1905.04899), the area of a pasted rectangle likewise; 0 for none. Where both are on, a
    step takes either with equal probability."""
    mix_probability: float = 1.0
    """Probability that a step mixes at all, where mixup or CutMix is on."""
    repeats: int = 1
    """Repeated augmentation (arXiv 1901.09335): a batch holds so many differently augmented copies of each of its
    images. An epoch is not longer for it, so it shows one image in so many."""
    eval_crop_ratio: float = 0.875
    """Evaluation resizes the shorter side to image_size / this ratio, then crops the centre; 1 for no margin."""

    def __post_init__(self) -> None:
        require(self.repeats >= 1, f"augment.repeats must be at least 1, got {self.repeats}")
        low, high = self.crop_scale
        require(0.0 < low <= high <= 1.0, f"augment.crop_scale must be 0 < low <= high <= 1, got {self.crop_scale}")
        require(self.padding >= 0, f"augment.padding must not be negative, got {self.padding}")
        for name in ("color_jitter", "mixup", "cutmix", "rand_augment_magnitude_std"):
            require(getattr(self, name) >= 0, f"augment.{name} must not be negative, got {getattr(self, name)}")
        require(
            self.auto_augment == "none" or not self.rand_augment_layers,
            "augment.auto_augment and augment.rand_augment_layers exclude each other, "
            f"got {self.auto_augment!r} and {self.rand_augment_layers}",
        )
        for name in ("flip", "erasing", "rand_augment_probability", "mix_probability"):
            value = getattr(self, name)
            require(0.0 <= value <= 1.0, f"augment.{name} is a probability in [0, 1], got {value}")
        require(
            self.rand_augment_layers >= 0,
            f"augment.rand_augment_layers must not be negative, got {self.rand_augment_layers}",
        )
        require(
            0 <= self.rand_augment_magnitude <= 30,
            f"augment.rand_augment_magnitude must be in 0..30, got {self.rand_augment_magnitude}",
        )
        fill = self.policy_fill if isinstance(self.policy_fill, tuple) else (self.policy_fill,)
        require(
            all(0 <= level <= 255 for level in fill), f"augment.policy_fill must be in 0..255, got {self.policy_fill}"
        )
        require(
            0.0 < self.eval_crop_ratio <= 1.0, f"augment.eval_crop_ratio must be in (0, 1], got {self.eval_crop_ratio}"
        )
