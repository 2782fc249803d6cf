"""The Vision Transformer around the three attention variants.

Architecture: arXiv 2010.11929 (ViT), with LayerScale (2103.17239), stochastic depth (1603.09382), register tokens
(2309.16588) and fixed sin-cos positions with mean pooling (2205.01580). Parameter names and order of operations are
those of timm's VisionTransformer, so that its weights load as they are.

Letters: B batch, C channels, S image side, P patches of a side, N tokens (class and register tokens, then P x P
patches), D width (`embed_dim`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffvit.config import ModelConfig
from diffvit.models.attention import Attention, AttentionMaps, DiffAttention, DiffAttentionV2, depth_lambda_init

_LAYER_NORM_EPS = 1e-6
_INIT_STD = 0.02


def build_attention(config: ModelConfig, layer_index: int) -> Attention | DiffAttention | DiffAttentionV2:
    """The attention of one block. A new variant is added here, and to `Variant` and its names in `diffvit.config`."""
    D, H, qkv_bias, proj_bias = config.embed_dim, config.num_heads, config.qkv_bias, config.proj_bias
    match config.variant:
        case "softmax":
            return Attention(D, H, qkv_bias=qkv_bias, proj_bias=proj_bias)
        case "diff":
            lambda_init = depth_lambda_init(layer_index) if config.lambda_init == "depth" else config.lambda_init
            return DiffAttention(
                D,
                H,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                lambda_init=lambda_init,
                lambda_max=config.lambda_max,
                head_norm=config.head_norm,
            )
        case "diff_v2":
            return DiffAttentionV2(D, H, qkv_bias=qkv_bias, proj_bias=proj_bias)


class VisionTransformer(nn.Module):
    """Images (B, C, S, S) to class scores (B, num_classes).

    Images of another size than the config's are taken as well, where the patch divides it: positions are resampled.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, self.grid = config.embed_dim, config.grid
        self.config = config
        self.gate_opening = 1.0
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, D)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, config.reg_tokens, D)) if config.reg_tokens else None
        self.num_prefix_tokens = int(config.class_token) + config.reg_tokens
        if config.pos_embed == "learned":
            self._prefix_positions = 0 if config.no_embed_class else self.num_prefix_tokens
            self.pos_embed = nn.Parameter(torch.empty(1, self._prefix_positions + self.grid**2, D))
        else:
            self._prefix_positions = 0
            positions = sincos_positions(config.position_grid or self.grid, D)
            if config.position_grid not in (None, self.grid):
                positions = resample_positions(positions, 0, (self.grid, self.grid))
            self.register_buffer("pos_embed", positions, persistent=False)
        self.blocks = nn.ModuleList(Block(config, layer_index) for layer_index in range(config.depth))
        # as in timm: a mean is normalised after it is taken, a class token before it is picked
        self.norm = nn.LayerNorm(D, _LAYER_NORM_EPS) if config.pool == "token" else nn.Identity()
        self.fc_norm = nn.LayerNorm(D, _LAYER_NORM_EPS) if config.pool == "avg" else nn.Identity()
        self.head = nn.Linear(D, config.num_classes) if config.num_classes else nn.Identity()
        self._initialise()

    def _initialise(self) -> None:
        """As timm: matrices and learned positions N(0, 0.02) cut at 2, biases 0, tokens near 0.

        The patch projection keeps torch's own; lambda vectors N(0, 0.1) and norms 1 come from their modules.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.trunc_normal_(self.pos_embed, std=_INIT_STD)

    def forward(self, images_BCSS: Tensor, draws: Tensor | None = None) -> Tensor:
        """(B, C, S, S) -> (B, num_classes), or the pooled features (B, D) of a model with num_classes = 0.

        Args:
            images_BCSS: (B, C, S, S).
            draws: in training, what drop path decides by, (B, 2 depth) uniform in [0, 1): for each sample two a block.
                None: it draws for itself.

        Raises:
            ValueError: the patch does not divide the image's sides.
        """
        x = self.embed(images_BCSS)
        for i, block in enumerate(self.blocks):
            x = block(x, None if draws is None else draws[:, 2 * i : 2 * i + 2])
        scores: Tensor = self.head(self.pool(self.norm(x)))
        return scores

    def forward_features(self, images_BCSS: Tensor, layers: Collection[str] | None = None) -> dict[str, Tensor]:
        """Activations by name, in the order in which they arise.

        `blocks.I` (B, N, D) is what block I hands on, `blocks.I.attn` and `blocks.I.mlp` what its branches add before
        LayerScale; `norm` (B, N, D) are the final tokens, `pooled` (B, D) is what the classifier reads.

        Args:
            images_BCSS: (B, C, S, S).
            layers: the names wanted; None for every block, `norm` and `pooled`.

        Raises:
            ValueError: a name that the model does not have.
        """
        valid = [f"blocks.{i}{part}" for i in range(len(self.blocks)) for part in (".attn", ".mlp", "")]
        valid += ["norm", "pooled"]
        wanted = {name for name in valid if not name.endswith((".attn", ".mlp"))} if layers is None else set(layers)
        unknown = wanted.difference(valid)
        if unknown:
            raise ValueError(f"layers must be among {', '.join(valid)}; got {', '.join(sorted(unknown))}")
        found: dict[str, Tensor] = {}
        x = self.embed(images_BCSS)
        for i, block in enumerate(self._blocks()):
            found[f"blocks.{i}.attn"], found[f"blocks.{i}.mlp"], x = block.branches(x)
            found[f"blocks.{i}"] = x
            for name in (f"blocks.{i}.attn", f"blocks.{i}.mlp", f"blocks.{i}"):
                if name not in wanted:
                    del found[name]  # now and not later, so that memory does not grow with depth
        x = self.norm(x)
        found |= {"norm": x, "pooled": self.pool(x)}
        return {name: activation for name, activation in found.items() if name in wanted}

    def open_gates(self, opening: float) -> None:
        """How far the second maps of V2 are let in, 0 to 1; see `diffvit.models.convert`."""
        self.gate_opening = opening
        for module in self.modules():
            if isinstance(module, DiffAttentionV2):
                module.gate_opening.fill_(opening)

    def attention_maps(self, images_BCSS: Tensor) -> list[AttentionMaps]:
        """The attention maps of every block on these images."""
        maps, x = [], self.embed(images_BCSS)
        for block in self._blocks():
            maps.append(block.attn.attention_maps(block.norm1(x)))
            x = block(x)
        return maps

    def lambdas(self) -> list[float]:
        """V1's lambda in each layer, as it is now; empty for the other variants."""
        attentions = [block.attn for block in self._blocks()]
        return [float(a.current_lambda().detach()) for a in attentions if isinstance(a, DiffAttention)]

    def mean_gates(self, images_BCSS: Tensor) -> list[float]:
        """V2's sigmoid(lambda) in each layer, the mean over these images, their tokens and the heads."""
        means, x = [], self.embed(images_BCSS)
        for block in self._blocks():
            if isinstance(block.attn, DiffAttentionV2):
                means.append(float(block.attn.gate(block.norm1(x)).mean()))
            x = block(x)
        return means

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, N, D): patches with positions, behind the class and register tokens."""
        x, (rows, columns) = self.patch_embed(images)
        positions = cast(Tensor, self.pos_embed)
        if (rows, columns) != (self.grid, self.grid):
            positions = resample_positions(positions, self._prefix_positions, (rows, columns))
        if not self._prefix_positions:
            x = x + positions
        prefix = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        x = torch.cat([*prefix, x], dim=1) if prefix else x
        return x + positions if self._prefix_positions else x

    def pool(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, D): the class token, or the normalised mean of the patches."""
        pooled: Tensor = x[:, 0] if self.config.pool == "token" else x[:, self.num_prefix_tokens :].mean(dim=1)
        normed: Tensor = self.fc_norm(pooled)
        return normed


