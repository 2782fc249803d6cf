"""One training run: all sections together, and their JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from diffvit.config.checks import STRICT, require, require_finite
from diffvit.config.data import AugmentConfig, DataConfig
from diffvit.config.init import InitConfig
from diffvit.config.model import ModelConfig
from diffvit.config.training import CheckpointConfig, OptimConfig, ScaleConfig


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    __pydantic_config__ = STRICT

    name: str = "run"
    """The run's folder under `storage`; the same name again continues the run."""
    storage: str = "runs"
    """Where runs are kept: a folder that every node sees, s3://bucket/folder or gs://bucket/folder."""
    resume: bool = True
    """Continue a run of that name; with --no-resume a name that exists is refused."""
    seed: int = 0
    """Initialisation, order of samples, augmentation and drop path all derive from it."""
    init: InitConfig = field(default_factory=InitConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        require(
            bool(self.name) and Path(self.name).name == self.name and self.name not in (".", ".."),
            f"name must be a plain folder name, got {self.name!r}",
        )
        try:
            _ = self.location  # a URL may have a scheme that is not known, or credentials
        except ValueError as error:
            raise ValueError(f"storage cannot be used: {error}") from None
        require(
            self.optim.optimizer == "adamw" or self.scale.sharding == "none",
            "optim.optimizer = 'muon' works on whole matrices, so scale.sharding must be 'none', "
            f"got {self.scale.sharding!r}",
        )
        require(0 <= self.seed < 2**63, f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        require_finite(self)
        require(
            len(self.data.mean) in (0, 1, self.model.in_channels),
            f"data.mean must have 1 or model.in_channels = {self.model.in_channels} values, got {self.data.mean}",
        )
        require(
            isinstance(self.augment.policy_fill, int) or self.model.in_channels == 3,
            f"augment.policy_fill is a colour, {self.augment.policy_fill}, so model.in_channels must be 3, got "
            f"{self.model.in_channels}: give one grey level",
        )
        require(
            not self.init.gate_opening_steps or self.model.variant == "diff_v2",
            f"init.gate_opening_steps is for model.variant = 'diff_v2', got {self.model.variant!r}",
        )
        if isinstance(self.scale.workers, int):
            self._require_workers(self.scale.workers)
        else:
            require(
                bool(self.worker_counts),
                f"scale.workers = {self.scale.workers} must hold a number that divides optim.batch_size = "
                f"{self.optim.batch_size} into shares that the model can take (even ones where images are mixed), in "
                f"micro-batches of scale.micro_batch_size = {self.scale.micro_batch_size} or half of that at least",
            )

    def _require_workers(self, workers: int) -> None:
        share, rest = divmod(self.optim.batch_size, workers)
        require(
            rest == 0,
            f"scale.workers must divide optim.batch_size, got {workers} and {self.optim.batch_size}; "
            f"the nearest batch sizes are {workers * share} and {workers * (share + 1)}",
        )
        micro = self.scale.micro_batch_size
        require(
            not self._mixes or (share % 2 == 0 and (micro or 2) >= 2),
            "augment.mixup and augment.cutmix mix pairs of images, so a worker's share of the batch must be even "
            f"({self.optim.batch_size} / {workers} = {share}) and scale.micro_batch_size at least 2, got {micro}",
        )
        if micro is not None and not self._fitting_steps(workers):
            unit = micro - micro % 2 if self._mixes else micro
            below, above = (max(count, 1) * unit * workers for count in (share // unit, -(-share // unit)))
            raise ValueError(
                f"scale.micro_batch_size must divide a worker's share of the batch, {share} images, or be at most "
                f"twice {'an even' if self._mixes else 'a'} number that does, got {micro}; the nearest batch sizes for "
                f"{unit} are {below} and {above}"
            )

    @property
    def _mixes(self) -> bool:
        return bool(self.augment.mixup or self.augment.cutmix)

    @property
    def is_remote(self) -> bool:
        """Whether the run lies in an object store."""
        return "://" in self.storage

    @property
    def location(self) -> str:
        """`<storage>/<name>`, a URL or an absolute path: workers have other working directories."""
        if not self.is_remote:
            return str(self.folder)
        from diffvit.storage import Storage  # imports pyarrow, which local runs need not wait for yet

        return Storage(self.storage).child(self.name).uri

    @property
    def folder(self) -> Path:
        """The same of a run that is not in an object store."""
        require(not self.is_remote, f"this needs a folder, storage is {self.storage.partition('?')[0]}")
        return Path(self.storage).expanduser().absolute() / self.name

    @property
    def worker_counts(self) -> tuple[int, ...]:
        """The numbers of workers that the run can have, ascending."""
        return tuple(
            count
            for count in range(self.scale.min_workers, self.scale.max_workers + 1)
            if self.optim.batch_size % count == 0 and self._fitting_steps(count)
        )

    def accumulation_steps_of(self, workers: int) -> int:
        """Micro-batches each of so many workers takes in a step: as few as `scale.micro_batch_size` allows."""
        return self._fitting_steps(workers)[0]

    def _fitting_steps(self, workers: int) -> list[int]:
        share, multiple = self.optim.batch_size // workers, 2 if self._mixes else 1
        micro = self.scale.micro_batch_size
        largest, least = micro or self._smallest_share, min(micro or 0, share) / 2
        return [n for n in range(1, share + 1) if share % (n * multiple) == 0 and least <= share // n <= largest]

    @property
    def _smallest_share(self) -> int:
        """Of the batch, with the most workers: with fewer a worker's memory is not to grow."""
        batch, multiple = self.optim.batch_size, 2 if self._mixes else 1
        counts = range(self.scale.min_workers, self.scale.max_workers + 1)
        return min((batch // count for count in counts if batch % (count * multiple) == 0), default=batch)


_ADAPTER = TypeAdapter(RunConfig)


def to_json(config: RunConfig) -> str:
    return _ADAPTER.dump_json(config, indent=2).decode() + "\n"


def from_json(text: str | bytes, source: str) -> RunConfig:
    """The config in `text`; `source` names it in errors.

    Raises:
        ValueError: unknown or missing fields, wrong types, or values that a check refuses.
    """
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{source} is not a run config of this version: {problems}") from None


_SITTING_FIELDS = ("name", "storage", "resume", "scale", "checkpoint")
"""What may differ when a run is continued: where it lies, what it runs on, how often it is saved."""

_LIMITS = ("data.max_skipped_fraction", "optim.max_rollbacks")
"""These too: they say when a run ends early, so one that did can go on with another limit."""


def listed(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """Lines for a message: what each field is there, and what it is now."""
    return "".join(f"\n  {name}: {there!r} there, {now!r} now" for name, (there, now) in differing.items())


def differing_fields(old: RunConfig, new: RunConfig, *, limits: bool = False) -> dict[str, tuple[Any, Any]]:
    """`{field: (old, new)}` for every field that decides a run's result; with `limits`, also for those that end it."""

    def flat(config: RunConfig) -> dict[str, Any]:
        sections = {k: v for k, v in dataclasses.asdict(config).items() if k not in _SITTING_FIELDS}
        return {
            f"{section}.{name}" if isinstance(value, dict) else section: leaf
            for section, value in sections.items()
            for name, leaf in (value.items() if isinstance(value, dict) else [("", value)])
        }

    before, after = flat(old), flat(new)
    return {
        name: (before[name], after[name])
        for name in before
        if before[name] != after[name] and (limits or name not in _LIMITS)
    }
