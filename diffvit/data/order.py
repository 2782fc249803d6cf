"""Which sample is trained on when: a pure function of (seed, epoch), with no state and nothing of Ray.

The order depends neither on the number of workers nor on where a run was cut, so a run that goes on elsewhere goes on
with the next unseen sample. (MosaicML Streaming calls this elastic determinism.)

Letters: G global batch, W workers, A micro-batches a worker accumulates in a step, R copies of an image (repeated
augmentation, arXiv 1901.09335), P(seed, epoch) a permutation of the training samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

_ORDER, _AUGMENT, _MODEL, HOLD_OUT, SHUFFLE, _MIX, DRAW = range(7)
"""Streams of random numbers that never meet: the second entry of every seed in the project."""


def epoch_permutation(num_samples: int, seed: int, epoch: int) -> Indices:
    """P(seed, epoch): all of `0 .. num_samples - 1`, shape (num_samples,)."""
    return np.random.default_rng((seed, _ORDER, epoch)).permutation(num_samples)


@lru_cache(maxsize=2)
def _cached_permutation(num_samples: int, seed: int, epoch: int) -> Indices:
    order = epoch_permutation(num_samples, seed, epoch)
    order.setflags(write=False)
    return order


def sample_seed(seed: int, epoch: int, sample: int, copy: int = 0) -> int:
    """Seed of the random numbers that augment one copy of a sample in one epoch, in [0, 2^63)."""
    return _seed(seed, _AUGMENT, epoch, sample, *([copy] if copy else []))


def step_seed(seed: int, step: int) -> int:
    """Seed of what the model draws for a global batch (drop path), in [0, 2^63)."""
    return _seed(seed, _MODEL, step)


def mixing_seed(seed: int, step: int) -> int:
    """Seed of what mixup and CutMix draw in one global step, the same on every rank, in [0, 2^63)."""
    return _seed(seed, _MIX, step)


def _seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class TrainPlan:
    """Every micro-batch of a run, numbered: step by step, in a step micro-batch by micro-batch, in those rank by rank.

    Step s of an epoch trains on P[sG : (s+1)G]; rank r takes the r-th W-th of it, in A consecutive pieces. The last
    `num_samples mod G` samples of P are left out of the epoch.

    With `repeats` R > 1, P is replaced by its samples R times each, one after the other, and the epoch is as long as
    before: it shows the first R-th of P. In a step come the first copies of all its images, then the second ones, and
    so on, so that neighbours, which mixup pairs, are different images, and that copies spread over the ranks, as in
    DeiT (arXiv 2012.12877). Where R does not divide G, an image's copies may fall into two steps.

    Raises:
        ValueError: fewer samples than a global batch, W x A does not divide G, or R is not in 1..G.
    """

    num_samples: int
    seed: int
    epochs: int
    batch_size: int
    workers: int = 1
    accumulation_steps: int = 1
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.num_samples < self.batch_size:
            raise ValueError(
                f"optim.batch_size must not exceed the {self.num_samples} training images, got {self.batch_size}"
            )
        if self.batch_size % (self.workers * self.accumulation_steps):
            raise ValueError(
                f"workers x accumulation_steps = {self.workers} x {self.accumulation_steps} must divide "
                f"batch_size = {self.batch_size}"
            )
        if not 1 <= self.repeats <= self.batch_size:
            raise ValueError(
                f"augment.repeats must be between 1 and optim.batch_size = {self.batch_size}, got {self.repeats}"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.batch_size

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def rows_per_step(self) -> int:
        """Micro-batches of a step, over all ranks."""
        return self.workers * self.accumulation_steps

    @property
    def row_size(self) -> int:
        """Samples of a micro-batch."""
        return self.batch_size // self.rows_per_step

    def locate(self, row: int) -> tuple[int, int, int]:
        """(global step, micro-batch, rank) of micro-batch number `row`."""
        step, within = divmod(row, self.rows_per_step)
        micro, rank = divmod(within, self.workers)
        return step, micro, rank

    def samples(self, row: int) -> tuple[int, Indices]:
        """(epoch, sample numbers) of micro-batch number `row`, shape (G / (W A),)."""
        epoch, shown = self._shown(row)
        return epoch, _cached_permutation(self.num_samples, self.seed, epoch)[shown // self.repeats]

    def seeds(self, row: int) -> list[int]:
        """Seeds of the augmentation of `samples(row)`."""
        epoch, samples = self.samples(row)
        copies = self._shown(row)[1] % self.repeats
        pairs = zip(samples.tolist(), copies.tolist(), strict=True)
        return [sample_seed(self.seed, epoch, sample, copy) for sample, copy in pairs]

    def _shown(self, row: int) -> tuple[int, Indices]:
        """(epoch, places in the epoch's sequence of copies) of micro-batch number `row`; place i is copy i mod R."""
        step, micro, rank = self.locate(row)
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = (rank * self.accumulation_steps + micro) * self.row_size
        of_step = np.arange(step_in_epoch * self.batch_size, (step_in_epoch + 1) * self.batch_size)
        by_copy = np.argsort(of_step % self.repeats, kind="stable")  # without repeats: as they are
        return epoch, of_step[by_copy[first : first + self.row_size]]


@dataclass(frozen=True)
class EvalPlan:
    """Every sample of a split once, in `row_size` pieces dealt to the ranks in turn; the last piece may be short.

    In the split's own order (of an image folder: class by class), or in one that `shuffle_seed` draws.
    """

    num_samples: int
    row_size: int
    shuffle_seed: int | None = None

    @property
    def num_rows(self) -> int:
        return -(-self.num_samples // self.row_size)

    def samples(self, row: int) -> Indices:
        first = row * self.row_size
        end = min(first + self.row_size, self.num_samples)
        if self.shuffle_seed is None:
            return np.arange(first, end)
        return _shuffled(self.num_samples, self.shuffle_seed)[first:end]


@lru_cache(maxsize=1)
def _shuffled(num_samples: int, seed: int) -> Indices:
    return np.random.default_rng((seed, DRAW)).permutation(num_samples)