class PatchEmbed(nn.Module):
    """Non-overlapping patches, projected: (B, C, S, S) -> (B, P P, D) and the grid of patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.embed_dim, config.patch_size, stride=config.patch_size)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"image sides must be divisible by the patch of {self.patch_size}, got {height} x {width}")
        grid = (height // self.patch_size, width // self.patch_size)
        return self.proj(images).flatten(2).transpose(1, 2), grid


class Block(nn.Module):
    """x + attention(norm x), then x + MLP(norm x), each with LayerScale and stochastic depth where configured."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        D = config.embed_dim
        drop_rate = config.drop_path * layer_index / max(config.depth - 1, 1)
        self.norm1 = nn.LayerNorm(D, _LAYER_NORM_EPS)
        self.attn = build_attention(config, layer_index)
        self.ls1 = LayerScale(D, config.init_values) if config.init_values is not None else nn.Identity()
        self.norm2 = nn.LayerNorm(D, _LAYER_NORM_EPS)
        self.mlp = Mlp(D, int(D * config.mlp_ratio))
        self.ls2 = LayerScale(D, config.init_values) if config.init_values is not None else nn.Identity()
        self.drop_path = DropPath(drop_rate)

    def forward(self, x: Tensor, draws: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); `draws` (B, 2), see `DropPath`."""
        return self.branches(x, draws)[2]

    def branches(self, x: Tensor, draws: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What attention adds, what the MLP adds, and the sum that goes on; each (B, N, D)."""
        of_attention, of_mlp = (None, None) if draws is None else draws.unbind(1)
        attended = self.attn(self.norm1(x))
        x = x + self.drop_path(self.ls1(attended), of_attention)
        mixed = self.mlp(self.norm2(x))
        return attended, mixed, x + self.drop_path(self.ls2(mixed), of_mlp)


