"""How a sweep is run: how many trials, judged on what, stopped when, on which share of the cluster."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from diffvit.config import RunConfig, differing_fields
from diffvit.config.checks import STRICT, require, require_finite
from diffvit.search.space import Space

Objective = Literal["top1", "latency"]

DIRECTIONS: dict[Objective, Literal["max", "min"]] = {"top1": "max", "latency": "min"}


@dataclass(frozen=True)
class SearchConfig:
    """The search itself, whatever it varies."""

    __pydantic_config__ = STRICT

    trials: int = 24
    """Configurations to try; a larger number continues a finished sweep."""
    concurrent: int = 1
    """Trials at a time."""
    finalists: int = 3
    """Best configurations that are trained again, whole, with `seeds` new seeds each."""
    seeds: int = 3
    """Seeds of a finalist; the mean over them names the winner."""
    objective: tuple[Objective, ...] = ("top1",)
    """top1 for the most accurate, or 'top1 latency' for the Pareto front of accuracy and time of one image."""
    sampler: Literal["tpe", "random"] = "tpe"
    """Optuna's tree-structured Parzen estimator, or random points to compare it with."""
    scheduler: Literal["asha", "none", "pbt"] = "asha"
    """asha: a trial that is behind when its turn to be judged comes is stopped (arXiv 1810.05934); none: every trial
    runs to its end. With two objectives every trial does: ASHA judges by accuracy alone, and a trial that it stopped
    cannot be compared with one that was trained longer."""
    grace_epochs: int = 1
    """Epochs that every trial is given before ASHA may stop it."""
    reduction: float = 3.0
    """ASHA goes on with the best 1/reduction at each of its rungs: grace_epochs x 1, reduction, reduction^2 …"""
    holdout: float = 0.1
    """Share of each class of the *training* images that trials are judged on and never train on."""
    seed: int = 0
    """Seed of the sampler and of the held-out images; the recipe's seed is that of every trial's training."""
    workers_per_trial: int = 1
    """1: a trial trains in its own process; more: in a worker group of Ray Train (`scale.cpus_per_worker` each)."""
    cpus_per_trial: float = 1.0
    """CPUs of a one-worker trial, which decodes and trains in one process; with --scale.gpu all but one decode."""
    gpus_per_trial: float = 1.0
    """With scale.gpu, share of a GPU that a one-worker trial takes: 0.25 for four trials on one. Their memory is not
    divided: all of them must fit."""

    def __post_init__(self) -> None:
        for name in ("trials", "concurrent", "finalists", "seeds", "grace_epochs", "workers_per_trial"):
            require(getattr(self, name) >= 1, f"search.{name} must be at least 1, got {getattr(self, name)}")
        require(
            self.objective in (("top1",), ("top1", "latency")),
            f"search.objective must be 'top1' or 'top1 latency', got {' '.join(self.objective)!r}",
        )
        require(
            self.scheduler != "pbt",
            "search.scheduler 'pbt' is not offered: population based training copies checkpoints between trials, Ray "
            "Tune gets none from a trial that trains through Ray Train V2, and it would skip every copy without a "
            "word; use 'asha'",
        )
        require(self.reduction > 1, f"search.reduction must be more than 1, got {self.reduction}")
        require(0.0 < self.holdout < 1.0, f"search.holdout must be between 0 and 1, got {self.holdout}")
        require_finite(self, "search.")
        require(self.seed >= 0, f"search.seed must not be negative, got {self.seed}")
        require(self.cpus_per_trial > 0, f"search.cpus_per_trial must be positive, got {self.cpus_per_trial}")
        require(
            0.0 < self.gpus_per_trial <= 1.0,
            f"search.gpus_per_trial must be in (0, 1], got {self.gpus_per_trial}; for more GPUs raise "
            "search.workers_per_trial",
        )

    @property
    def stops_early(self) -> bool:
        """Whether ASHA is at work."""
        return self.scheduler == "asha" and len(self.objective) == 1


_SITTING_FIELDS = frozenset(
    {"trials", "concurrent", "finalists", "seeds", "workers_per_trial", "cpus_per_trial", "gpus_per_trial"}
)
"""What may differ when a sweep is continued: how far it goes and what it runs on."""


