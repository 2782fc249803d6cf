"""Accuracy against seconds of training: of `pretrain.py` or of a plain loop, and several curves as a picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib as mpl
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch.multiprocessing.spawn import start_processes

JOB = Path(__file__).parents[1] / "ray_jobs/pretrain.py"

Curve = list[tuple[float, float]]
"""(seconds, top-1 in per cent) of every epoch, start-up left out. Those of a plain loop begin with the first step;
those of `pretrain.py`, its `train_seconds`, begin when the loop does, so that the wait for the first images is in, and
end after the epoch's evaluation. The plain loops of overhead.py end after it too, time_to_accuracy.py's before it."""


def run_job(*options: str) -> tuple[Curve, dict[str, Any]]:
    """Train by `pretrain.py`, as anyone would, into a folder that is then deleted; the curve, and `results.json`."""
    with TemporaryDirectory() as storage:
        command = [sys.executable, str(JOB), *options, "--storage", storage, "--name", "run"]
        # Ray would run its workers at niceness 15, so that whatever else the machine does took from them alone
        as_others = {**os.environ, "RAY_worker_niceness": "0"}
        command += ["--checkpoint.keep-every-epochs", "1"]
        subprocess.run(command, env=as_others, check=True, stdout=subprocess.DEVNULL)
        manifests = sorted(Path(storage).glob("run/checkpoint_step_*/checkpoint.json"))
        metrics = [json.loads(manifest.read_text())["metrics"] for manifest in manifests]
        results = json.loads((Path(storage) / "run/results.json").read_text())
    return [(epoch["train_seconds"], epoch["top1"]) for epoch in metrics if "top1" in epoch], results


def run_ranks(work: Callable[..., Any], *arguments: Any, ranks: int, threads: int = 1) -> Any:
    """What `work(rank, *arguments)` returns on rank 0 of `ranks` new processes that can average over gloo; JSON."""
    with TemporaryDirectory() as folder:
        start_processes(_rank, (work, arguments, ranks, threads, folder), nprocs=ranks)
        return json.loads((Path(folder) / "result.json").read_text())


def _rank(rank: int, work: Callable[..., Any], arguments: Sequence[Any], ranks: int, threads: int, folder: str) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=ranks)
    result = work(rank, *arguments)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def draw(
    curves: Mapping[str, Sequence[Curve]], lowest: float, target: float | None = None, scale: str = "log"
) -> Figure:
    """Top-1 by seconds of training, a line for each curve and a colour for each name; from `lowest` per cent on."""
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        for name, colour in zip(curves, ("tab:red", "tab:gray", "tab:blue"), strict=False):
            for number, curve in enumerate(curves[name]):
                axes.plot(*zip(*curve, strict=True), color=colour, marker=".", label=None if number else name)
        if target is not None:
            axes.axhline(target, color="black", linewidth=0.8, linestyle="--")
        axes.set(xscale=scale, ylim=(lowest, None), xlabel="seconds of training", ylabel="test top-1, %")
        axes.legend(frameon=False)
    return figure
