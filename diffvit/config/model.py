"""The model's shape: `ModelConfig`, and the standard sizes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from diffvit.config.checks import STRICT, require, require_fraction

Variant = Literal["softmax", "diff", "diff_v2"]
VARIANT_NAMES: dict[Variant, str] = {"softmax": "plain ViT", "diff": "Diff-ViT V1", "diff_v2": "Diff-ViT V2"}

_OF_V1_ALONE: dict[str, Any] = {"lambda_init": "depth", "lambda_max": None, "head_norm": "rms"}
"""Fields that the other variants do not read, with their defaults."""


@dataclass(frozen=True)
class ModelConfig:
    """A Vision Transformer: its attention variant and its shape."""

    __pydantic_config__ = STRICT

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
    position_grid: int | None = None
    """sincos2d only: make positions for a grid of so many patches a side and resample them to the model's, as learned
    ones are when a trained model goes on at another size; None: the model's own grid."""
    no_embed_class: bool = False
    """Learned positions for the patches only, none for class and register tokens."""
    init_values: float | None = None
    """LayerScale's initial value (arXiv 2103.17239); None for no LayerScale."""
    drop_path: float = 0.0
    """Stochastic depth: drop rate of the last block, rising linearly from 0."""
    lambda_init: Literal["depth"] | float = "depth"
    """V1 only: 'depth' for 0.8 - 0.6 exp(-0.3 layer_index), or a constant in [0, 1)."""
    lambda_max: float | None = None
    """V1 only: keep each layer's lambda in [0, lambda_max]; None, as published, for no bounds."""
    head_norm: Literal["rms", "layer"] = "rms"
    """V1 only: the norm of each head, RMSNorm as published or LayerNorm."""

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "embed_dim", "depth", "num_heads"):
            require(getattr(self, name) >= 1, f"model.{name} must be at least 1, got {getattr(self, name)}")
        require(self.num_classes >= 0, f"model.num_classes must not be negative, got {self.num_classes}")
        require(self.in_channels in (1, 3), f"model.in_channels must be 1 or 3, got {self.in_channels}")
        require(
            self.image_size % self.patch_size == 0,
            f"model.patch_size must divide model.image_size, got {self.patch_size} and {self.image_size}",
        )
        heads = 2 * self.num_heads if self.variant == "diff" else self.num_heads
        rule = "2 x model.num_heads (V1 has two maps a head)" if self.variant == "diff" else "model.num_heads"
        require(
            self.embed_dim % heads == 0,
            f"model.embed_dim must be divisible by {rule}, got {self.embed_dim} and num_heads={self.num_heads}; "
            f"num_heads that fit: {valid_num_heads(self.embed_dim, self.variant)}",
        )
        require(
            1 <= self.mlp_ratio * self.embed_dim < math.inf,
            f"model.mlp_ratio x model.embed_dim must be at least 1 and finite, got {self.mlp_ratio} x {self.embed_dim}",
        )
        require(self.reg_tokens >= 0, f"model.reg_tokens must not be negative, got {self.reg_tokens}")
        require(
            self.class_token or self.pool == "avg",
            "model.pool must be 'avg' when model.class_token is off: there is no class token to read",
        )
        require(
            self.pos_embed == "learned" or self.embed_dim % 4 == 0,
            f"model.embed_dim must be divisible by 4 for sincos2d positions, got {self.embed_dim}",
        )
        require(
            self.position_grid is None or (self.pos_embed == "sincos2d" and self.position_grid >= 1),
            f"model.position_grid is a number of patches for model.pos_embed = 'sincos2d', "
            f"got {self.position_grid} and {self.pos_embed!r}",
        )
        require_fraction("model.drop_path", self.drop_path)
        require(
            self.lambda_max is None or self.lambda_max > 0, f"model.lambda_max must be positive, got {self.lambda_max}"
        )
        if self.lambda_init != "depth":
            require(
                0.0 <= self.lambda_init < 1.0,
                f"model.lambda_init must be 'depth' or a constant in [0, 1), got {self.lambda_init}",
            )
        if self.variant != "diff":
            for name, default in _OF_V1_ALONE.items():
                require(
                    getattr(self, name) == default,
                    f"model.{name} is for V1 alone, got {getattr(self, name)!r} for model.variant = {self.variant!r}",
                )

    @property
    def grid(self) -> int:
        """Patches of a side of an image of the model's size."""
        return self.image_size // self.patch_size


def as_variant(model: ModelConfig, variant: Variant, num_heads: int, **fields: Any) -> ModelConfig:
    """The model with the attention of another variant; what V1 alone has is left out elsewhere. `fields` override."""
    left_out = {} if variant == "diff" else _OF_V1_ALONE
    return dataclasses.replace(model, variant=variant, num_heads=num_heads, **left_out, **fields)


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
