"""Weights from every layout that is recognised, and the refusal of what is not."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import with_fields, write_untrained
from safetensors.torch import save_file
from torch import Tensor

from diffvit.config import ModelConfig, RunConfig
from diffvit.manifest import write_manifest
from diffvit.models.vit import VisionTransformer
from diffvit.models.weights import load_weights

SMALL: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "embed_dim": 12,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
}


def model(seed: int = 0, **options: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(ModelConfig(**{**SMALL, "variant": "diff", "num_heads": 2, **options}))


def same(a: VisionTransformer, b: VisionTransformer) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


def save_checkpoint(folder: Path, source: VisionTransformer) -> Path:
    folder.mkdir(parents=True)
    save_file(source.state_dict(), folder / "model.safetensors")
    write_manifest(folder, {"step": 1})
    return folder


def test_state_dict_file_checkpoint_and_run(tmp_path: Path) -> None:
    source = model(1)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    checkpoint = save_checkpoint(tmp_path / "run" / "checkpoint_step_1", source)
    (tmp_path / "run" / "results.json").write_text(json.dumps({"best": {"checkpoint": checkpoint.name}}))
    for given in (source.state_dict(), tmp_path / "weights.safetensors", str(checkpoint), tmp_path / "run"):
        target = model(2)
        assert not same(target, source)
        report = load_weights(target, given)
        assert same(target, source)
        assert (report.resampled, report.replaced) == ((), ())


@pytest.mark.parametrize("variant", ["diff", "diff_v2"])
def test_unilm_layout(variant: Any) -> None:
    """Separate projections in the place of `qkv`: what the model then computes is what unilm's own modules do."""
    target, x = model(1, variant=variant).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    first, weights = target.blocks[0].attn, target.state_dict()
    queries = 12 if variant == "diff" else 24
    output, norm = ("out_proj", "subln") if variant == "diff" else ("o_proj", "lambda_proj")
    for block in (f"blocks.{number}.attn." for number in range(2)):
        for name in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias"):
            del weights[block + name]
        for name, rows in (("q_proj", queries), ("k_proj", 12), ("v_proj", 12), (output, 12)):
            weights[f"{block}{name}.weight"] = torch.randn(rows, 12, dtype=torch.float64)
            weights[f"{block}{name}.bias"] = torch.randn(rows, dtype=torch.float64)
        if variant == "diff":
            weights[f"{block}{norm}.weight"] = weights.pop(f"{block}sub_norm.weight").uniform_(0.5, 2)
    load_weights(target, weights)
    own = {name.removeprefix("blocks.0.attn."): tensor for name, tensor in weights.items() if "blocks.0.attn" in name}
    expected = unilm_v1(x, own, first.lambda_init) if variant == "diff" else unilm_v2(x, own)
    torch.testing.assert_close(first(x), expected)


