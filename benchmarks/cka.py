"""CKA of all 12 x 12 layers of two ViT-S at 64 px beside its peers, forward passes included, and everybody's values.

Every method runs in a process of its own on the same weights and images, so that its peak of memory is its own. Ratios
are of CPU time, which other processes on the machine disturb less than wall time (use one thread); on a GPU of wall
time. The reference is one batch of all images: float32 forward passes, Gram matrices and sums in float64, by the trace
formula. torch_cka runs the models with gradients on; under no_grad it is what a careful user makes of it.

    pip install --no-deps --target PEERS torch_cka torchmetrics lightning-utilities
    git clone https://github.com/numpee/CKA.pytorch CKA
    PYTHONPATH=PEERS python benchmarks/cka.py --images 2048 --cka-pytorch CKA
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from diffvit.analysis.cka import CKA
from diffvit.config import model_preset
from diffvit.models.vit import Block, VisionTransformer
from diffvit.training.precision import has_bf16

IMAGE_SIZE = 64
PATCH_SIZE = 16


@dataclass(frozen=True)
class Options:
    """What to measure."""

    images: int = 512
    """Images that both models see."""
    batch_size: int = 256
    """Images at once."""
    threads: int = 1
    """CPU threads."""
    rounds: int = 1
    """Times the methods take turns."""
    device: str = "cpu"
    """cpu or cuda."""
    peer: bool = True
    """Measure torch_cka."""
    cka_pytorch: str = ""
    """A checkout of CKA.pytorch, to measure it too."""
    reference: bool = True
    """Compare the values with a float64 batch of all images."""


@dataclass(frozen=True)
class Measured:
    """Layers by layers; seconds of the process and of the clock; MiB above what was there before."""

    matrix: Tensor
    cpu_seconds: float
    wall_seconds: float
    peak_mib: float


Method = Callable[[list[VisionTransformer], Tensor, Options], Tensor]


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console(width=110)
    native = "" if has_bf16(torch.device(options.device)) else " (emulated)"
    peer = f", torch_cka {metadata.version('torch_cka')}" if options.peer else ""
    where = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"{platform.machine()}, {options.threads} thread(s)"
    )
    console.print(
        f"{where}, torch {torch.__version__}{peer}; ViT-S, {IMAGE_SIZE} px in patches of {PATCH_SIZE}, "
        f"{options.images} images in batches of {options.batch_size}"
    )
    ours = {"diffvit, fp32": partial(streamed, bf16=False), f"diffvit, bf16{native}": partial(streamed, bf16=True)}
    peers: dict[str, Method] = {}
    if options.peer:
        peers = {"torch_cka, as published": by_torch_cka, "torch_cka, under no_grad": by_torch_cka_without_gradients}
    if options.cka_pytorch:
        peers["CKA.pytorch"] = by_cka_pytorch
    methods: dict[str, Method] = {"forward passes alone, fp32": forward_only, **ours, **peers}
    half = in_own_process(ours["diffvit, fp32"], options, options.images // 2)
    found: dict[str, list[Measured]] = {name: [] for name in methods}
    for _ in range(options.rounds):
        for name, method in methods.items():
            found[name].append(in_own_process(method, options, options.images))
    expected = in_own_process(full_batch, options, options.images).matrix if options.reference else None
    console.print(show_methods({**found, "diffvit, fp32, half the images": [half]}, expected))
    if peers:
        console.print(show_ratios(found, list(ours), list(peers), on_gpu=options.device == "cuda"))


def show_methods(found: dict[str, list[Measured]], expected: Tensor | None) -> Table:
    table = Table()
    for column in ("method", "CPU s", "wall s", "peak memory added, MiB", "largest difference to float64"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, runs in found.items():
        for run in runs:
            compares = expected is not None and run.matrix.shape == expected.shape and "half" not in name
            apart = f"{(run.matrix - expected).abs().max():.1e}" if compares and expected is not None else ""
            table.add_row(name, f"{run.cpu_seconds:.1f}", f"{run.wall_seconds:.1f}", f"{run.peak_mib:.0f}", apart)
    return table


def show_ratios(found: dict[str, list[Measured]], ours: list[str], peers: list[str], *, on_gpu: bool) -> Table:
    """Medians over rounds of the peer's time over ours."""
    table = Table(title="times as long as")
    for column in ("", *ours):
        table.add_column(column)
    for peer in peers:
        row = []
        for name in ours:
            pairs = zip(found[peer], found[name], strict=True)
            ratios = [
                theirs.wall_seconds / mine.wall_seconds if on_gpu else theirs.cpu_seconds / mine.cpu_seconds
                for theirs, mine in pairs
            ]
            row.append(f"{statistics.median(ratios):.2f}")
        table.add_row(peer, *row)
    return table


