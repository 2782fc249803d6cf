"""What a run is made of: frozen dataclasses, checked when they are built, that round-trip through JSON.

The command line (`diffvit/cli.py`) is generated from these fields and their docstrings; recipes (`diffvit/recipes.py`)
are values of `RunConfig`. Every check that needs neither files nor a cluster is made here, so that a wrong option
costs a second and not a cluster start.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

Variant = Literal["softmax", "diff", "diff_v2"]

_STRICT = ConfigDict(extra="forbid")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_fraction(name: str, value: float) -> None:
    _require(0.0 <= value < 1.0, f"{name} must be in [0, 1), got {value}")


@dataclass(frozen=True)
class ModelConfig:
    """A Vision Transformer: its attention variant and its shape."""

    __pydantic_config__ = _STRICT

    variant: Variant = "diff"
    """softmax: plain ViT; diff: differential attention V1 (arXiv 2410.05258); diff_v2: V2 (Microsoft, 2026)."""
    image_size: int = 224
    """Side of the square input, in pixels."""
    patch_size: int = 16
    """Side of a square patch, in pixels; must divide image_size."""
    in_channels: int = 3
    """1 (grey) or 3 (RGB); the data pipeline converts images to it."""
    num_classes: int = 0
    """Outputs of the classifier; 0 for as many as the data has classes."""
    embed_dim: int = 384
    """Width D of a token."""
    depth: int = 12
    """Number of blocks."""
    num_heads: int = 3
    """Attention heads; for V1 and V2, differential heads (a V1 model has half the plain model's)."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP as a multiple of embed_dim."""
    qkv_bias: bool = True
    """Bias in the query, key and value projections."""
    proj_bias: bool = True
    """Bias in attention's output projection."""
    class_token: bool = True
    """Prepend a learned class token."""
    reg_tokens: int = 0
    """Register tokens (arXiv 2309.16588) after the class token."""
    pool: Literal["token", "avg"] = "token"
    """What the classifier reads: the class token, or the mean of the patch tokens."""
    pos_embed: Literal["learned", "sincos2d"] = "learned"
    """Position embedding: learned, or fixed two-dimensional sin-cos over the patches (arXiv 2205.01580)."""
    no_embed_class: bool = False
    """Learned positions for the patches only, none for class and register tokens."""
    init_values: float | None = None
    """LayerScale's initial value (arXiv 2103.17239); None for no LayerScale."""
    drop_path: float = 0.0
    """Stochastic depth: drop rate of the last block, rising linearly from 0."""
    lambda_init: Literal["depth"] | float = "depth"
    """V1 only: 'depth' for 0.8 - 0.6 exp(-0.3 layer_index), or a constant in [0, 1)."""

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "embed_dim", "depth", "num_heads"):
            _require(getattr(self, name) >= 1, f"model.{name} must be at least 1, got {getattr(self, name)}")
        _require(self.num_classes >= 0, f"model.num_classes must not be negative, got {self.num_classes}")
        _require(self.in_channels in (1, 3), f"model.in_channels must be 1 or 3, got {self.in_channels}")
        _require(
            self.image_size % self.patch_size == 0,
            f"model.patch_size must divide model.image_size, got {self.patch_size} and {self.image_size}",
        )
        heads = 2 * self.num_heads if self.variant == "diff" else self.num_heads
        rule = "2 x model.num_heads (V1 has two maps a head)" if self.variant == "diff" else "model.num_heads"
        _require(
            self.embed_dim % heads == 0,
            f"model.embed_dim must be divisible by {rule}, got {self.embed_dim} and num_heads={self.num_heads}; "
            f"num_heads that fit: {valid_num_heads(self.embed_dim, self.variant)}",
        )
        _require(self.mlp_ratio > 0, f"model.mlp_ratio must be positive, got {self.mlp_ratio}")
        _require(self.reg_tokens >= 0, f"model.reg_tokens must not be negative, got {self.reg_tokens}")
        _require(
            self.class_token or self.pool == "avg",
            "model.pool must be 'avg' when model.class_token is off: there is no class token to read",
        )
        _require(
            self.pos_embed == "learned" or self.embed_dim % 4 == 0,
            f"model.embed_dim must be divisible by 4 for sincos2d positions, got {self.embed_dim}",
        )
        _require_fraction("model.drop_path", self.drop_path)
        if self.lambda_init != "depth":
            _require(
                0.0 <= self.lambda_init < 1.0,
                f"model.lambda_init must be 'depth' or a constant in [0, 1), got {self.lambda_init}",
            )


