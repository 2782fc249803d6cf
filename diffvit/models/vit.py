"""The Vision Transformer around the three attention variants.

Architecture: arXiv 2010.11929 (ViT), with LayerScale (2103.17239), stochastic depth (1603.09382), register tokens
(2309.16588) and fixed sin-cos positions with mean pooling (2205.01580). Parameter names and order of operations are
those of timm's VisionTransformer, so that its weights load as they are.

Letters: B batch, C channels, S image side, N tokens, D width (`embed_dim`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffvit.config import ModelConfig
from diffvit.models.attention import Attention, AttentionMaps, DiffAttention, DiffAttentionV2, depth_lambda_init

LAYER_NORM_EPS = 1e-6


def build_attention(config: ModelConfig, layer_index: int) -> nn.Module:
    """The attention of one block. A new variant is added here and to `diffvit.config.Variant`."""
    shape = {"qkv_bias": config.qkv_bias, "proj_bias": config.proj_bias}
    match config.variant:
        case "softmax":
            return Attention(config.embed_dim, config.num_heads, **shape)
        case "diff":
            lambda_init = depth_lambda_init(layer_index) if config.lambda_init == "depth" else config.lambda_init
            return DiffAttention(config.embed_dim, config.num_heads, lambda_init=lambda_init, **shape)
        case "diff_v2":
            return DiffAttentionV2(config.embed_dim, config.num_heads, **shape)


class LayerScale(nn.Module):
    def __init__(self, dim, init):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))
    def forward(self, x): return x * self.gamma

class PatchEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.embed_dim, config.patch_size, stride=config.patch_size)
    def forward(self, x): return self.proj(x).flatten(2).transpose(1, 2)

class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden); self.fc2 = nn.Linear(hidden, dim)
    def forward(self, x): return self.fc2(F.gelu(self.fc1(x)))

class Block(nn.Module):
    def __init__(self, config, i):
        super().__init__()
        D = config.embed_dim
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.attn = build_attention(config, i)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.mlp = Mlp(D, int(D * config.mlp_ratio))
    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

class VisionTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.embed_dim
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        n = (config.image_size // config.patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.randn(1, n + 1, D) * .02)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.head = nn.Linear(D, config.num_classes)
    def forward(self, x):
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        for b in self.blocks: x = b(x)
        return self.head(self.norm(x)[:, 0])

    def lambdas(self):
        return [float(b.attn.current_lambda().detach()) for b in self.blocks if hasattr(b.attn, "current_lambda")]

    def attention_maps(self, x):
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        maps = []
        for b in self.blocks:
            maps.append(b.attn.attention_maps(b.norm1(x))); x = b(x)
        return maps
