"""What runs on a GPU only: fused attention, bf16, pinned copies, NCCL. Skipped where there is none.

Needs neither Ray nor the other tests' fixtures: `python -m pytest --noconftest tests/test_cuda.py` on any machine with
a GPU, torch and the package.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from diffvit.config import DataConfig, ModelConfig, RunConfig, ScaleConfig, Variant
from diffvit.data.batches import Batch
from diffvit.data.datasets import Dataset, open_dataset
from diffvit.data.loader import BatchLoader, LocalStream, plan_run
from diffvit.models.attention import Attention, DiffAttention, DiffAttentionV2
from diffvit.models.two_maps import subtract_outputs
from diffvit.models.vit import VisionTransformer
from diffvit.models.weights import load_weights
from diffvit.recipes import RECIPES
from diffvit.training.alone import train_alone
from diffvit.training.evaluation import _copying_stream, evaluate, to_device
from diffvit.training.precision import autocast, has_bf16
from diffvit.training.sharding import is_sharded, shard, whole_copy
from diffvit.training.step import replicate
from diffvit.training.tracking import Waiting

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
VARIANTS = [Attention, DiffAttention, DiffAttentionV2]
B, N, H = 3, 197, 3


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """TF32 off while float32 is compared with float64; what a run leaves on is put back."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def relative_error(mine: torch.Tensor, reference: torch.Tensor) -> float:
    reference = reference.double().cpu()
    return float((mine.double().cpu() - reference).norm() / reference.norm())


def attention(kind: type[nn.Module], width: int) -> nn.Module:
    torch.manual_seed(0)
    return kind(width, H, qkv_bias=True)


@pytest.mark.parametrize("width", [192, 384])  # heads and maps of 32, 64 and 128
@pytest.mark.parametrize("kind", VARIANTS)
def test_attention_has_the_values_and_gradients_of_float64_on_the_cpu(kind: type[nn.Module], width: int) -> None:
    layer = attention(kind, width)
    x = torch.randn(B, N, width, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(B, N, width, generator=torch.Generator().manual_seed(2))
    found = []
    for module, device, dtype in ((copy.deepcopy(layer).double(), "cpu", torch.float64), (layer, GPU, torch.float32)):
        module = module.to(device)
        inputs = x.to(device, dtype).requires_grad_()
        out = module(inputs)
        gradients = torch.autograd.grad((out * upstream.to(out)).sum(), [inputs, *module.parameters()])
        found.append([out.detach(), *gradients])
    for reference, mine in zip(*found, strict=True):
        assert relative_error(mine, reference) < 1e-4


@pytest.mark.parametrize("kind", VARIANTS)
def test_bf16_attention_is_as_near_as_bf16_allows(kind: type[nn.Module]) -> None:
    layer, x = attention(kind, 384).to(GPU), torch.randn(B, N, 384, device=GPU)
    exact = layer(x)
    with torch.autocast("cuda", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, exact) < 2e-2


@pytest.mark.parametrize("variant", ["softmax", "diff", "diff_v2"])
def test_compiled_model_gives_the_same_logits_and_gradients(variant: Variant) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        ModelConfig(variant=variant, image_size=64, patch_size=16, embed_dim=96, depth=2, num_heads=3, num_classes=7)
    ).to(GPU)
    images = torch.randn(5, 3, 64, 64, device=GPU)
    found = []
    for forward in (model, replicate(model, 1, GPU, compiles=True)):
        logits = forward(images)
        found.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-3)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Two epochs of the sample's first images on a GPU, saved every step."""
    recipe = RECIPES["sample"]()
    return dataclasses.replace(
        recipe,
        name="cuda",
        storage=str(tmp_path),
        model=dataclasses.replace(recipe.model, num_classes=10, depth=2, drop_path=0.1),
        optim=dataclasses.replace(recipe.optim, epochs=1, batch_size=500, warmup_epochs=0.1, ema_decay=0.8),
        scale=ScaleConfig(workers=1, gpu=True),
    )


@pytest.fixture
def dataset(config: RunConfig) -> Dataset:
    return open_dataset(config.data)


def test_a_run_on_a_gpu_trains_in_bf16_and_its_weights_hold_on_a_cpu(config: RunConfig, dataset: Dataset) -> None:
    assert has_bf16(GPU)
    assert autocast(config, GPU).fast_dtype == torch.bfloat16
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, classes=dataset.classes))
    results = train_alone(config, dataset)
    assert results["status"] == "finished"
    assert results["device"] == torch.cuda.get_device_name()
    assert results["last"]["top1"] > 30
    plain = VisionTransformer(config.model)
    load_weights(plain, config.folder / results["last"]["checkpoint"])
    plan = plan_run(config, dataset)
    stream = LocalStream(BatchLoader(config, dataset.train, plan[0]), BatchLoader(config, dataset.val, plan[1]))
    on_cpu = evaluate(plain, stream.evaluate(), len(dataset.val), config, torch.device("cpu"))
    assert abs(on_cpu["top1"] - results["last"]["top1"]) < 1.0  # float32 there, bf16 here
    weights = load_file(config.folder / results["last"]["checkpoint"] / "model.safetensors")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())


def test_images_are_copied_while_the_gpu_computes() -> None:
    rng, data = np.random.default_rng(0), DataConfig(mean=(0.5,), std=(0.25,))
    batch = Batch(0, rng.integers(0, 256, (8, 3, 64, 64), dtype=np.uint8), np.arange(8))
    expected, labels = to_device(batch, data, torch.device("cpu"))
    to_device(batch, data, GPU)  # the first call makes the stream
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second of work
    images, numbers = to_device(batch, data, GPU)
    _copying_stream(GPU).synchronize()
    assert not torch.cuda.current_stream().query(), "the copy waited for what was being computed"
    torch.testing.assert_close(images.cpu(), expected)
    assert numbers.tolist() == labels.tolist()


def test_waiting_for_images_counts_while_the_gpu_stands_still() -> None:
    def batches() -> Iterator[Batch]:
        while True:
            time.sleep(0.2)
            yield Batch(0, np.empty(0, np.uint8), np.empty(0, np.int64))

    waiting, images = Waiting(GPU), batches()
    torch.cuda._sleep(2_000_000_000)  # about a second of work
    waiting.next_of(images)
    torch.cuda.synchronize()
    assert waiting.read() < 0.05
    waiting.next_of(images)
    torch.cuda.synchronize()
    assert waiting.read() >= 0.19


def test_lambda_is_not_rounded_to_bf16() -> None:
    layer = DiffAttention(64, 2).to(GPU)
    split, values = layer._split, torch.zeros(1, N, 192, device=GPU, dtype=torch.bfloat16)
    values[..., 128:] = 1.0  # maps of 1 / N over values of 1: the product is 1 - lambda
    out = subtract_outputs(values, split, torch.tensor(0.998, device=GPU))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), torch.full_like(out, 0.002).float(), rtol=0.01, atol=0)


def test_sharded_by_nccl_it_is_the_same_function(tmp_path: Path) -> None:
    config = ModelConfig(variant="diff", image_size=32, patch_size=8, embed_dim=96, depth=2, num_heads=3, num_classes=7)
    torch.manual_seed(0)
    model = VisionTransformer(config)
    expected = copy.deepcopy(model).to(GPU)
    images = torch.randn(5, 3, 32, 32, device=GPU)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        shard(model, 1, GPU)
        assert is_sharded(model)
        torch.testing.assert_close(model(images), expected(images), rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(whole_copy(model).parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs.cpu())
    finally:
        dist.destroy_process_group()