def valid_num_heads(embed_dim: int, variant: Variant) -> list[int]:
    """Head counts that divide `embed_dim` for the variant, each head at least 8 wide."""
    maps = 2 if variant == "diff" else 1
    return [h for h in range(1, embed_dim // 8 + 1) if embed_dim % (maps * h) == 0 and embed_dim // (maps * h) >= 8]


MODEL_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
"""Width, depth and the *plain* model's heads of the standard ViTs (arXiv 2010.11929, 2012.12877)."""


def model_preset(size: Literal["tiny", "small", "base", "large"], variant: Variant, **fields: Any) -> ModelConfig:
    """A standard ViT in the given variant; `fields` override.

    V1 takes half the plain model's heads, rounded up (tiny: 2 heads of two 48-wide maps instead of 3 of 64), so that
    its maps stay as wide as the plain model's. V2 keeps the plain model's heads.
    """
    shape: dict[str, Any] = dict(MODEL_SIZES[size])
    if variant == "diff":
        shape["num_heads"] = math.ceil(shape["num_heads"] / 2)
    return ModelConfig(variant=variant, **{**shape, **fields})


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they become tensors."""

    __pydantic_config__ = _STRICT

    path: str = "sample"
    """'sample' (10,000 + 2,000 Fashion-MNIST images inside the package) or an image folder: train/<class>/* with
    val/<class>/*, or <class>/* alone, which is split."""
    val_fraction: float = 0.1
    """Share of each class held out for validation where the data has no validation set of its own."""
    split_seed: int = 0
    """Seed of that split; apart from the run's seed, so that several seeds share one validation set."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Channel means subtracted from pixels in [0, 1]; one value stands for every channel."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Channel standard deviations."""
    max_pixels: int = 50_000_000
    """A larger image is skipped as not sane (or hostile)."""
    max_skipped_fraction: float = 0.01
    """The run ends when more than this share of the images read cannot be decoded."""

    def __post_init__(self) -> None:
        _require(0.0 < self.val_fraction < 1.0, f"data.val_fraction must be between 0 and 1, got {self.val_fraction}")
        _require(len(self.mean) == len(self.std), f"data.mean and data.std must pair up, got {self.mean}, {self.std}")
        _require(all(s > 0 for s in self.std), f"data.std must be positive, got {self.std}")
        _require(self.max_pixels >= 1, f"data.max_pixels must be at least 1, got {self.max_pixels}")
        _require_fraction("data.max_skipped_fraction", self.max_skipped_fraction)


@dataclass(frozen=True)
class AugmentConfig:
    """How a training image is varied; the same (seed, epoch, sample) gives the same variation anywhere."""

    __pydantic_config__ = _STRICT

    crop: Literal["inception", "pad", "none"] = "inception"
    """inception: a random part of the image resized (arXiv 1409.4842); pad: shifted by up to `padding` pixels;
    none: the evaluation crop."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that an inception crop may take."""
    padding: int = 4
    """Largest shift of a pad crop, in pixels of the model's input."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    rand_augment_layers: int = 0
    """RandAugment operations on an image (arXiv 1909.13719); 0 for none."""
    rand_augment_magnitude: int = 9
    """RandAugment magnitude, 0 to 30."""
    erasing: float = 0.0
    """Probability of erasing a random rectangle (arXiv 1708.04896)."""
    eval_crop_ratio: float = 0.875
    """Evaluation resizes the shorter side to image_size / this ratio, then crops the centre; 1 for no margin."""

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        _require(0.0 < low <= high <= 1.0, f"augment.crop_scale must be 0 < low <= high <= 1, got {self.crop_scale}")
        _require(self.padding >= 0, f"augment.padding must not be negative, got {self.padding}")
        for name in ("flip", "erasing"):
            value = getattr(self, name)
            _require(0.0 <= value <= 1.0, f"augment.{name} is a probability in [0, 1], got {value}")
        _require(
            self.rand_augment_layers >= 0,
            f"augment.rand_augment_layers must not be negative, got {self.rand_augment_layers}",
        )
        _require(
            0 <= self.rand_augment_magnitude <= 30,
            f"augment.rand_augment_magnitude must be in 0..30, got {self.rand_augment_magnitude}",
        )
        _require(
            0.0 < self.eval_crop_ratio <= 1.0, f"augment.eval_crop_ratio must be in (0, 1], got {self.eval_crop_ratio}"
        )


@dataclass(frozen=True)
class OptimConfig:
    """The recipe: AdamW, linear warm-up and cosine decay per step."""

    __pydantic_config__ = _STRICT

    epochs: int = 90
    """Passes over the training set."""
    batch_size: int = 1024
    """Global batch: samples a step over all workers."""
    lr: float = 1e-3
    """Peak learning rate, at this batch size (nothing is rescaled behind your back)."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up; fractions allowed."""
    weight_decay: float = 0.05
    """AdamW's decoupled weight decay; not applied to biases, norms, lambda, LayerScale, tokens and positions."""
    beta1: float = 0.9
    """AdamW's decay of the gradient average."""
    beta2: float = 0.999
    """AdamW's decay of the squared-gradient average."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 for no clipping."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    ema_decay: float = 0.0
    """Decay per step of the weight average that is evaluated and saved; 0 for none."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            _require(getattr(self, name) >= 1, f"optim.{name} must be at least 1, got {getattr(self, name)}")
        _require(self.lr > 0, f"optim.lr must be positive, got {self.lr}")
        _require(
            0.0 <= self.warmup_epochs <= self.epochs,
            f"optim.warmup_epochs must be between 0 and optim.epochs = {self.epochs}, got {self.warmup_epochs}",
        )
        _require(0.0 <= self.min_lr_ratio <= 1.0, f"optim.min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}")
        for name in ("weight_decay", "clip_norm"):
            _require(getattr(self, name) >= 0, f"optim.{name} must not be negative, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "label_smoothing", "ema_decay"):
            _require_fraction(f"optim.{name}", getattr(self, name))


@dataclass(frozen=True)
class ScaleConfig:
    """What the run takes of the cluster. May change between the sittings of a run."""

    __pydantic_config__ = _STRICT

    workers: int = 1
    """Ray Train workers; must divide optim.batch_size."""
    gpu: bool = False
    """One GPU a worker."""
    cpus_per_worker: float = 0.5
    """CPUs a worker reserves. Decoding runs in Ray tasks beside the workers, one CPU each, and needs some left."""
    micro_batch_size: int | None = None
    """Samples a worker takes through the model at once; the rest of its share is accumulated. None: all at once."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 autocast on a GPU that has it, fp32 otherwise."""
    max_failures: int = 3
    """Times a lost worker group is restarted from the last checkpoint."""

    def __post_init__(self) -> None:
        _require(self.workers >= 1, f"scale.workers must be at least 1, got {self.workers}")
        _require(self.cpus_per_worker > 0, f"scale.cpus_per_worker must be positive, got {self.cpus_per_worker}")
        _require(self.max_failures >= 0, f"scale.max_failures must not be negative, got {self.max_failures}")
        _require(
            self.micro_batch_size is None or self.micro_batch_size >= 1,
            f"scale.micro_batch_size must be at least 1, got {self.micro_batch_size}",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved. May change between the sittings of a run."""

    __pydantic_config__ = _STRICT

    every_steps: int | None = None
    """Also save every this many steps; None: at the end of each epoch only."""

    def __post_init__(self) -> None:
        _require(
            self.every_steps is None or self.every_steps >= 1,
            f"checkpoint.every_steps must be at least 1, got {self.every_steps}",
        )


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    __pydantic_config__ = _STRICT

    name: str = "run"
    """The run's folder under `storage`; the same name again continues the run."""
    storage: str = "runs"
    """Where runs are kept: a folder that every node sees."""
    resume: bool = True
    """Continue a run of that name; with --no-resume a name that exists is refused."""
    seed: int = 0
    """Initialisation, order of samples, augmentation and drop path all derive from it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        _require(
            bool(self.name) and Path(self.name).name == self.name and self.name not in (".", ".."),
            f"name must be a plain folder name, got {self.name!r}",
        )
        _require(
            "://" not in self.storage,
            f"storage must be a local folder or one that every node shares; {self.storage!r} is a URL, "
            "which is not supported yet",
        )
        _require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        _require(
            len(self.data.mean) in (1, self.model.in_channels),
            f"data.mean must have 1 or model.in_channels = {self.model.in_channels} values, got {self.data.mean}",
        )
        share, rest = divmod(self.optim.batch_size, self.scale.workers)
        _require(
            rest == 0,
            f"scale.workers must divide optim.batch_size, got {self.scale.workers} and {self.optim.batch_size}; "
            f"the nearest batch sizes are {self.scale.workers * share} and {self.scale.workers * (share + 1)}",
        )
        micro = self.scale.micro_batch_size
        _require(
            micro is None or share % micro == 0,
            f"scale.micro_batch_size must divide a worker's share of the batch "
            f"({self.optim.batch_size} / {self.scale.workers} = {share}), got {micro}",
        )

    @property
    def folder(self) -> Path:
        """`<storage>/<name>`, absolute: workers have other working directories."""
        return Path(self.storage).expanduser().absolute() / self.name

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches a worker takes in a step."""
        share = self.optim.batch_size // self.scale.workers
        return share // (self.scale.micro_batch_size or share)


_ADAPTER = TypeAdapter(RunConfig)


def to_json(config: RunConfig) -> str:
    return _ADAPTER.dump_json(config, indent=2).decode() + "\n"


def from_json(text: str | bytes, source: str) -> RunConfig:
    """The config in `text`; `source` names it in errors.

    Raises:
        ValueError: unknown or missing fields, wrong types, or values that a check refuses.
    """
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{source} is not a run config of this version: {problems}") from None


_SITTING_FIELDS = ("name", "storage", "resume", "scale", "checkpoint")
"""What may differ when a run is continued: where it lies, what it runs on, how often it is saved."""


def differing_fields(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """`{field: (old, new)}` for every field that decides a run's result."""

    def flat(config: RunConfig) -> dict[str, Any]:
        sections = {k: v for k, v in dataclasses.asdict(config).items() if k not in _SITTING_FIELDS}
        return {
            f"{section}.{name}" if isinstance(value, dict) else section: leaf
            for section, value in sections.items()
            for name, leaf in (value.items() if isinstance(value, dict) else [("", value)])
        }

    before, after = flat(old), flat(new)
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}
