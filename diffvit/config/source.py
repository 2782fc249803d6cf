"""Images that are not a data set yet: where they lie, and what `prepare` makes of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SourceConfig:
    """Images to be read, and how their classes are found."""

    source: str = ""
    """An image folder, tar or WebDataset files, Parquet files (a folder or one file; local, s3:// or gs://), or
    torchvision:NAME."""
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


@dataclass(frozen=True)
class PrepareConfig(SourceConfig):
    """Images to shards."""

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
    max_pixels: int = 50_000_000
    """A larger image goes to quarantine."""
    max_image_bytes: int = 64 * 2**20
    """An image of more bytes goes to quarantine."""

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("out is missing: the folder that receives the data set (--out FOLDER)")
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"val_fraction must be between 0 and 1, got {self.val_fraction}")
        for name in ("shard_mib", "max_pixels", "max_image_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_side is not None and self.max_side < 1:
            raise ValueError(f"max_side must be at least 1, got {self.max_side}")
