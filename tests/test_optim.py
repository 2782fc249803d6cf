import dataclasses
import re

import pytest
import torch
from torch import nn

from diffvit.config import ModelConfig, OptimConfig
from diffvit.data.datasets import open_dataset
from diffvit.models.vit import VisionTransformer
from diffvit.recipes import RECIPES
from diffvit.training.optim import build_ema, build_optimizer, build_schedule, lr_ratio
from diffvit.training.resolve import resolve


def test_learning_rate_by_hand() -> None:
    ratios = [lr_ratio(step, total_steps=8, warmup_steps=4, min_ratio=0.2) for step in range(9)]
    assert ratios[:4] == [0.25, 0.5, 0.75, 1.0]
    assert ratios[4] == 1.0
    assert ratios[6] == pytest.approx(0.2 + 0.8 * 0.5)  # half way down the cosine
    assert ratios[8] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("warmup", "steps"), [({"warmup_epochs": 0.5}, 2), ({"warmup_epochs": 0, "warmup_steps": 3}, 3)]
)
def test_schedule_follows_it_and_fractions_of_an_epoch_count(warmup: dict[str, float], steps: int) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = build_schedule(optimizer, OptimConfig(epochs=2, lr=2.0, **warmup), steps_per_epoch=4)
    rates = []
    for _ in range(8):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([2 * lr_ratio(step, 8, steps, 0.0) for step in range(8)])


@pytest.mark.parametrize("variant", ["softmax", "diff", "diff_v2"])
def test_decay_falls_on_matrices_only(variant) -> None:
    model = VisionTransformer(
        ModelConfig(variant=variant, image_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=1, num_classes=3,
                    reg_tokens=1, init_values=0.1)
    )  # fmt: skip
    decayed, kept = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    kept_names = {names[id(p)] for p in kept["params"]}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert decayed_names | kept_names == set(names.values())
    assert {"cls_token", "reg_token", "pos_embed", "norm.weight", "head.bias", "blocks.0.ls1.gamma"} <= kept_names
    assert {
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.mlp.fc1.weight",
        "head.weight",
    } <= decayed_names
    assert not any("lambda_q" in name or "lambda_k" in name or "sub_norm" in name for name in decayed_names)


def test_what_the_user_names_is_not_decayed() -> None:
    model = VisionTransformer(
        ModelConfig(image_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=1, num_classes=3)
    )
    names = {id(p): name for name, p in model.named_parameters()}

    def decayed(*patterns: str) -> set[str]:
        groups = build_optimizer(model, OptimConfig(weight_decay=0.3, no_decay=patterns)).param_groups
        return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}

    assert decayed() - decayed("head.weight", "*.mlp.*") == {
        "head.weight",
        *(f"blocks.{block}.mlp.fc{layer}.weight" for block in range(2) for layer in (1, 2)),
    }


@pytest.mark.parametrize(("pattern", "hint"), [("haed.weight", "did you mean 'head.weight'"), ("?", "such as")])
def test_a_name_that_no_parameter_has_is_refused(pattern: str, hint: str) -> None:
    """Before Ray starts."""
    config = RECIPES["sample"]()
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, no_decay=("pos_embed", pattern)))
    with pytest.raises(
        ValueError, match=rf"optim\.no_decay must name parameters .* got {re.escape(repr(pattern))}.*{hint}"
    ):
        resolve(config, open_dataset(config.data))


def test_ema_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema = build_ema(model, decay=0.75)
    assert ema is not None
    for value in (2.0, 6.0):  # the first update copies
        nn.init.constant_(model.weight, value)
        ema.update_parameters(model)
    assert ema.module.weight.item() == pytest.approx(0.75 * 2 + 0.25 * 6)
    assert build_ema(model, 0.0) is None
