"""CKA against numbers worked out by hand and against the trace formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffvit.analysis.cka import CKA


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cka_of(a: Tensor, b: Tensor, batch: int = 10**9) -> float:
    cka = CKA()
    for x, y in zip(a.split(batch), b.split(batch), strict=True):
        cka.update({"a": x}, {"b": y})
    return cka.compute().item()


def hsic_by_traces(x: Tensor, y: Tensor) -> Tensor:
    """Song et al. (2012), theorem 5, written as it stands there."""
    n = len(x)
    ones = torch.ones(n, 1, dtype=torch.float64)
    K, L = ((m @ m.T) * (1 - torch.eye(n, dtype=torch.float64)) for m in (x.flatten(1).double(), y.flatten(1).double()))
    product = torch.trace(K @ L)
    means = (ones.T @ K @ ones) * (ones.T @ L @ ones) / ((n - 1) * (n - 2))
    mixed = 2 / (n - 2) * (ones.T @ K @ L @ ones)
    return ((product + means - mixed) / (n * (n - 3))).squeeze()


def reference(x: Tensor, y: Tensor) -> float:
    return (hsic_by_traces(x, y) / (hsic_by_traces(x, x) * hsic_by_traces(y, y)).sqrt()).item()


def test_by_hand() -> None:
    # K of x has -1 at (1, 4) alone: U-centred -1/3 at (1, 4) and (2, 3), 1/6 elsewhere; y's likewise at (1, 2), (3, 4).
    # Over i < j: HSIC(K, K) ~ 2/9 + 4/36 = 1/3, HSIC(K, L) ~ -4/18 + 2/36 = -1/6.
    x = torch.tensor([[1.0], [0.0], [0.0], [-1.0]])
    y = torch.tensor([[1.0], [-1.0], [0.0], [0.0]])
    assert cka_of(x, y) == pytest.approx(-0.5, abs=1e-6)


def test_all_layer_pairs_against_the_trace_formula() -> None:
    a = {"first": noise(13, 7), "second": noise(13, 3, 5, seed=1)}
    b = {"x": a["first"] @ noise(7, 4, seed=2), "y": noise(13, 11, seed=3), "z": a["second"].flatten(1)[:, :6]}
    cka = CKA()
    cka.update(a, b)
    expected = [[reference(x, y) for y in b.values()] for x in a.values()]
    torch.testing.assert_close(cka.compute(), torch.tensor(expected, dtype=torch.float64))
    assert (cka.layers_a, cka.layers_b) == (("first", "second"), ("x", "y", "z"))


def test_a_layer_with_itself_is_one() -> None:
    layers = {name: noise(9, 5, seed=seed) for seed, name in enumerate("pqr")}
    cka = CKA()
    cka.update(layers, layers)
    similarity = cka.compute()
    assert similarity.diagonal().tolist() == pytest.approx([1, 1, 1])
    torch.testing.assert_close(similarity, similarity.T)
    copy = CKA()
    copy.update(layers, dict(layers))  # not the same object: the long way
    torch.testing.assert_close(similarity, copy.compute())


def test_rotation_scale_and_shift_change_nothing() -> None:
    x, y = noise(31, 6), noise(31, 9, seed=1)
    y[:, :6] += x
    rotation, _ = torch.linalg.qr(noise(9, 9, seed=2))
    assert cka_of(x, 17.0 * y @ rotation + 40.0) == pytest.approx(cka_of(x, y), abs=1e-9)
    stretched = y * torch.arange(1.0, 10.0)  # no invariance to an arbitrary linear map
    assert abs(cka_of(x, stretched) - cka_of(x, y)) > 0.01


def test_independent_noise_is_near_zero_also_in_small_batches() -> None:
    x, y = noise(1600, 40), noise(1600, 40, seed=1)
    assert abs(cka_of(x, y, batch=32)) < 0.02  # the biased estimate is near 0.5 here


def test_minibatches_agree_with_the_full_batch() -> None:
    x = noise(1536, 12)
    y = x @ noise(12, 8, seed=1) + 2 * noise(1536, 8, seed=2)
    full = reference(x, y)
    assert 0.2 < full < 0.8
    assert cka_of(x, y, batch=48) == pytest.approx(full, abs=0.02)
    assert cka_of(x, y) == pytest.approx(full, abs=1e-9)


def test_a_ragged_last_batch_weighs_by_its_images() -> None:
    x = noise(25, 6)
    y = x[:, :3] + 0.5 * noise(25, 3, seed=1)
    parts = list(zip(x.split(10), y.split(10), strict=True))  # 10, 10, 5

    def weighted(first: int, second: int) -> Tensor:
        return sum(len(part[0]) * hsic_by_traces(part[first], part[second]) for part in parts)

    expected = weighted(0, 1) / (weighted(0, 0) * weighted(1, 1)).sqrt()
    assert cka_of(x, y, batch=10) == pytest.approx(expected.item())
    unweighted = [sum(hsic_by_traces(p[i], p[j]) for p in parts) for i, j in ((0, 1), (0, 0), (1, 1))]
    assert abs(unweighted[0] / (unweighted[1] * unweighted[2]).sqrt() - expected) > 1e-3


def test_merged_workers_equal_one() -> None:
    a, b = {"a": noise(30, 5), "c": noise(30, 3, seed=1)}, {"b": noise(30, 4, seed=2)}
    whole, first, second, none = CKA(), CKA(), CKA(), CKA()
    for place in range(0, 30, 6):
        batch = [{k: v[place : place + 6] for k, v in features.items()} for features in (a, b)]
        whole.update(*batch)
        (first if place < 12 else second).update(*batch)
    none.merge(first)
    none.merge(CKA())
    none.merge(second)
    torch.testing.assert_close(none.compute(), whole.compute())
    assert none.images == whole.images == 30
    swapped = CKA()
    swapped.update(b, a)
    with pytest.raises(ValueError, match=r"same in every batch, got a, c before and b now"):
        none.merge(swapped)


def test_float32_with_a_large_common_mean_keeps_its_digits() -> None:
    x, y = noise(64, 20), noise(64, 20, seed=1)
    y += x
    assert cka_of((x + 1000).float(), (y - 3000).float()) == pytest.approx(reference(x, y), abs=1e-4)


def test_activations_that_do_not_vary_have_no_value() -> None:
    cka = CKA()
    cka.update({"constant": torch.ones(6, 3), "noise": noise(6, 3)}, {"noise": noise(6, 3)})
    assert torch.isnan(cka.compute()).tolist() == [[True], [False]]


@pytest.mark.parametrize("n", [1, 3])
def test_a_batch_too_small_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=rf"at least 4 images for an unbiased estimate, got {n}; join"):
        CKA().update({"a": noise(n, 2)}, {"b": noise(n, 2)})


def test_different_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same images, got 5 of b late and 6 of a early"):
        CKA().update({"early": noise(6, 2)}, {"late": noise(5, 2)})
    with pytest.raises(ValueError, match=r"at least one layer, got none"):
        CKA().update({"early": noise(6, 2)}, {})


def test_compute_needs_a_batch() -> None:
    with pytest.raises(ValueError, match=r"at least one batch before compute\(\), got none"):
        CKA().compute()
