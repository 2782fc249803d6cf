"""A plain ViT's weights in a differential ViT's layout, so that training goes on instead of beginning again.

V2 is exact: its keys, values and output projection are the plain model's, the first map of each head has the plain
head's queries, and with the gate closed (`DiffAttentionV2.gate_opening = 0`) the second map adds nothing. Its queries
start as those of the head's neighbour: copies of the first map's would only make every head smaller when the gate
opens.

V1 is not, and cannot be: the two value halves of a V1 head, which belonged to two plain heads, are read through one
pair of maps. What is lost at the start: the second plain head of each pair reads through the first one's map, the
second map is subtracted, and RMSNorm takes each token's magnitude. Everything outside of attention is kept; with
`lambda_init = 0` nothing is subtracted at first: lambda is 0 there.

Letters: D width, H heads of the plain model, K their size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffvit.config import Variant
from diffvit.models.vit import VisionTransformer

Weights = dict[str, Tensor]


def is_plain(weights: Weights) -> bool:
    """Whether these are a plain ViT's, by what differential attention adds."""
    return "blocks.0.attn.qkv.weight" in weights and not any(
        name.endswith(("lambda_q1", "lambda_proj.weight")) for name in weights
    )


def differential_heads(plain_heads: int, variant: Variant) -> int:
    """`num_heads` of the differential model that a plain one converts to: its maps are the plain model's, as wide.

    Raises:
        ValueError: V1 reads two plain heads through each pair of maps, and their number is odd.
    """
    if variant == "diff_v2":
        return plain_heads
    if plain_heads % 2:
        raise ValueError(
            f"a plain ViT becomes V1 (model.variant = 'diff') by pairs of heads, and its {plain_heads} are odd; "
            "'diff_v2' takes any number"
        )
    return plain_heads // 2


def convert_plain(weights: Weights, model: VisionTransformer, plain_heads: int | None = None) -> Weights:
    """The weights of a plain ViT for the differential `model`; what a plain ViT has not is the model's own.

    Args:
        weights: by timm's names; their shapes are the same for any number of heads.
        model: as wide, with the heads that `differential_heads` says.
        plain_heads: of the plain ViT; None where nothing tells, and then `model` is taken at its word.

    Raises:
        ValueError: `model` is not as wide as the plain one, or has other heads.
    """
    heads = model.config.num_heads if plain_heads is None else differential_heads(plain_heads, model.config.variant)
    if model.config.num_heads != heads:
        raise ValueError(
            f"a plain ViT of {plain_heads} heads becomes a {model.config.variant!r} model with "
            f"model.num_heads = {heads}, got {model.config.num_heads}: other heads would be cut out of it at random"
        )
    D = model.config.embed_dim
    own = model.state_dict()
    converted = dict(weights)
    for name, tensor in weights.items():
        if ".attn.qkv." not in name:
            continue
        if tensor.shape[0] != 3 * D:
            raise ValueError(
                f"a plain ViT converts to a model of its own width; {name} has {tensor.shape[0]} rows, "
                f"embed_dim = {D} needs {3 * D}"
            )
        if model.config.variant == "diff_v2":
            converted[name] = _queries_of_two_maps(tensor, model.config.num_heads)
    for name in own:
        if name.endswith(("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "sub_norm.weight", "sub_norm.bias")):
            # exp(q1 . k1) - exp(q2 . k2) is 0 where the second pair is the first
            alike = name.endswith(("lambda_q2", "lambda_k2")) and model.config.lambda_init == 0
            converted[name] = own[f"{name[:-1]}1"] if alike else own[name]
        elif name.endswith("lambda_proj.weight"):
            converted[name] = torch.zeros_like(own[name])  # sigmoid(0): every gate half open, once they open
    return converted


def _queries_of_two_maps(qkv: Tensor, num_heads: int) -> Tensor:
    """(3D, ...) -> (4D, ...): the queries of maps 2h and 2h + 1 are those of plain heads h and h + 1."""
    q, k, v = qkv.chunk(3)
    by_head = q.unflatten(0, (num_heads, -1))
    both = torch.stack([by_head, by_head.roll(-1, 0)], dim=1).flatten(0, 2)
    return torch.cat([both, k, v])
