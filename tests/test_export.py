"""Exported models in the programs they are for: timm and onnxruntime give our logits."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

import diffvit.export as module
from diffvit.config import AugmentConfig, ExportConfig, ModelConfig
from diffvit.data.images import eval_transform, normalize
from diffvit.export import Exported, export
from diffvit.manifest import write_manifest
from diffvit.models import onnx_layout
from diffvit.models.attention import DiffAttention
from diffvit.models.saved import load_saved
from diffvit.models.vit import VisionTransformer
from diffvit.models.weights import load_weights

CLASSES = ("cat", "dog, wild", "Ångström", "7", "z")
MEAN, STD = (0.45, 0.5, 0.55), (0.2, 0.25, 0.3)
SMALL: dict[str, Any] = {"image_size": 21, "patch_size": 7, "embed_dim": 24, "num_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"variant": "softmax"},
    "plain, other": {
        "variant": "softmax", "num_heads": 3, "mlp_ratio": 2.6, "qkv_bias": False, "proj_bias": False, "in_channels": 1,
        "reg_tokens": 2, "init_values": 0.1, "pool": "avg",
    },
    "sin-cos": {"variant": "softmax", "pos_embed": "sincos2d", "pool": "avg", "class_token": False},
    "V1": {"variant": "diff"},
    "V1, registers": {
        "variant": "diff", "image_size": 20, "patch_size": 5, "init_values": 1e-5, "mlp_ratio": 5, "pool": "avg",
        "class_token": False, "no_embed_class": True, "reg_tokens": 1, "num_heads": 3,
    },
    "V1, constant lambda_init": {"variant": "diff", "lambda_init": 0.95},
    "V1, no lambda_init": {"variant": "diff", "lambda_init": 0.0, "pos_embed": "sincos2d"},
    "V1, lambda bounded": {"variant": "diff", "lambda_max": 0.1},
    "V1, LayerNorm": {"variant": "diff", "head_norm": "layer"},
    "V1, LayerScale from 0": {"variant": "diff", "init_values": 0.0},
    "V2": {"variant": "diff_v2", "num_heads": 3, "reg_tokens": 1},
}  # fmt: skip


NOT_IN_TIMM = {
    "V2": r"model.variant 'softmax' and 'diff', got 'diff_v2'; --format onnx",
    "V1, LayerNorm": r"model.head_norm 'rms', got 'layer'; --format onnx",
}


def checkpoint(folder: Path, shape: str, depth: int = 3, **data: Any) -> Path:
    """Of a model whose every weight matters: as initialised, biases are 0 and logits hardly differ."""
    config = ModelConfig(num_classes=len(CLASSES), **{**SMALL, "depth": depth, **SHAPES[shape]})
    torch.manual_seed(3)
    model = VisionTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    fields = {"classes": CLASSES, "mean": MEAN[: config.in_channels], "std": STD[: config.in_channels]}
    fields |= {"eval_crop_ratio": 0.875, **data}
    write_manifest(folder, {"model": dataclasses.asdict(config), "data": fields})
    return folder


def exported(tmp_path: Path, shape: str, *formats: Any, **data: Any) -> Exported:
    source = checkpoint(tmp_path / "checkpoint", shape, **data)
    return export(ExportConfig(checkpoint=str(source), out=str(tmp_path / "out"), format=formats))


def ours(tmp_path: Path, images: Tensor) -> Tensor:
    """The logits of uint8 images, (B, classes)."""
    saved = load_saved(tmp_path / "checkpoint")
    with torch.no_grad():
        logits: Tensor = saved.model(normalize(images, saved.mean, saved.std))
    return logits


def random_images(tmp_path: Path, count: int = 4) -> Tensor:
    config = load_saved(tmp_path / "checkpoint").config
    return torch.randint(0, 256, (count, config.in_channels, config.image_size, config.image_size), dtype=torch.uint8)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in NOT_IN_TIMM])
def test_timm_gives_the_same_logits(tmp_path: Path, shape: str) -> None:
    found = exported(tmp_path, shape, "timm")
    assert found == Exported(tmp_path / "out", ("config.json", "model.safetensors"))
    images = random_images(tmp_path)
    expected = ours(tmp_path, images)
    assert expected.std() > 0.1
    config = json.loads((found.folder / "config.json").read_text())
    by_folder = timm.create_model(f"local-dir:{found.folder}", pretrained=True)
    by_name = timm.create_model(
        config["architecture"],
        checkpoint_path=found.folder / "model.safetensors",
        num_classes=config["num_classes"],
        **config["model_args"],
    )
    cfg = by_folder.pretrained_cfg
    pixels = normalize(images, cfg["mean"], cfg["std"])
    for model in (by_folder.eval(), by_name.eval()):
        with torch.no_grad():
            torch.testing.assert_close(model(pixels), expected, rtol=1e-5, atol=1e-5)
    assert tuple(cfg["label_names"]) == CLASSES
    assert cfg["num_classes"] == by_folder.num_classes == 5
    assert tuple(cfg["input_size"]) == (images.shape[1], images.shape[2], images.shape[3])


@pytest.mark.parametrize(("ratio", "side"), [(0.875, 24), (0.95, 22), (0.8, 26), (1.0, 21), (0.9, 23)])
def test_timm_makes_the_same_crop(tmp_path: Path, ratio: float, side: int) -> None:
    """21 / 0.8 = 26.25 and 21 / 0.9 = 23.3 are rounded down by both, 21 / 0.95 = 22.1 too; 21 / 0.85 = 24.7 is not."""
    found = exported(tmp_path, "plain", "timm", eval_crop_ratio=ratio)
    model = timm.create_model(f"local-dir:{found.folder}", pretrained=True)
    steps = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False).transforms
    mine = eval_transform(AugmentConfig(eval_crop_ratio=ratio), 21).transforms
    assert (steps[0].size, mine[0].size) == (side, [side])
    assert (tuple(steps[1].size), steps[0].interpolation.value) == ((21, 21), "bilinear")
    assert steps[-1].mean.tolist() == pytest.approx(MEAN)
    assert steps[-1].std.tolist() == pytest.approx(STD)


def test_a_side_that_is_rounded_up(tmp_path: Path) -> None:
    """21 / 0.85 = 24.7: our evaluation makes 25 of it, and timm would make 24."""
    found = exported(tmp_path, "plain", "timm", eval_crop_ratio=0.85, interpolation="bicubic")
    pretrained = json.loads((found.folder / "config.json").read_text())["pretrained_cfg"]
    assert math.floor(21 / 0.85) == 24
    assert math.floor(21 / pretrained["crop_pct"]) == 25
    assert pretrained["interpolation"] == "bicubic"


def test_one_mean_for_three_channels_is_given_three_times(tmp_path: Path) -> None:
    found = exported(tmp_path, "V1", "timm", mean=(0.4,), std=(0.3,))
    cfg = json.loads((found.folder / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["mean"], cfg["std"]) == ([0.4, 0.4, 0.4], [0.3, 0.3, 0.3])


def test_our_own_loader_takes_it_back(tmp_path: Path) -> None:
    found = exported(tmp_path, "V1", "timm")
    again = VisionTransformer(load_saved(tmp_path / "checkpoint").config)
    load_weights(again, found.folder / "model.safetensors")
    images = random_images(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(normalize(images, MEAN, STD)), ours(tmp_path, images))


def test_lambda_of_either_sign_is_written_into_the_vectors() -> None:
    """Wanted at layer 0, where lambda_init = 0.2: lambda = 0.95 + 1 - 1 is 0.75 above it, lambda = 0 is 0.2 below."""
    from diffvit.models.timm_layout import _at_depth

    for init, logs in ((0.95, (math.log(1.75), 0.0)), (0.0, (0.0, math.log(1.2)))):
        attention = DiffAttention(24, 2, lambda_init=init)
        for parameter in (attention.lambda_q1, attention.lambda_q2):
            torch.nn.init.zeros_(parameter)
        found = _at_depth(attention, 0.2)
        dots = [float(found[f"lambda_q{i}"] @ found[f"lambda_k{i}"]) for i in (1, 2)]
        assert dots == pytest.approx(logs, abs=1e-6)
        assert found["sub_norm.weight"].tolist() == pytest.approx([(1 - init) / 0.8] * 12)


@pytest.mark.parametrize("shape", NOT_IN_TIMM)
def test_what_timm_lacks_is_refused_and_leaves_nothing(tmp_path: Path, shape: str) -> None:
    with pytest.raises(ValueError, match=NOT_IN_TIMM[shape]):
        exported(tmp_path, shape, "timm")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["plain, other", "V1, registers", "V1, LayerNorm", "V2"])
def test_onnxruntime_gives_the_same_logits(tmp_path: Path, shape: str) -> None:
    found = exported(
        tmp_path, shape, "onnx", depth=1, interpolation="bicubic"
    )  # for the test's time: writing takes a second a block
    assert found.files == ("model.onnx",)
    assert found.onnx_difference is not None
    assert found.onnx_difference <= 1e-4
    session = onnxruntime.InferenceSession(found.folder / "model.onnx", providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    config = load_saved(tmp_path / "checkpoint").config
    assert (given.name, given.type, given.shape[1:]) == (
        "images",
        "tensor(uint8)",
        [config.in_channels, config.image_size, config.image_size],
    )
    assert (made.name, made.shape[1:]) == ("logits", [5])
    for count in (1, 4, 7):
        images = random_images(tmp_path, count)
        expected = ours(tmp_path, images)
        assert expected.std() > 0.1
        np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], expected, rtol=1e-4, atol=1e-4)
    saved = load_saved(tmp_path / "checkpoint")
    other = dataclasses.replace(saved, std=tuple(2 * value for value in saved.std))
    with pytest.raises(onnx_layout.OnnxMismatch, match="logits differ by"):
        onnx_layout.largest_difference(other, found.folder / "model.onnx")
    notes = session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(notes["classes"])) == CLASSES
    size = config.image_size
    assert (notes["image_size"], notes["resize_short_side"]) == (str(size), str(round(size / 0.875)))
    assert notes["interpolation"] == "bicubic"
    assert notes["channels"] == ("grey" if config.in_channels == 1 else "RGB")


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    config = ExportConfig(checkpoint="nowhere", out=str(tmp_path / "out"), format=("onnx",))
    with pytest.raises(ValueError, match=rf"needs the package {package}: pip install -e '\.\[export\]'"):
        export(config)


def test_out_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out must not exist"):
        exported(tmp_path, "V1", "timm")
    assert not list((tmp_path / "out").iterdir())


def test_a_cut_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def cut(saved: object) -> None:
        seen.append(sorted(path.name for path in tmp_path.glob("**/model.safetensors")))
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "timm_config", cut)
    with pytest.raises(KeyboardInterrupt):
        exported(tmp_path, "V1", "timm")
    assert seen == [["model.safetensors"] * 2]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = checkpoint(tmp_path / "checkpoint", "V1"), tmp_path / "out"
    job = Path(__file__).parents[1] / "ray_jobs/export.py"
    monkeypatch.setattr(sys, "argv", ["export.py", "--checkpoint", str(source), "--out", str(out)])
    runpy.run_path(str(job), run_name="__main__")
    assert f'timm.create_model("local-dir:{out}", pretrained=True)' in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(job), run_name="__main__")
    assert ended.value.code == 2
    assert "error: out must not exist" in capsys.readouterr().err
