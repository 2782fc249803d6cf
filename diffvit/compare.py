"""Plain ViT, V1 and V2 under one recipe: train the arms over the cluster, then ask them all about the same images.

<out>/runs/<arm>-seed<k>/   ordinary runs, or in --storage; an arm that is trained already is taken as it is
<out>/compare.json, report.html, figures/, tensorboard/
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch.utils.tensorboard import SummaryWriter

from diffvit.analysis.arms import FinishedRun, differing
from diffvit.analysis.comparison import CompareOptions, compare
from diffvit.analysis.figures import draw
from diffvit.analysis.finished_runs import load_run
from diffvit.analysis.panels import FigureRow
from diffvit.analysis.report import RESULT_NAME, write_report, write_result
from diffvit.arms import ArmRoom, train_arms
from diffvit.config import VARIANT_NAMES, RunConfig, ScaleConfig
from diffvit.data.boxes import BoxedSplit
from diffvit.data.datasets import open_dataset
from diffvit.data.fingerprint import fingerprint_of, require_same
from diffvit.data.loader import validation_batches
from diffvit.data.tasks import Report
from diffvit.models.fetched import on_disk
from diffvit.storage import Storage
from diffvit.training.precision import set_float32_products

_WRITE_TEST = ".write-test"


@dataclass(frozen=True)
class CompareConfig:
    """Which runs are compared, or what the arms are trained by."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    """The recipe of the arms; its variant only says how many heads are meant."""
    out: str = "comparison"
    """The folder of the comparison, on this machine. Arms are trained in its `runs`, or in --storage where that is
    given, which every node must see."""
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

    @property
    def room(self) -> ArmRoom:
        return ArmRoom(self.concurrent, self.decoders, self.gpus_per_arm)

    @property
    def folder(self) -> Path:
        return Path(self.out).expanduser().absolute()

    @property
    def recipe(self) -> RunConfig:
        """What the arms are trained by, where they are kept."""
        return self.run if self.run.storage else dataclasses.replace(self.run, storage=str(self.folder / "runs"))


def run_comparison(config: CompareConfig, report: Report) -> Path:
    """Compare, on the connected cluster; the path of the report.

    Raises:
        ValueError: runs or a recipe that cannot be compared.
        RunStopped: an arm could not be trained; the others are, and the same call goes on.
    """
    # before arms are trained for hours, where they are
    _earlier_result(config.folder)
    boxes = None if config.runs else _open_boxes(config.compare.boxes, config.run)
    arms: dict[str, list[FinishedRun]] = {}
    for source in config.runs or train_arms(config.recipe, config.seeds, config.room, report):
        with on_disk(source, "last") as folder:
            run = dataclasses.replace(load_run(folder), source=_source(source, config.folder))
        arms.setdefault(_name(run, arms), []).append(run)
    first_run = next(iter(arms.values()))[0]
    first = first_run.config
    dataset = open_dataset(first.data)
    require_same(first_run.images, fingerprint_of(dataset), f"run {first.name!r}", first.data.path, ("validation",))
    _require_place(config.folder, arms)
    # the head of a cluster, where this runs, may have no GPU
    device = torch.device(config.run.scale.device_type if torch.cuda.is_available() else "cpu")
    set_float32_products(ScaleConfig(precision="fp32"), device)
    images = len(dataset.val)
    boxes = boxes or _open_boxes(config.compare.boxes, first)
    batches = validation_batches(first, dataset, config.compare.seed)
    result = compare(arms, batches, config.compare, device, lambda seen: report("comparing", seen, images), boxes)
    write_result(result, config.folder)
    drawn = draw(result)
    page = write_report(result, drawn, config.folder)
    _write_tensorboard(drawn, config.folder / "tensorboard")
    return page


def _require_place(folder: Path, arms: dict[str, list[FinishedRun]]) -> None:
    """Before all is measured: the report can be written, and no other comparison's is lost by it."""
    mine = {(arm, run.seed): run.source for arm, runs in arms.items() for run in runs}
    for arm, found in _earlier_result(folder).items():
        for seed, source in zip(found["seeds"], found.get("sources") or [None] * len(found["seeds"]), strict=True):
            if (arm, seed) not in mine or source not in (None, mine[arm, seed]):  # earlier versions did not say
                raise ValueError(
                    f"{folder} has a report of other runs, among them seed {seed} of {arm!r}"
                    f"{f' in {source}' if source else ''}; choose another --out, or delete it"
                )
    place = Storage(str(folder))
    place.write(_WRITE_TEST, b"")
    place.delete(_WRITE_TEST)


def _earlier_result(folder: Path) -> dict[str, Any]:
    """The arms of the comparison that `folder` holds."""
    content = Storage(str(folder)).read_or_none(RESULT_NAME)
    try:
        return dict(json.loads(content)["arms"]) if content else {}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / RESULT_NAME} is damaged; delete it, or choose another --out") from None


def _source(run: str, folder: Path) -> str:
    """Where a run lies: below the comparison's own folder as seen from there, which may be moved."""
    if "://" in run:
        return run.partition("?")[0]
    path = Path(run).expanduser().absolute()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


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
        if set(differing(runs[0], run)) <= {"seed"}:
            return name
    plain = VARIANT_NAMES[run.config.model.variant]
    named = f"{plain} ({run.config.name})"
    numbered = (f"{plain} ({run.config.name}, {number})" for number in itertools.count(2))
    return next(name for name in itertools.chain((plain, named), numbered) if name not in arms)


def _write_tensorboard(drawn: Sequence[FigureRow], folder: Path) -> None:
    with SummaryWriter(str(folder)) as writer:
        for row in drawn:
            writer.add_figure(f"comparison/{row.name}", [panel.figure for panel in row.panels], 0)
