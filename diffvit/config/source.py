"""Images that are not a data set yet: where they lie, and what `prepare` makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffvit.config.checks import require, require_pixels


@dataclass(frozen=True)
class SourceOptions:
    """How images are found in a source, and their classes."""

    labels: str = ""
    """File of `image name,class` lines, for images whose place says no class (ImageNet's validation tar)."""
    tar_is_class: bool = False
    """The name of each tar is the class of its images (ImageNet's train tars)."""
    image_column: str = ""
    """Parquet: the column of encoded images; empty to find it."""
    label_column: str = ""
    """Parquet: the column of labels; empty to find it."""
    root: str = ""
    """torchvision: the folder that holds the data set, or receives it."""
    download: bool = False
    """torchvision: fetch the data set into `root` if it is not there."""
    max_pixels: int = 50_000_000
    """A larger image is not used (prepare: goes to quarantine)."""
    max_image_bytes: int = 64 * 2**20
    """Nor is one of more bytes."""

    def __post_init__(self) -> None:
        require_pixels("max_pixels", self.max_pixels)
        require(self.max_image_bytes > 0, f"max_image_bytes must be positive, got {self.max_image_bytes}")


@dataclass(frozen=True)
class PrepareConfig(SourceOptions):
    """Images to shards."""

    source: str = ""
    """An image folder, tar or WebDataset files, Parquet files (a folder or one file; local, s3:// or gs://), or
    torchvision:NAME."""
    out: str = ""
    """Where the data set goes: an empty folder, or one that an interrupted preparation left; local, s3:// or gs://."""
    val_fraction: float = 0.1
    """Share of each class held out for validation where the source has no validation or test split."""
    seed: int = 0
    """Of the order in which images are written, and of that split."""
    shard_mib: float = 64.0
    """About how large a shard is, in MiB of encoded images."""
    max_side: int | None = None
    """Keep a copy with its longer side at most this many pixels; None keeps the original bytes."""
    verify: bool = False
    """Prepare nothing: read the data set at `out` and compare it with its check sums."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.source) or self.verify, "source is missing: the images to prepare (--source FOLDER)")
        require(bool(self.out), "out is missing: the folder that receives the data set (--out FOLDER)")
        require(0.0 < self.val_fraction < 1.0, f"val_fraction must be between 0 and 1, got {self.val_fraction}")
        require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        require(
            0.001 <= self.shard_mib < math.inf, f"shard_mib must be at least 0.001, and finite, got {self.shard_mib}"
        )
        require(self.max_side is None or self.max_side >= 1, f"max_side must be at least 1, got {self.max_side}")


@dataclass(frozen=True)
class PredictConfig(SourceOptions):
    """What a trained model says of images."""

    checkpoint: str = ""
    """A run's folder (its best checkpoint) or a checkpoint's."""
    images: str = ""
    """Prepared shards, 'sample', or any source that prepare takes: an image folder, tars, Parquet, torchvision:NAME."""
    out: str = ""
    """Where the predictions go: an empty folder, or one that an interrupted prediction left; local, s3:// or gs://."""
    split: str = ""
    """Only the images of this split: train, val or test; empty for all."""
    top_k: int = 5
    """Classes named for each image, the most probable first."""
    workers: int = 1
    """Copies of the model that predict side by side."""
    gpu: bool = False
    """One GPU for each of them."""
    batch_size: int = 256
    """Images a copy takes through the model at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.checkpoint), "checkpoint is missing: a run's folder or a checkpoint's (--checkpoint FOLDER)")
        require(bool(self.images), "images are missing: the images to predict (--images FOLDER)")
        require(bool(self.out), "out is missing: the folder that receives the predictions (--out FOLDER)")
        require(
            self.split in ("", "train", "val", "test"), f"split must be train, val, test or empty, got {self.split!r}"
        )
        for name in ("top_k", "workers", "batch_size"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