def in_own_process(method: Method, options: Options, images: int) -> Measured:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        measured = pool.apply(measure, (method, options, images))
        pool.close()
        pool.join()
    return measured


def measure(method: Method, options: Options, images: int) -> Measured:
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    models = [build(seed).to(device) for seed in (0, 1)]
    pixels = smooth_images(images)
    with torch.no_grad():  # what the first calls set up
        models[0](pixels[:2].to(device))
        with torch.autocast(device.type, torch.bfloat16):
            models[0](pixels[:2].to(device))
    before, cpu, wall = peak_mib(device), time.process_time(), time.perf_counter()
    matrix = method(models, pixels, options).cpu()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return Measured(matrix, time.process_time() - cpu, time.perf_counter() - wall, peak_mib(device) - before)


def build(seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    fields = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "num_classes": 10}
    return VisionTransformer(model_preset("small", "softmax", **fields)).eval()


def smooth_images(count: int) -> Tensor:
    """(count, 3, 64, 64): coarse noise, so that patches of an image are related as in a picture."""
    coarse = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return F.interpolate(coarse, IMAGE_SIZE, mode="bilinear")


def peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def streamed(models: list[VisionTransformer], pixels: Tensor, options: Options, bf16: bool) -> Tensor:
    """Every block's tokens, as `diffvit.analysis.cka` takes them."""
    cka = CKA()
    for features in block_features(models, pixels, options, bf16):
        cka.update(*features)
    return cka.compute()


def forward_only(models: list[VisionTransformer], pixels: Tensor, options: Options) -> Tensor:
    """What any method has to do."""
    for _ in block_features(models, pixels, options):
        pass
    return torch.zeros(0)


@torch.no_grad()
def block_features(
    models: list[VisionTransformer], pixels: Tensor, options: Options, bf16: bool = False
) -> Iterator[list[dict[str, Tensor]]]:
    names, device = block_names(models[0]), torch.device(options.device)
    for batch in pixels.split(options.batch_size):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            yield [model.forward_features(batch.to(device), names) for model in models]


def block_names(model: VisionTransformer) -> list[str]:
    return [f"blocks.{i}" for i in range(model.config.depth)]


def by_torch_cka(models: list[VisionTransformer], pixels: Tensor, options: Options) -> Tensor:
    os.environ["MPLBACKEND"] = "Agg"
    try:
        import torch_cka
    except ImportError:
        raise SystemExit("torch_cka is measured beside diffvit: install it as said above, or --no-peer") from None
    names = block_names(models[0])
    comparison = torch_cka.CKA(*models, "first", "second", names, names, device=options.device)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(pixels), options.batch_size)
    comparison.compare(loader, loader)
    matrix: Tensor = comparison.hsic_matrix.detach().double()
    return matrix


@torch.no_grad()
def by_torch_cka_without_gradients(models: list[VisionTransformer], pixels: Tensor, options: Options) -> Tensor:
    return by_torch_cka(models, pixels, options)


def by_cka_pytorch(models: list[VisionTransformer], pixels: Tensor, options: Options) -> Tensor:
    """One pass over the images. It knows GPUs only: on a CPU its calls of `cuda` are made to do nothing."""
    sys.path.insert(0, str(Path(options.cka_pytorch).absolute()))
    calculator_of = importlib.import_module("cka").CKACalculator

    if options.device == "cpu":
        torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(pixels), options.batch_size)
    calculator = calculator_of(*models, loader, hook_fn="flatten", hook_layer_types=(Block,), num_epochs=1)
    matrix: Tensor = calculator.calculate_cka_matrix().double().T  # its rows are the second model's layers
    return matrix


def full_batch(models: list[VisionTransformer], pixels: Tensor, options: Options) -> Tensor:
    """Song et al. (2012), theorem 5, on all images at once."""
    n = len(pixels)
    grams = []
    for model in models:
        parts = [model_features[0] for model_features in block_features([model], pixels, options)]
        for name in block_names(model):
            x = torch.cat([part.pop(name) for part in parts]).flatten(1).double()
            grams.append((x @ x.T).fill_diagonal_(0))
    rows = torch.stack([gram.sum(1) for gram in grams])
    totals = rows.sum(1)
    products = torch.stack([torch.stack([(a * b).sum() for b in grams]) for a in grams])
    hsic = products + totals[:, None] * totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T
    depth = len(grams) // 2
    own = hsic.diagonal()
    return hsic[:depth, depth:] / (own[:depth, None] * own[None, depth:]).sqrt()


if __name__ == "__main__":
    main()
