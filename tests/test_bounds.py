from __future__ import annotations

import math

import pytest
import torch

from diffvit.models.attention import DiffAttention
from diffvit.training.bounds import hold_lambdas


def layer_at(dot: float, lambda_max: float | None = 0.9) -> DiffAttention:
    """Whose learned lambda is exp(dot) - 1 + 0.3."""
    layer = DiffAttention(2, 1, lambda_init=0.3, lambda_max=lambda_max).double()
    with torch.no_grad():
        for name, value in (("q1", -dot), ("k1", -1.0), ("q2", 0.0), ("k2", 1.0)):
            getattr(layer, f"lambda_{name}").fill_(value)
    return layer


@pytest.mark.parametrize(
    ("dot", "sign", "held"),
    [(1.0, -1, True), (1.0, 1, False), (0.1, -1, False), (0.1, 1, False), (-2.0, 1, True), (-2.0, -1, False)],
)
def test_only_what_leads_further_out_is_dropped(dot: float, sign: int, held: bool) -> None:
    """The loss is `sign` times lambda; it is above its bound at 1.0, and below 0 at -2.0."""
    layer = layer_at(dot)
    (sign * layer.current_lambda()).backward()
    free = [vector.grad.clone() for vector in (layer.lambda_q1, layer.lambda_q2)]
    hold_lambdas(layer)
    for vector, grad in zip((layer.lambda_q1, layer.lambda_q2), free, strict=True):
        assert grad.abs() > 0
        assert vector.grad.item() == (0.0 if held else grad.item())
    assert layer.lambda_k2.grad.item() == 0.0  # as its partner is


def test_no_bounds_nothing_held_and_what_is_not_finite_stays() -> None:
    free = layer_at(1.0, lambda_max=None)
    (-free.current_lambda()).backward()
    hold_lambdas(free)
    assert free.lambda_q1.grad.item() != 0.0
    frozen = layer_at(1.0).requires_grad_(False)
    hold_lambdas(frozen)
    poisoned = layer_at(1.0)
    (-poisoned.current_lambda()).backward()
    poisoned.lambda_q2.grad.fill_(math.nan)
    hold_lambdas(poisoned)
    assert poisoned.lambda_q2.grad.isnan()


def test_a_bounded_lambda_does_not_run_away() -> None:
    """A loss that wants it far below 0 for a thousand steps, and then at 0.5."""
    layer = DiffAttention(16, 1, lambda_max=1.0)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    for step in range(1100):
        value = layer.current_lambda()
        loss = value if step < 1000 else (value - 0.5) ** 2
        optimizer.zero_grad()
        loss.backward()
        hold_lambdas(layer)
        optimizer.step()
        assert 0.0 <= value.item() <= 1.0
    assert value.item() == pytest.approx(0.5, abs=0.05)