def unilm_v1(x: Tensor, weights: dict[str, Tensor], lambda_init: float) -> Tensor:
    """`MultiheadDiffAttn.forward` of two heads, without rotation and mask."""
    B, N, D = x.shape
    H, K = 2, D // 4
    q, k = (project(x, weights, name).view(B, N, 2 * H, K).transpose(1, 2) for name in ("q_proj", "k_proj"))
    v = project(x, weights, "v_proj").view(B, N, H, 2 * K).transpose(1, 2)
    maps = (q @ k.transpose(2, 3) / K**0.5).softmax(-1).view(B, H, 2, N, N)
    one, two = (weights[f"lambda_q{i}"].dot(weights[f"lambda_k{i}"]).exp() for i in (1, 2))
    heads = (maps[:, :, 0] - (one - two + lambda_init) * maps[:, :, 1]) @ v
    heads = heads / (heads.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights["subln.weight"]
    return project((heads * (1 - lambda_init)).transpose(1, 2).reshape(B, N, D), weights, "out_proj")


def unilm_v2(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """`MultiheadFlashDiffV2.forward` of two heads: query heads 2i and 2i + 1 read key and value head i."""
    B, N, D = x.shape
    H, K = 2, D // 2
    q = project(x, weights, "q_proj").view(B, N, 2 * H, K).transpose(1, 2)
    k, v = (project(x, weights, name).view(B, N, H, K).transpose(1, 2) for name in ("k_proj", "v_proj"))
    k, v = (heads.repeat_interleave(2, dim=1) for heads in (k, v))
    outputs = ((q @ k.transpose(2, 3) / K**0.5).softmax(-1) @ v).transpose(1, 2)
    gate = (x @ weights["lambda_proj.weight"].T).sigmoid().unsqueeze(-1)
    heads = outputs[:, :, 0::2] - gate * outputs[:, :, 1::2]
    return project(heads.reshape(B, N, D), weights, "o_proj")


def project(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def test_positions_of_another_grid_are_resampled() -> None:
    source, target = model(1), model(2, image_size=16)
    report = load_weights(target, source.state_dict())
    assert report.resampled == ("pos_embed",)
    assert torch.equal(target.pos_embed[:, 0], source.pos_embed[:, 0])
    assert target.pos_embed.shape == (1, 1 + 16, 12)


def test_classifier_is_replaced_only_when_asked() -> None:
    source, target = model(1), model(2, num_classes=7)
    fresh = target.head.weight.detach().clone()
    with pytest.raises(ValueError, match=r"(?s)replace_head=True.*head.weight is 5 x 12, the model's 7 x 12"):
        load_weights(target, source.state_dict())
    report = load_weights(target, source.state_dict(), replace_head=True)
    assert report.replaced == ("head.weight", "head.bias")
    assert torch.equal(target.head.weight, fresh)
    assert torch.equal(target.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_what_does_not_fit_is_listed_at_once_and_nothing_is_loaded() -> None:
    source, target = model(1), model(2)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    weights = dict(source.state_dict())
    del weights["norm.weight"]
    weights["extra"] = torch.zeros(2, 3)
    weights["blocks.0.mlp.fc1.weight"] = torch.zeros(4, 12)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_weights(target, weights)
    text = str(caught.value)
    assert "missing: norm.weight (12)" in text
    assert "unexpected: extra (2 x 3)" in text
    assert "another shape: blocks.0.mlp.fc1.weight is 4 x 12, the model's 48 x 12" in text
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_sources_that_are_none(tmp_path: Path) -> None:
    def refusal(source: Path) -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            load_weights(model(), source)
        return str(caught.value)

    assert "not found" in refusal(tmp_path / "nowhere")
    (tmp_path / "weights.pth").write_bytes(b"")
    assert "pickled files can run code" in refusal(tmp_path / "weights.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    assert "not a readable safetensors file" in refusal(tmp_path / "cut.safetensors")
    (tmp_path / "empty").mkdir()
    assert "neither a run with a checkpoint" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "results.json").write_text(json.dumps({"best": None, "last": None}))
    assert "has saved no checkpoint" in refusal(tmp_path / "empty")


def test_a_run_that_was_cut_gives_its_best_so_far(tmp_path: Path) -> None:
    best, target = model(1), model(2)
    saved = [(3, 50.0, model(3)), (6, 70.0, best), (9, 60.0, model(4)), (10, 70.0, model(8)), (11, None, model(5))]
    for step, top1, source in saved:  # the first of equals, as in results.json
        folder = save_checkpoint(tmp_path / f"checkpoint_step_{step:08d}", source)
        manifest = json.loads((folder / "checkpoint.json").read_text())
        metrics = {} if top1 is None else {"top1": top1}
        (folder / "checkpoint.json").write_text(json.dumps({**manifest, "step": step, "metrics": metrics}))
    copy = save_checkpoint(tmp_path / "checkpoint_step_00000006_of_another", model(6))
    content = {**json.loads((copy / "checkpoint.json").read_text()), "step": 6, "metrics": {"top1": 99.0}}
    (copy / "checkpoint.json").write_text(json.dumps(content))
    load_weights(target, tmp_path)
    assert same(target, best)
    # an earlier sitting's, which names what was deleted since
    (tmp_path / "results.json").write_text(json.dumps({"best": {"checkpoint": "checkpoint_step_00000001"}}))
    target = model(7)
    load_weights(target, tmp_path)
    assert same(target, best)


def test_a_run_whose_best_has_no_checkpoint_gives_its_last(tmp_path: Path) -> None:
    source, target = model(1), model(2)
    checkpoint = save_checkpoint(tmp_path / "elsewhere", source)
    results = {"best": {"top1": 0.5, "checkpoint": None}, "last": {"checkpoint": str(checkpoint)}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    load_weights(target, tmp_path)
    assert same(target, source)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("results.json", '{"best":', "results.json cannot be read"),
        ("results.json", "[]", "results.json cannot be read"),
        ("checkpoint.json", '{"format_version":', "checkpoint.json cannot be read"),
        ("checkpoint.json", '{"format_version": 1}', "checkpoint.json cannot be read"),
        ("checkpoint.json", '{"format_version": 1, "sha256": {}}', "does not name model.safetensors"),
    ],
)
def test_damaged_json_is_named(tmp_path: Path, file: str, text: str, message: str) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(model(), tmp_path)
    assert not isinstance(caught.value, json.JSONDecodeError)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"pos_embed": (5,)}, "another shape: pos_embed is 5,"),
        ({"pos_embed": (1, 1 + 5, 12)}, "another shape: pos_embed is 1 x 6 x 12"),
        ({"blocks.0.attn.k_proj.weight": (12, 12)}, "unexpected: blocks.0.attn.k_proj.weight"),
        (
            {f"blocks.0.attn.{part}_proj.weight": (12, 7 if part == "k" else 12) for part in "qkv"},
            "unexpected: blocks.0.attn.k_proj.weight (12 x 7)",
        ),
        (
            {f"blocks.0.attn.{part}_proj.weight": () for part in "qkv"},
            "unexpected: blocks.0.attn.q_proj.weight (scalar)",
        ),
    ],
)
def test_odd_tensors_are_listed_and_not_dropped(odd: dict[str, tuple[int, ...]], message: str) -> None:
    weights = {**model(1).state_dict(), **{name: torch.zeros(shape) for name, shape in odd.items()}}
    with pytest.raises(ValueError, match=re.escape(message)):
        load_weights(model(2), weights)


