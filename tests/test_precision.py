"""Precision and compilation: what is set, what is said, and that compiled training is the same training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from conftest import with_fields
from safetensors.torch import load_file

from diffvit.config import RunConfig, ScaleConfig
from diffvit.data.datasets import open_dataset
from diffvit.models.vit import VisionTransformer
from diffvit.training.alone import train_alone
from diffvit.training.compilation import require_compiler
from diffvit.training.launch import train
from diffvit.training.precision import autocast, has_bf16, numbers, precision_warning, set_float32_products, unsupported

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def _restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize(
    ("device", "precision", "products", "convolutions"),
    [
        (CUDA, "auto", "high", True),
        (CUDA, "bf16", "high", True),
        (CUDA, "tf32", "high", True),
        (CUDA, "fp32", "highest", False),
        (CPU, "auto", "highest", True),
    ],
)
def test_tf32_is_for_gpus_that_are_not_asked_for_fp32(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, precision: str, products: str, convolutions: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    set_float32_products(ScaleConfig(precision=precision), device)
    assert torch.get_float32_matmul_precision() == products
    assert torch.backends.cudnn.allow_tf32 is convolutions


@pytest.mark.parametrize(("emulates", "native"), [(True, False), (False, False), (True, True)])
def test_an_emulated_bf16_is_not_taken_by_itself(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, emulates: bool, native: bool
) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: emulates if including_emulation else native
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if native else (7, 5))
    assert has_bf16(CUDA) is native
    for asked in ("bf16", "auto"):
        scale = ScaleConfig(precision=asked)
        warning = precision_warning(scale, CUDA)
        assert (warning is None) is native
        assert native or f"{asked!r}, but Old GPU would emulate bf16" in (warning or "")
        assert native or (warning or "").endswith("computes in fp32")  # what has no bf16 has no TF32 either
        assert numbers(scale, CUDA) == ("bf16" if native else "fp32")
    assert precision_warning(ScaleConfig(precision="tf32"), CUDA) is None


@pytest.mark.parametrize(("found", "native"), [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({}, False)])
def test_a_cpu_with_bf16_of_its_own_is_not_warned_of(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, bool], native: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **found})
    assert has_bf16(CPU) is native
    warning = precision_warning(ScaleConfig(precision="bf16"), CPU)
    assert (warning is None) is native
    assert native or "this CPU would emulate bf16, slower than float32: the run computes in fp32" in (warning or "")


def test_bf16_on_a_cpu_where_it_has_it_else_float32_and_said(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    dataset = open_dataset(tiny_config.data)
    config = with_fields(
        tiny_config,
        model={"num_classes": 3},
        data={"classes": dataset.classes},
        scale={"precision": "bf16"},
        optim={"epochs": 1},
    )
    heard: list[tuple[str, dict[str, object]]] = []
    results = train_alone(config, dataset, lambda kind, fields: heard.append((kind, fields)))
    (warning,) = [fields["message"] for kind, fields in heard if kind == "warning"]
    assert "scale.precision = 'bf16', but this CPU" in str(warning)
    assert results["precisions"] == ["fp32"]
    assert product_type(config) == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert product_type(config) == torch.bfloat16
    assert product_type(tiny_config) == torch.float32  # by itself training on a CPU stays in float32


def product_type(config: RunConfig) -> torch.dtype:
    with autocast(config, CPU):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def test_images_lie_channels_last_to_no_effect_on_the_scores(tiny_config: RunConfig) -> None:
    """As they do on a GPU."""
    model = VisionTransformer(with_fields(tiny_config, model={"num_classes": 3, "in_channels": 3}).model).double()
    images = torch.randn(2, 3, *[tiny_config.model.image_size] * 2, dtype=torch.float64)
    last = images.contiguous(memory_format=torch.channels_last)
    assert last.stride() != images.stride()
    torch.testing.assert_close(model(last), model(images))


def test_compile_without_a_compiler_is_refused_before_anything(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    config = with_fields(tiny_config, scale={"compile": True}, data={"path": "/nowhere"})
    with pytest.raises(ValueError, match=r"scale\.compile needs a C\+\+ compiler, and no-such-compiler is not found"):
        train(config)
    with pytest.raises(ValueError, match="no-such-compiler"):
        train_alone(config, open_dataset(tiny_config.data))
    assert not config.folder.exists()
    require_compiler(ScaleConfig())
    monkeypatch.setenv("CXX", "env g++")
    require_compiler(ScaleConfig(compile=True))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="needs a C compiler, and gcc or clang is not found"):
        require_compiler(ScaleConfig(compile=True, gpu=True))


@pytest.mark.slow
def test_compiled_training_is_the_same_training(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs run as they were traced; to make C++ of them takes a minute on a slow machine."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    tiny_config = with_fields(tiny_config, scale={"micro_batch_size": 4})
    dataset = open_dataset(tiny_config.data)
    config = with_fields(tiny_config, model={"num_classes": 3, "depth": 1}, data={"classes": dataset.classes})
    finals = {}
    for name, compiles in (("eager", False), ("compiled", True)):
        torch._dynamo.utils.counters.clear()
        run = dataclasses.replace(with_fields(config, scale={"compile": compiles}), name=name)
        results = train_alone(run, dataset)
        assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) is compiles
        finals[name] = load_file(run.folder / results["last"]["checkpoint"] / "model.safetensors")
    assert set(finals["compiled"]) == set(VisionTransformer(config.model).state_dict())
    for name, tensor in finals["eager"].items():
        torch.testing.assert_close(finals["compiled"][name], tensor, rtol=1e-3, atol=1e-4)


def test_a_gpu_that_torch_is_not_built_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unsupported(CPU) is None
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "sm_120", "compute_120"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    said = unsupported(CUDA)
    assert said is not None
    assert said.startswith("Tesla V100 has compute capability 7.0, and the installed torch ")
    assert "is built for 7.5 and newer: train on a newer GPU, or install a torch" in said
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 3))
    assert unsupported(CUDA) is None