class Mlp(nn.Module):
    """Two layers with exact GELU between them."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class LayerScale(nn.Module):
    """A learned factor for each channel, so that a deep network starts near the identity."""

    def __init__(self, embed_dim: int, init_value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((embed_dim,), init_value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Drops a residual branch for whole samples while training, and scales the others so that the mean stays."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, draws: Tensor | None = None) -> Tensor:
        """(B, ...) -> (B, ...); dropped are the samples whose number in `draws` (B,), uniform, is below the rate."""
        if not self.training or not self.rate:
            return x
        draws = torch.rand(x.shape[0], device=x.device) if draws is None else draws
        kept = (draws >= self.rate).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return x * (kept / (1 - self.rate))


def sincos_positions(grid: int, embed_dim: int, temperature: float = 10_000.0) -> Tensor:
    """Fixed positions (1, grid^2, D) in row-major order: sin x, cos x, sin y, cos y, a quarter of D each.

    Frequencies fall geometrically from 1 to 1 / temperature. Source: arXiv 2205.01580 (MoCo v3's, 2104.02057).
    """
    quarter = embed_dim // 4
    frequencies = temperature ** -(torch.arange(quarter) / max(quarter - 1, 1))
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles_x, angles_y = x.reshape(-1, 1) * frequencies, y.reshape(-1, 1) * frequencies
    return torch.cat([angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()], dim=1)[None]


def resample_positions(positions: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Position embeddings (1, prefix + P P, D) for another grid: (1, prefix + rows columns, D), bicubic.

    The first `prefix` of them belong to class and register tokens and stay as they are.
    """
    kept, patches = positions[:, :prefix], positions[:, prefix:]
    side = int(patches.shape[1] ** 0.5)
    image = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
    resized = F.interpolate(image, grid, mode="bicubic", antialias=True).to(positions.dtype)
    return torch.cat([kept, resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
