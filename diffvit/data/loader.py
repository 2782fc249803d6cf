"""Makes numbered micro-batches: read the images, decode, augment, stack. Runs in any process, and knows nothing of Ray.

Letters: B samples in the micro-batch, C channels, S image side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader

from diffvit.config import RunConfig
from diffvit.data.batches import SKIPPED_LABEL, Batch
from diffvit.data.datasets import Dataset, Split
from diffvit.data.images import ImageError, decode_image, eval_transform, train_transform
from diffvit.data.order import EvalPlan, Indices, TrainPlan
from diffvit.data.subset import Excerpt

Images = npt.NDArray[np.uint8]

_EVAL_ROW_SIZE = 250
_FIRST_WEIGHTS_SHARE = 0.05
"""The largest share that the first step's weights may have in their average (EMA) when the run ends."""
_KEPT_BYTES = 256 * 2**20
"""Validation images that a rank keeps decoded."""


def plan_run(config: RunConfig, dataset: Dataset, workers: int = 1) -> tuple[TrainPlan, EvalPlan]:
    """What is trained on and evaluated when.

    Raises:
        ValueError: the run has fewer steps than something in it is to take.
    """
    train_plan = TrainPlan(
        num_samples=len(dataset.train),
        seed=config.seed,
        epochs=config.optim.epochs,
        batch_size=config.optim.batch_size,
        workers=workers,
        accumulation_steps=config.accumulation_steps_of(workers),
        repeats=config.augment.repeats,
    )
    for name, steps in (
        ("optim.warmup_steps", config.optim.warmup_steps),
        ("init.gate_opening_steps", config.init.gate_opening_steps),
    ):
        if (steps or 0) > train_plan.total_steps:
            raise ValueError(f"{name} must not exceed the {train_plan.total_steps} steps of the run, got {steps}")
    decay, averaged = config.optim.ema_decay, train_plan.total_steps - 1
    if decay and averaged and decay**averaged > _FIRST_WEIGHTS_SHARE:
        raise ValueError(
            f"optim.ema_decay must be at most {math.floor(1e4 * _FIRST_WEIGHTS_SHARE ** (1 / averaged)) / 1e4} for a "
            f"run of {train_plan.total_steps} steps, or its average, which is what is evaluated, would be made of the "
            f"first step's weights by {100 * decay**averaged:.0f} %; got {decay}"
        )
    return train_plan, EvalPlan(len(dataset.val), min(config.scale.micro_batch_size or _EVAL_ROW_SIZE, _EVAL_ROW_SIZE))


def validation_batches(config: RunConfig, dataset: Dataset, shuffle_seed: int | None = None) -> Iterator[Batch]:
    """Every validation image once, in this process, in the order of `EvalPlan`."""
    plan = EvalPlan(len(dataset.val), _EVAL_ROW_SIZE, shuffle_seed)
    return map(BatchLoader(config, dataset.val, plan), range(plan.num_rows))