def test_what_is_no_mapping_of_floating_point_tensors() -> None:
    weights = model(1).state_dict()
    with pytest.raises(ValueError, match=r"got dict for 'model'; .* give source\['model'\]"):
        load_weights(model(2), {"model": dict(weights)})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"got int for 'epoch'$"):
        load_weights(model(2), {**weights, "epoch": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"not floating-point: head.bias is torch.int8; quantised"):
        load_weights(model(2), {**weights, "head.bias": weights["head.bias"].to(torch.int8)})


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_checkpoint(tmp_path: Path, damage: str) -> None:
    folder = save_checkpoint(tmp_path / "checkpoint", model(1))
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        data[-1] ^= 1
        file.write_bytes(data if damage == "flip" else data[:-7])
    with pytest.raises(ValueError, match=r"is damaged: .*model\.safetensors"):
        load_weights(model(2), folder)


def test_weights_of_another_lambda_are_refused(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = with_fields(tiny_config, model={"num_classes": 3, "lambda_init": 0.5})
    source = write_untrained(config, tmp_path / "run")
    target = VisionTransformer(config.model)
    load_weights(target, tmp_path / "run")
    assert same(target, source)
    for fields, message in (
        ({"lambda_init": "depth"}, "trained with model.lambda_init = 0.5, got 'depth'"),
        ({"lambda_max": 0.9}, "trained with model.lambda_max = None, got 0.9"),
    ):
        with pytest.raises(ValueError, match=message):
            load_weights(VisionTransformer(dataclasses.replace(config.model, **fields)), tmp_path / "run")
        other = VisionTransformer(dataclasses.replace(config.model, **fields))
        report = load_weights(other, tmp_path / "run", from_plain=True)  # to train from, as a search of lambda does
        assert str(report) == f"trained with another {next(iter(fields))}, their own classifier"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 1}', '{"format_version": 1, "sha256": 3}'])
def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    folder = save_checkpoint(tmp_path / "run", model())
    (folder / "checkpoint.json").write_text(content)
    with pytest.raises(ValueError, match=r"checkpoint .*run is damaged: checkpoint.json cannot be read"):
        load_weights(model(), folder)
