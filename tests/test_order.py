from collections.abc import Callable

import numpy as np
import pytest

from diffvit.data.order import EvalPlan, TrainPlan, epoch_permutation, sample_seed, step_seed


def plan(
    workers: int = 1, accumulation_steps: int = 1, num_samples: int = 50, epochs: int = 3, repeats: int = 1
) -> TrainPlan:
    return TrainPlan(num_samples, 7, epochs, 12, workers, accumulation_steps, repeats)


def global_batches(p: TrainPlan) -> list[list[int]]:
    """The samples of each step: ranks side by side, each with its micro-batches in turn."""
    return over_ranks(p, lambda row: p.samples(row)[1].tolist())


def global_seeds(p: TrainPlan) -> list[list[int]]:
    """The augmentation seeds of `global_batches`."""
    return over_ranks(p, p.seeds)


def over_ranks(p: TrainPlan, of: Callable[[int], list[int]]) -> list[list[int]]:
    batches = []
    for step in range(p.total_steps):
        rows = range(step * p.rows_per_step, (step + 1) * p.rows_per_step)
        by_rank = sorted(rows, key=lambda row: (p.locate(row)[2], p.locate(row)[1]))
        batches.append([value for row in by_rank for value in of(row)])
    return batches


def test_permutation_holds_each_sample_once_and_differs_by_seed_and_epoch() -> None:
    first = epoch_permutation(1001, seed=3, epoch=0)
    assert sorted(first.tolist()) == list(range(1001))
    assert not np.array_equal(first, epoch_permutation(1001, seed=3, epoch=1))
    assert not np.array_equal(first, epoch_permutation(1001, seed=4, epoch=0))
    assert np.array_equal(first, epoch_permutation(1001, seed=3, epoch=0))


def test_permutation_is_pinned() -> None:
    """A change here changes every run's order: old runs could not be continued."""
    assert epoch_permutation(8, seed=0, epoch=0).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]
    assert sample_seed(0, 0, 0) == 2918264622725855778
    assert sample_seed(0, 0, 0, copy=2) != sample_seed(0, 0, 0)


@pytest.mark.parametrize("repeats", [1, 3, 5])
@pytest.mark.parametrize(("workers", "accumulation_steps"), [(1, 1), (2, 1), (3, 2), (4, 3), (6, 2), (12, 1)])
def test_global_batches_do_not_depend_on_workers_or_accumulation(
    workers: int, accumulation_steps: int, repeats: int
) -> None:
    p = plan(workers, accumulation_steps, repeats=repeats)
    assert global_batches(p) == global_batches(plan(repeats=repeats))
    assert global_seeds(p) == global_seeds(plan(repeats=repeats))
    assert p.rows_per_step * p.row_size == 12


def test_step_s_trains_on_the_sth_slice_of_the_permutation() -> None:
    batches = global_batches(plan(workers=2))
    order = epoch_permutation(50, 7, epoch=1)
    assert plan().steps_per_epoch == 4  # 50 // 12; two samples are left out
    assert batches[4 + 2] == order[24:36].tolist()


def test_repeats_show_copies_of_fewer_images() -> None:
    """12 in a batch, 3 copies: 4 images, whose first copies come first; the epoch is as long as without."""
    batches, seeds = global_batches(plan(repeats=3)), global_seeds(plan(repeats=3))
    assert len(batches) == 3 * 4
    order = epoch_permutation(50, 7, epoch=1).tolist()
    assert batches[4 + 2] == 3 * order[8:12]
    copies = [copy for copy in range(3) for _ in range(4)]
    assert seeds[6] == [sample_seed(7, 1, sample, copy) for sample, copy in zip(batches[6], copies, strict=True)]
    assert len({seed for step in seeds for seed in step}) == 3 * 48
    assert global_batches(plan(repeats=1))[6] == order[24:36]
    assert global_seeds(plan())[6] == [sample_seed(7, 1, sample) for sample in order[24:36]]


def test_copies_that_do_not_divide_the_batch_go_on_in_the_next_step() -> None:
    """Of 12 places with 5 copies each: images 0, 1 and two copies of 2; then its other three, image 3 and four of 4."""
    batches, seeds = global_batches(plan(repeats=5)), global_seeds(plan(repeats=5))
    order = epoch_permutation(50, 7, epoch=0).tolist()
    assert batches[0] == [order[i] for i in (0, 1, 2, 0, 1, 2, 0, 1, 0, 1, 0, 1)]
    assert batches[1] == [order[i] for i in (3, 4, 3, 4, 2, 3, 4, 2, 3, 4, 2, 3)]
    of_image_2 = [s for step in (0, 1) for s, b in zip(seeds[step], batches[step], strict=True) if b == order[2]]
    assert sorted(of_image_2) == sorted(sample_seed(7, 0, order[2], copy) for copy in range(5))


@pytest.mark.parametrize("repeats", [2, 3, 4, 5, 6])
def test_neighbours_that_mixup_pairs_are_different_images(repeats: int) -> None:
    for batch in global_batches(plan(repeats=repeats)):
        assert all(batch[i] != batch[i + 1] for i in range(0, 12, 2))


def test_a_rank_takes_a_contiguous_part() -> None:
    p = plan(workers=3, accumulation_steps=2)
    order = epoch_permutation(50, 7, epoch=0)
    row = next(r for r in range(p.rows_per_step) if p.locate(r) == (0, 1, 2))
    epoch, samples = p.samples(row)
    assert epoch == 0
    assert samples.tolist() == order[10:12].tolist()


def test_rows_go_to_ranks_in_turn() -> None:
    p = plan(workers=3, accumulation_steps=2)
    assert [p.locate(row) for row in range(7)] == [
        (0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 1, 2), (1, 0, 0),
    ]  # fmt: skip


@pytest.mark.parametrize(("num_samples", "row_size"), [(1, 5), (10, 5), (11, 5), (2000, 250)])
def test_evaluation_takes_each_sample_once(num_samples: int, row_size: int) -> None:
    p = EvalPlan(num_samples, row_size)
    samples = np.concatenate([p.samples(row) for row in range(p.num_rows)])
    assert samples.tolist() == list(range(num_samples))


def test_seeds_are_distinct_and_fit_a_generator() -> None:
    seeds = {sample_seed(s, e, i) for s in range(3) for e in range(3) for i in range(50)}
    seeds |= {step_seed(s, e) for s in range(3) for e in range(150)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_refuses_what_cannot_be_dealt() -> None:
    with pytest.raises(ValueError, match="must not exceed the 11 training images"):
        plan(num_samples=11)
    with pytest.raises(ValueError, match="must divide"):
        plan(workers=5)
    with pytest.raises(ValueError, match=r"repeats must be between 1 and optim\.batch_size = 12, got 13"):
        plan(repeats=13)
