"""CKA of all 12 x 12 layers of two ViT-S at 64 px beside torch_cka, forward passes included, and its values.

Every method runs in a process of its own on the same weights and images, so that its peak of memory is its own. The
ratio is of CPU time, which other processes on the machine disturb less than wall time (use one thread). The reference
is one batch of all images: Gram matrices and sums in float64, by the trace formula.

    pip install torch_cka
    python benchmarks/cka.py --images 2048
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from diffvit.analysis.cka import CKA
from diffvit.config import model_preset
from diffvit.models.vit import VisionTransformer

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
    """Times diffvit and torch_cka take turns."""
    peer: bool = True
    """Measure torch_cka."""
    reference: bool = True
    """Compare the values with a float64 batch of all images."""


@dataclass(frozen=True)
class Measured:
    """Layers by layers; seconds of the process and of the clock; MiB above what was there before."""

    matrix: Tensor
    cpu_seconds: float
    wall_seconds: float
    peak_mib: float


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console(width=100)
    peer = f"torch_cka {metadata.version('torch_cka')}, " if options.peer else ""
    console.print(
        f"{platform.processor() or platform.machine()}, {options.threads} thread(s), torch {torch.__version__}, {peer}"
        f"ViT-S, {IMAGE_SIZE} px in patches of {PATCH_SIZE}, {options.images} images in batches of {options.batch_size}"
    )
    half = options.images // 2
    ours = [in_own_process(streamed, options, half)]
    forward, theirs = [], []
    for _ in range(options.rounds):
        forward.append(in_own_process(forward_only, options, options.images))
        ours.append(in_own_process(streamed, options, options.images))
        if options.peer:
            theirs.append(in_own_process(by_torch_cka, options, options.images))
    table = Table()
    for column in ("method", "images", "CPU s", "wall s", "peak memory added, MiB"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, images, measured in (
        ("forward passes alone", options.images, forward),
        ("diffvit", half, ours[:1]),
        ("diffvit", options.images, ours[1:]),
        ("torch_cka", options.images, theirs),
    ):
        for m in measured:
            table.add_row(name, str(images), f"{m.cpu_seconds:.1f}", f"{m.wall_seconds:.1f}", f"{m.peak_mib:.0f}")
    console.print(table)
    for alone, mine, other in zip(forward, ours[1:], theirs, strict=False):
        added, others_added = (m.cpu_seconds - alone.cpu_seconds for m in (mine, other))
        console.print(
            f"torch_cka takes {other.cpu_seconds / mine.cpu_seconds:.2f} times as long as diffvit; beyond the forward "
            f"passes {others_added:.1f} s against {added:.1f} s; "
            f"largest difference of values {(mine.matrix - other.matrix).abs().max():.1e}"
        )
    if options.reference:
        expected = in_own_process(full_batch, options, options.images).matrix
        console.print(
            f"diffvit to the float64 full batch: at most {(ours[-1].matrix - expected).abs().max():.2e} apart"
        )


Method = Callable[[list[VisionTransformer], Tensor, Options], Tensor]


def in_own_process(method: Method, options: Options, images: int) -> Measured:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        measured = pool.apply(measure, (method, options, images))
        pool.close()
        pool.join()
    return measured


def measure(method: Method, options: Options, images: int) -> Measured:
    torch.set_num_threads(options.threads)
    models = [build(seed) for seed in (0, 1)]
    pixels = smooth_images(images)
    with torch.no_grad():
        models[0](pixels[:2])  # what the first call sets up
    before, cpu, wall = peak_mib(), time.process_time(), time.perf_counter()
    matrix = method(models, pixels, options)
    return Measured(matrix, time.process_time() - cpu, time.perf_counter() - wall, peak_mib() - before)


def build(seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    fields = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "num_classes": 10}
    return VisionTransformer(model_preset("small", "softmax", **fields)).eval()


def smooth_images(count: int) -> Tensor:
    """(count, 3, 64, 64): coarse noise, so that patches of an image are related as in a picture."""
    coarse = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return F.interpolate(coarse, IMAGE_SIZE, mode="bilinear")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def streamed(models: list[VisionTransformer], pixels: Tensor, options: Options) -> Tensor:
    """Every block's tokens, as `diffvit.analysis.cka` takes them."""
    cka = CKA()
    for features in block_features(models, pixels, options):
        cka.update(*features)
    return cka.compute()


def forward_only(models: list[VisionTransformer], pixels: Tensor, options: Options) -> Tensor:
    """What any method has to do."""
    for _ in block_features(models, pixels, options):
        pass
    return torch.zeros(0)


@torch.no_grad()
def block_features(
    models: list[VisionTransformer], pixels: Tensor, options: Options
) -> Iterator[list[dict[str, Tensor]]]:
    names = block_names(models[0])
    for batch in pixels.split(options.batch_size):
        yield [model.forward_features(batch, names) for model in models]


def block_names(model: VisionTransformer) -> list[str]:
    return [f"blocks.{i}" for i in range(model.config.depth)]


def by_torch_cka(models: list[VisionTransformer], pixels: Tensor, options: Options) -> Tensor:
    os.environ["MPLBACKEND"] = "Agg"
    try:
        import torch_cka
    except ImportError:
        raise SystemExit("this benchmark measures torch_cka beside diffvit: pip install torch_cka") from None
    names = block_names(models[0])
    comparison = torch_cka.CKA(*models, "first", "second", names, names)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(pixels), options.batch_size)
    comparison.compare(loader, loader)
    matrix: Tensor = comparison.hsic_matrix.detach().double()
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