class BatchLoader:
    """Makes micro-batch number `row` of a training or an evaluation plan.

    Its images are written into `into`, where that is given: uint8 (B or more, C, S, S).
    """

    def __init__(self, config: RunConfig, split: Split, plan: TrainPlan | EvalPlan) -> None:
        self.split = split
        self.plan = plan
        self.channels = config.model.in_channels
        self.image_size = config.model.image_size
        self.max_pixels = config.data.max_pixels
        transform = train_transform if isinstance(plan, TrainPlan) else eval_transform
        self.transform = transform(config.augment, self.image_size)

    def __call__(self, row: int, into: Images | None = None) -> Batch:
        if isinstance(self.plan, TrainPlan):
            return self._load(row, self.plan.samples(row)[1], self.plan.seeds(row), into)
        return self._load(row, self.plan.samples(row), None, into)

    def preview(self, count: int) -> Batch:
        """`count` samples spread evenly over the split."""
        return self._load(-1, np.linspace(0, len(self.split) - 1, count).astype(np.int64), None)

    def own_evaluation(self, rank: int, workers: int) -> OwnEvaluation:
        """Of an evaluation plan, what a rank can make for itself."""
        return OwnEvaluation(self, rank, workers)

    def _load(self, row: int, samples: Indices, seeds: list[int] | None, into: Images | None = None) -> Batch:
        shape = (len(samples), self.channels, self.image_size, self.image_size)
        images = np.empty(shape, np.uint8) if into is None else into[: len(samples)]
        labels = self.split.labels[samples]
        skipped = []
        with torch.random.fork_rng(devices=[]):  # a rank that makes its own batch goes on with its own random numbers
            for place, encoded in enumerate(self.split.read_many(samples)):
                if seeds is not None:
                    torch.default_generator.manual_seed(seeds[place])  # torch.manual_seed: 0.25 ms, it queues for CUDA
                try:
                    images[place] = self._decode(encoded)
                except (ImageError, OSError) as error:
                    images[place] = 0
                    labels[place] = SKIPPED_LABEL
                    skipped.append(f"{self.split.key(int(samples[place]))}: {error}")
        return Batch(row, images, labels, tuple(skipped), samples)

    def _decode(self, encoded: bytes | OSError) -> Images:
        if isinstance(encoded, OSError):
            raise encoded
        image: Images = self.transform(decode_image(encoded, self.channels, self.max_pixels)).numpy()
        return image


class OwnEvaluation:
    """The evaluation batches of one rank, made by itself when they are first asked for, and kept."""

    def __init__(self, loader: BatchLoader, rank: int, workers: int) -> None:
        assert isinstance(loader.plan, EvalPlan)
        self._loader, self._rows = loader, range(rank, loader.plan.num_rows, workers)
        split = loader.split.split if isinstance(loader.split, Excerpt) else loader.split
        self._most = -(-EvalPlan(len(split), loader.plan.row_size).num_rows // workers)
        self._kept: list[Batch] | None = None

    @property
    def is_small(self) -> bool:
        """Whether memory is no matter; the same for every rank."""
        image_bytes = self._loader.channels * self._loader.image_size**2
        return self._most * self._loader.plan.row_size * image_bytes <= _KEPT_BYTES

    def batches(self) -> Iterator[Batch]:
        if not self.is_small:
            return map(self._loader, self._rows)
        if self._kept is None:
            self._kept = list(map(self._loader, self._rows))
        return iter(self._kept)


class LocalStream:
    """The batches of one rank made on this machine: the stream of a run without Ray, and the reference for Ray's.

    Args:
        train: makes the training batches.
        val: makes the validation batches; while they are few they are kept after they were made once.
        rank: whose batches.
        workers: ranks in all.
        decoders: processes that make the training batches ahead of time; 0: this one, when they are asked for.
    """

    def __init__(
        self, train: BatchLoader, val: BatchLoader, rank: int = 0, workers: int = 1, *, decoders: int = 0
    ) -> None:
        self._train, self._val, self._rank, self._workers, self._decoders = train, val, rank, workers, decoders
        self._evaluation = val.own_evaluation(rank, workers)

    def train(self, first_step: int) -> Iterator[Batch]:
        plan = self._train.plan
        assert isinstance(plan, TrainPlan)
        first = first_step * plan.rows_per_step + self._rank
        rows = range(first, plan.total_steps * plan.rows_per_step, plan.workers)
        return self._made_ahead(rows) if self._decoders else map(self._train, rows)

    def evaluate(self) -> Iterator[Batch]:
        return self._evaluation.batches()

    def preview(self, count: int) -> Batch:
        return self._val.preview(count)

    def keys(self, samples: Indices) -> list[str]:
        return [self._train.split.key(sample) for sample in samples.tolist()]

    def _made_ahead(self, rows: range) -> Iterator[Batch]:
        return iter(
            DataLoader(
                _Rows(self._train, rows),
                batch_size=None,
                num_workers=self._decoders,
                prefetch_factor=4,
                multiprocessing_context="spawn",  # a copy of a process that holds a GPU or Ray would be of no use
            )
        )


@dataclass(frozen=True)
class _Rows(torch.utils.data.Dataset[Batch]):
    """What DataLoader's workers take rows from."""

    loader: BatchLoader
    rows: range

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Batch:
        return self.loader(self.rows[place])
