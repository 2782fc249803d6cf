from __future__ import annotations

import numpy as np
import pytest

from diffvit.analysis.statistics import calibration_error, mean_and_std, paired_bootstrap


def test_mean_and_std_by_hand() -> None:
    assert mean_and_std([1.0, 2.0, 6.0]) == {"per_seed": [1, 2, 6], "mean": 3, "std": pytest.approx(7**0.5)}
    assert mean_and_std([4.0])["std"] is None


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