@dataclass(frozen=True)
class SweepConfig:
    """A recipe, what is varied of it, and how: everything that a sweep is. `run` gives the sweep's name and storage."""

    __pydantic_config__ = STRICT

    run: RunConfig = field(default_factory=RunConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    space: Space = field(default_factory=Space)

    def __post_init__(self) -> None:
        self.space.check(self.run)
        require(
            not self.run.is_remote,
            "a sweep needs a storage folder that every node sees, because Optuna keeps its database in it; got "
            f"{self.run.storage.partition('?')[0]}",
        )
        epochs = self.run.optim.epochs
        require(
            not self.search.stops_early or self.search.grace_epochs <= epochs,
            f"search.grace_epochs must not exceed optim.epochs = {epochs}, got {self.search.grace_epochs}",
        )
        workers, batch = self.search.workers_per_trial, self.run.optim.batch_size
        share = self.search.gpus_per_trial
        require(
            share == 1.0 or self.run.scale.gpu,
            f"search.gpus_per_trial = {share:g} is a share of a GPU and needs scale.gpu; leave it out to train on CPUs",
        )
        require(
            share == 1.0 or workers == 1,
            f"search.gpus_per_trial = {share:g} is for trials of one worker; each of search.workers_per_trial = "
            f"{workers} workers takes a whole GPU",
        )
        require(
            batch % workers == 0,
            f"search.workers_per_trial must divide optim.batch_size = {batch}, got {workers}",
        )
        shapes = [shape.model for shape in self.space.shapes(self.trial_recipe)]
        require(
            not self.run.init.weights or shapes == [self.run.model],
            "init.weights fixes the shape of the model, so that a sweep cannot vary variant, num_heads or patch_size; "
            "pass --space.num-heads None, and leave --space.variant and --space.patch-size out",
        )
        require(
            self.run.init.train == "all" or "lambda_init" not in self.space.varied(self.run),
            "init.train = 'head' keeps features that were trained with one lambda_init, so a sweep cannot vary it; "
            "pass --space.lambda-init None --space.no-depth-schedule",
        )

    @property
    def trial_recipe(self) -> RunConfig:
        """The recipe on the workers of a trial."""
        return dataclasses.replace(
            self.run, scale=dataclasses.replace(self.run.scale, workers=self.search.workers_per_trial)
        )


def as_asked(sweep: SweepConfig) -> SweepConfig:
    """A sweep that a command line asks for; where no number of trials was asked for, no more than there are points.

    Not for one that was written before, of which what it does not heed is no matter.

    Raises:
        ValueError: it asks for what it would not heed.
    """
    search, space, run = sweep.search, sweep.space, sweep.run
    for name in ("grace_epochs", "reduction"):
        value = getattr(search, name)
        require(
            search.stops_early or value == getattr(SearchConfig, name),
            f"search.{name} is for ASHA, which does not judge this sweep, got {value}; leave it out",
        )
    space.require_heeded(run)
    points = space.points(run)
    if points is None:
        return sweep
    require(len(points) > 1, "the space has a single point, so there is nothing to search; widen one of its fields")
    if search.trials == SearchConfig.trials:
        search = dataclasses.replace(search, trials=min(search.trials, len(points)))
    require(
        search.trials <= len(points),
        f"search.trials must be at most {len(points)}, the points that this space has, each of which is trained once, "
        f"got {search.trials}; search.seeds says how often finalists are trained",
    )
    return dataclasses.replace(sweep, search=search)


_ADAPTER = TypeAdapter(SweepConfig)


def sweep_to_json(sweep: SweepConfig) -> str:
    return _ADAPTER.dump_json(sweep, indent=2).decode() + "\n"


def sweep_from_json(text: str | bytes, source: str) -> SweepConfig:
    """The sweep in `text`; `source` names it in errors.

    Raises:
        ValueError: not a sweep of this version.
    """
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'sweep'}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{source} is not a sweep of this version: {problems}") from None


def differing_sweep_fields(old: SweepConfig, new: SweepConfig) -> dict[str, tuple[Any, Any]]:
    """`{field: (old, new)}` for every field that decides what the trials of a sweep are and how they compare."""
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    return differing_fields(old.run, new.run) | {
        f"{section}.{name}": (value, after[section][name])
        for section in ("search", "space")
        for name, value in before[section].items()
        if name not in _SITTING_FIELDS and value != after[section][name]
    }
