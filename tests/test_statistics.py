from __future__ import annotations

import math

import numpy as np
import pytest

from diffvit.analysis.statistics import calibration_error, mean_and_std, paired_bootstrap, seed_interval


def test_mean_and_std_by_hand() -> None:
    assert mean_and_std([1.0, 2.0, 6.0]) == {"per_seed": [1, 2, 6], "mean": 3, "std": pytest.approx(7**0.5)}
    assert mean_and_std([4.0])["std"] is None
    assert mean_and_std([1.0, math.nan, 3.0])["mean"] == 2
    assert mean_and_std([1.0, math.nan, 3.0])["std"] == pytest.approx(2**0.5)
    assert math.isnan(mean_and_std([math.nan])["mean"])


def test_intervals_over_seeds_by_hand() -> None:
    arm, baseline = np.array([86.93, 87.02, 87.13]), np.array([86.16, 86.43, 86.84])
    # differences 0.77, 0.59, 0.29: mean 0.55, standard deviation 0.2425, times 4.303 / sqrt 3
    assert seed_interval(arm, baseline, same_seeds=True) == pytest.approx((-0.0525, 1.1525), abs=1e-3)
    # Welch: variances 0.01003 and 0.11723 over 3, so 2.34 degrees of freedom, of which 2 are taken
    assert seed_interval(arm, baseline, same_seeds=False) == pytest.approx((-0.3361, 1.4361), abs=1e-3)
    assert seed_interval(arm, baseline[:1], same_seeds=False) is None
    # two degrees of freedom, 1.9999999999999998 as computed
    arm, level = np.array([0.02, 0.81, 0.91]), np.full(3, 0.5)
    reach = 4.303 * arm.std(ddof=1) / 3**0.5
    assert seed_interval(arm, level, same_seeds=False) == pytest.approx((0.08 - reach, 0.08 + reach))
    # one degree of freedom, though rounding makes it a little less
    low, high = seed_interval(np.array([0.307, 0.04]), np.array([0.526, 0.526]), same_seeds=False) or (1.0, 1.0)
    assert (low, high) == pytest.approx((-0.3525 - 12.706 * 0.1335, -0.3525 + 12.706 * 0.1335))
    alike = np.full(40, 2.0)
    assert seed_interval(alike + 1, alike, same_seeds=False) == (1.0, 1.0)


def test_calibration_error_by_hand() -> None:
    confidence, correct = np.array([0.9, 0.6, 0.7, 0.8, 0.5]), np.array([1.0, 0.0, 1.0, 0.0, 1.0])
    # sorted: (0.5, 1) (0.6, 0) (0.7, 1) | (0.8, 0) (0.9, 1): gaps of sums 0.2 and 0.7
    assert calibration_error(confidence, correct, bins=2) == pytest.approx((0.2 + 0.7) / 5)
    # a bin each: 0.5 + 0.6 + 0.3 + 0.8 + 0.1
    assert calibration_error(confidence, correct, bins=15) == pytest.approx(2.3 / 5)


def test_bootstrap_pairs_images() -> None:
    generator = np.random.default_rng(0)
    baseline = (generator.random((3, 400)) < 0.6).astype(float)
    arm = baseline.copy()
    arm[:, :40] = 1  # 40 images that every run gets right
    gain = arm.mean() - baseline.mean()
    found = paired_bootstrap(arm, baseline, same_seeds=True, resamples=400)
    assert found.difference == pytest.approx(gain)
    assert 0 < found.low < gain < found.high
    shuffled = arm[:, generator.permutation(400)]
    unpaired = paired_bootstrap(shuffled, baseline, same_seeds=True, resamples=400)
    assert unpaired.high - unpaired.low > 1.5 * (found.high - found.low)
    assert paired_bootstrap(arm, baseline, same_seeds=True, resamples=400) == found


def test_bootstrap_resamples_seeds() -> None:
    baseline = np.zeros((3, 50))
    arm = np.repeat([[0.0], [0.0], [1.0]], 50, axis=1)  # one run is right everywhere
    found = paired_bootstrap(arm, baseline, same_seeds=False, resamples=500)
    assert (found.low, found.high) == (0, 1)
    assert found.difference == pytest.approx(1 / 3)
    noisy = np.repeat([[0.0], [0.5], [1.0]], 50, axis=1)
    same = paired_bootstrap(noisy + 0.1, noisy, same_seeds=True, resamples=100)
    assert (same.low, same.high) == pytest.approx((0.1, 0.1))  # seeds are drawn together
    apart = paired_bootstrap(noisy + 0.1, noisy, same_seeds=False, resamples=100)
    assert apart.low < -0.2 < 0.4 < apart.high


def test_bootstrap_refuses_what_is_no_pair() -> None:
    with pytest.raises(ValueError, match=r"got 2 runs x 5 images and 3 x 5"):
        paired_bootstrap(np.zeros((2, 5)), np.zeros((3, 5)), same_seeds=True)
    with pytest.raises(ValueError, match=r"same images"):
        paired_bootstrap(np.zeros((2, 5)), np.zeros((2, 6)), same_seeds=False)
