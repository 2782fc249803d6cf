"""Plain ViT, V1 and V2 under one recipe: train the arms over the cluster, then ask them all about the same images.

<out>/runs/<arm>-seed<k>/   ordinary runs; an arm that is trained already is taken as it is
<out>/compare.json, report.html, figures/, tensorboard/
"""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import ray
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter

from diffvit.analysis.arms import FinishedRun
from diffvit.analysis.comparison import CompareOptions, compare
from diffvit.analysis.figures import draw
from diffvit.analysis.finished_runs import load_run
from diffvit.analysis.report import write_report
from diffvit.config import ModelConfig, RunConfig, differing_fields, from_json, to_json
from diffvit.data.boxes import BoxedSplit
from diffvit.data.loader import validation_batches
from diffvit.data.sources import Dataset, open_dataset
from diffvit.data.tasks import Report
from diffvit.models.fetched import on_disk
from diffvit.training.alone import train_alone
from diffvit.training.launch import resolve
from diffvit.training.loop import RunStopped

_ARM_NAMES = {"softmax": "plain ViT", "diff": "Diff-ViT V1", "diff_v2": "Diff-ViT V2"}


@dataclass(frozen=True)
class CompareConfig:
    """Which runs are compared, or what the arms are trained by."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    """The recipe of the arms; its variant only says how many heads are meant."""
    out: str = "comparison"
    """The folder of the comparison."""
    runs: tuple[str, ...] = ()
    """Finished runs to compare; empty: train the arms."""
    seeds: int = 3
    """Runs of each arm, with seeds 0, 1, …"""
    concurrent: int = 0
    """Arms that train side by side; 0 for as many as the cluster has CPUs (with --scale.gpu: and GPUs) for."""
    gpus_per_arm: float = 1.0
    """Share of a GPU that an arm takes, with --scale.gpu; small models train side by side on one."""
    decoders: int = 0
    """Processes, with a CPU each, that decode images for an arm; 0: its own."""
    compare: CompareOptions = field(default_factory=CompareOptions)

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        if self.concurrent < 0:
            raise ValueError(f"concurrent must not be negative, got {self.concurrent}")
        if self.decoders < 0:
            raise ValueError(f"decoders must not be negative, got {self.decoders}")
        if not 0 < self.gpus_per_arm <= 1:
            raise ValueError(
                f"gpus_per_arm must be above 0 and at most 1 (an arm is one process), got {self.gpus_per_arm}"
            )


def run_comparison(config: CompareConfig, report: Report) -> Path:
    """Compare, on the connected cluster; the path of the report.

    Raises:
        ValueError: runs or a recipe that cannot be compared.
        RunStopped: an arm could not be trained; the others are, and the same call goes on.
    """
    out = Path(config.out).expanduser().absolute()
    # before arms are trained for hours, where they are
    boxes = None if config.runs else _open_boxes(config.compare.boxes, config.run)
    arms: dict[str, list[FinishedRun]] = {}
    for source in config.runs or train_arms(config, out / "runs", report):
        with on_disk(source, "last") as folder:
            run = load_run(folder)
        arms.setdefault(_name(run, arms), []).append(run)
    first = next(iter(arms.values()))[0].config
    dataset = open_dataset(first.data)
    device = torch.device(config.run.scale.device_type)
    images = len(dataset.val)
    boxes = boxes or _open_boxes(config.compare.boxes, first)
    batches = validation_batches(first, dataset)
    result = compare(arms, batches, config.compare, device, lambda seen: report("comparing", seen, images), boxes)
    _write_tensorboard(result, out / "tensorboard")
    return write_report(result, out)


def _open_boxes(path: str, config: RunConfig) -> BoxedSplit | None:
    """The boxes in `path`, all of them looked at once; None where there is none."""
    if not path:
        return None
    boxes = BoxedSplit(path, open_dataset(config.data).val)
    deque(boxes.images(config), maxlen=0)
    return boxes


def _name(run: FinishedRun, arms: dict[str, list[FinishedRun]]) -> str:
    """The arm of the same config but for the seed, else a new one named after the variant."""
    for name, runs in arms.items():
        if set(differing_fields(runs[0].config, run.config)) <= {"seed"}:
            return name
    name = _ARM_NAMES[run.config.model.variant]
    return name if name not in arms else f"{name} ({run.config.name})"


def arm_configs(recipe: RunConfig) -> dict[str, RunConfig]:
    """The recipe for each variant: as many maps in V1 as the plain ViT has heads, and as many parameters in all.

    V2 has D^2 more in the queries of each block; its MLP gives up as many: `mlp_ratio`, which is that of the plain ViT
    whatever the recipe's variant, less 0.5, since an MLP has 2 D^2 `mlp_ratio`.
    """
    model = recipe.model
    heads = 2 * model.num_heads if model.variant == "diff" else model.num_heads
    if heads % 2:
        raise ValueError(f"V1 takes half the plain model's heads, so model.num_heads must be even, got {heads}")
    shapes: dict[str, ModelConfig] = {
        "plain": dataclasses.replace(model, variant="softmax", num_heads=heads),
        "v1": dataclasses.replace(model, variant="diff", num_heads=heads // 2),
        "v2": dataclasses.replace(model, variant="diff_v2", num_heads=heads, mlp_ratio=model.mlp_ratio - 0.5),
    }
    scale = dataclasses.replace(recipe.scale, workers=1)
    return {arm: dataclasses.replace(recipe, model=shape, scale=scale) for arm, shape in shapes.items()}


def train_arms(config: CompareConfig, storage: Path, report: Report) -> list[Path]:
    """Train every arm under every seed, each in a process of its own; their folders, the plain ViT's first."""
    dataset = open_dataset(config.run.data)
    configs = [
        resolve(dataclasses.replace(arm, name=f"{name}-seed{seed}", storage=str(storage), seed=seed), dataset)
        for name, arm in arm_configs(config.run).items()
        for seed in range(config.seeds)
    ]
    data = ray.put(dataset)
    needs = {"CPU": 1.0 + config.decoders} | ({"GPU": config.gpus_per_arm} if config.run.scale.gpu else {})
    train_arm = ray.remote(
        num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), max_retries=config.run.scale.max_failures
    )(_train_arm)
    limit = config.concurrent or _room(needs)
    # seed by seed, so that a comparison that is cut has whole seeds
    waiting = sorted(range(len(configs)), key=lambda place: configs[place].seed)
    running: dict[Any, RunConfig] = {}
    stopped: list[str] = []
    report("training", 0, len(configs))
    while waiting or running:
        while waiting and len(running) < limit:
            chosen = configs[waiting.pop(0)]
            running[train_arm.remote(to_json(chosen), data, config.decoders)] = chosen
        (done,), _ = ray.wait(list(running), num_returns=1)
        finished = running.pop(done)
        reason = ray.get(done)
        if reason:
            stopped.append(f"{finished.name}: {reason}")
        report("training", len(configs) - len(waiting) - len(running), len(configs))
    if stopped:
        raise RunStopped(f"{len(stopped)} of {len(configs)} runs stopped: {'; '.join(stopped)}")
    return [arm.folder for arm in configs]


def _room(needs: dict[str, float]) -> int:
    """How many arms the cluster holds at a time."""
    has = ray.cluster_resources()
    for kind, amount in needs.items():
        if has.get(kind, 0) < amount:
            remedy = "leave --scale.gpu out" if kind == "GPU" else "take fewer --decoders"
            raise ValueError(f"each arm needs {amount:g} {kind}; the cluster has {has.get(kind, 0):g}; {remedy}")
    return int(min(has[kind] / amount + 1e-6 for kind, amount in needs.items()))


def _train_arm(config: str, dataset: Dataset, decoders: int) -> str | None:
    """Train one run; why it stopped, or None. Returned and not raised, because Ray would try again."""
    torch.set_num_threads(1)  # many runs share a machine, one to a CPU
    try:
        train_alone(from_json(config, "arm"), dataset, decoders=decoders)
    except RunStopped as stop:
        return str(stop)
    return None


def _write_tensorboard(result: dict[str, Any], folder: Path) -> None:
    with SummaryWriter(str(folder)) as writer:
        for row in draw(result):
            writer.add_figure(f"comparison/{row.name}", [panel.figure for panel in row.panels], 0)
