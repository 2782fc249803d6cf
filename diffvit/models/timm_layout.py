"""A trained model as timm keeps one: weights under its names, and the config.json from which it builds the model.

`timm.create_model("local-dir:FOLDER", pretrained=True)` and, with that file's `architecture` and `model_args`,
`timm.create_model(architecture, checkpoint_path=…, **model_args)` compute what the model does. timm knows the plain ViT
and V1 with its RMSNorm; of these, four options that it has no name for are written into the weights:

pos_embed = "sincos2d"      fixed positions become learned ones that start there.
proj_bias = False           a bias of 0: timm's option takes the MLP's biases too.
lambda_init = a constant    timm's is l = depth_lambda_init(i). The lambda vectors are replaced by ones that give the
                            same lambda, and the norm's weight is multiplied by (1 - lambda_init) / (1 - l).
lambda_max                  likewise: the vectors give the lambda that the bounds leave.

Source: timm 1.0.31, models/_hub.py (save_config_for_hf) and layers/diff_attention.py.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from diffvit.models.attention import DiffAttention, depth_lambda_init
from diffvit.models.saved import SavedModel
from diffvit.models.vit import Block, VisionTransformer

_ARCHITECTURE = "vit_base_patch16_224"
"""The entry point; `model_args` say every field in which a model may differ from it."""


def timm_weights(model: VisionTransformer) -> dict[str, Tensor]:
    """The state dict of timm's VisionTransformer that computes what `model` does, copied.

    Raises:
        ValueError: timm has no such attention.
    """
    config = model.config
    if config.variant == "diff_v2":
        raise ValueError(
            "timm has the attention of model.variant 'softmax' and 'diff', got 'diff_v2'; --format onnx takes all three"
        )
    if config.variant == "diff" and config.head_norm != "rms":
        raise ValueError(
            f"timm's diff attention has model.head_norm 'rms', got {config.head_norm!r}; --format onnx takes both"
        )
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    weights["pos_embed"] = cast(Tensor, model.pos_embed).detach().clone()
    for layer, block in enumerate(cast(list[Block], list(model.blocks))):
        found: dict[str, Tensor] = {}
        if not config.proj_bias:
            found["proj.bias"] = torch.zeros(config.embed_dim)
        if config.variant == "diff" and (config.lambda_init != "depth" or config.lambda_max is not None):
            found |= _at_depth(cast(DiffAttention, block.attn), depth_lambda_init(layer))
        weights |= {f"blocks.{layer}.attn.{name}": tensor for name, tensor in found.items()}
    return weights


def _at_depth(attention: DiffAttention, lambda_init: float) -> dict[str, Tensor]:
    """The parameters with which `attention` computes the same under another `lambda_init`.

    With q . k = log(1 + max(t, 0)) for the first pair and log(1 + max(-t, 0)) for the second, the difference of their
    exponentials is t, for any t.
    """
    t = (attention.current_lambda().detach().double() - lambda_init).item()
    unit = torch.zeros_like(attention.lambda_q1)
    unit[0] = 1.0
    scale = (1 - attention.lambda_init) / (1 - lambda_init)
    return {
        "lambda_q1": unit * math.log1p(max(t, 0.0)),
        "lambda_k1": unit,
        "lambda_q2": unit * math.log1p(max(-t, 0.0)),
        "lambda_k2": unit.clone(),
        "sub_norm.weight": attention.sub_norm.weight.detach() * scale,
    }


def timm_config(saved: SavedModel) -> dict[str, Any]:
    """What timm's config.json says of the model: its shape, the images it was trained on, the names of its classes."""
    config = saved.config
    model_args: dict[str, Any] = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.in_channels,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": config.qkv_bias,
        "class_token": config.class_token,
        "reg_tokens": config.reg_tokens,
        "no_embed_class": config.no_embed_class or config.pos_embed == "sincos2d",
        "global_pool": config.pool,
    }
    if config.init_values is not None:
        model_args["init_values"] = config.init_values or 1e-5  # the weights say what it is; without one timm has none
    if config.variant == "diff":
        model_args["attn_layer"] = "diff"
    return {
        "architecture": _ARCHITECTURE,
        "num_classes": config.num_classes,
        "num_features": config.embed_dim,
        "global_pool": config.pool,
        "label_names": list(saved.classes),
        "model_args": model_args,
        "pretrained_cfg": {
            "input_size": [config.in_channels, config.image_size, config.image_size],
            "fixed_input_size": True,
            "interpolation": saved.interpolation,
            "crop_pct": _crop_pct(config.image_size, saved.eval_crop_ratio),
            "crop_mode": "center",
            "mean": _by_channel(saved.mean, config.in_channels),
            "std": _by_channel(saved.std, config.in_channels),
            "num_classes": config.num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "custom_load": False,
        },
    }


def _crop_pct(image_size: int, eval_crop_ratio: float) -> float:
    """A share of which timm, which rounds down where our evaluation rounds, makes the same shorter side."""
    side = round(image_size / eval_crop_ratio)
    return eval_crop_ratio if math.floor(image_size / eval_crop_ratio) == side else image_size / (side + 0.5)


def _by_channel(values: tuple[float, ...], channels: int) -> list[float]:
    return list(values) * channels if len(values) == 1 else list(values)
