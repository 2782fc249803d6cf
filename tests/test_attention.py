"""Each attention against its equations, written out naively in float64; the fast paths against each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from diffvit.models import attention as module
from diffvit.models import two_maps
from diffvit.models.attention import Attention, DiffAttention, DiffAttentionV2, depth_lambda_init

B, N, H, K = 2, 7, 3, 5  # odd and distinct
WIDTH = {Attention: H * K, DiffAttention: 2 * H * K, DiffAttentionV2: H * K}
VARIANTS = [Attention, DiffAttention, DiffAttentionV2]


def build(kind: type[nn.Module], dtype: torch.dtype = torch.float64, **options: object) -> nn.Module:
    torch.manual_seed(0)
    layer = kind(WIDTH[kind], H, qkv_bias=True, **options).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.4)  # also norms and lambda, so that nothing hides behind 0 or 1
    return layer


def inputs(kind: type[nn.Module], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, N, WIDTH[kind], dtype=dtype, generator=torch.Generator().manual_seed(1))


def attend(q: Tensor, k: Tensor) -> Tensor:
    """One map by definition, row by row: q (N, K), k (N, K)."""
    rows = []
    for query in q:
        scores = torch.stack([torch.dot(query, key) for key in k]) / math.sqrt(q.shape[1])
        rows.append(torch.exp(scores) / torch.exp(scores).sum())
    return torch.stack(rows)


def reference(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([reference_one(layer, sample) for sample in x])


def reference_one(layer: nn.Module, x: Tensor) -> Tensor:
    """(N, D) -> (N, D), head by head."""
    D = x.shape[1]
    projected = x @ layer.qkv.weight.T + layer.qkv.bias
    heads = []
    for h in range(H):
        if isinstance(layer, Attention):
            q, k, v = (projected[:, part * D + h * K : part * D + (h + 1) * K] for part in range(3))
            heads.append(attend(q, k) @ v)
        elif isinstance(layer, DiffAttention):
            lam = torch.exp(torch.dot(layer.lambda_q1, layer.lambda_k1)) - torch.exp(
                torch.dot(layer.lambda_q2, layer.lambda_k2)
            )
            lam = lam + layer.lambda_init
            first, second = 2 * h, 2 * h + 1  # the two maps of head h
            q1, q2 = (projected[:, m * K : (m + 1) * K] for m in (first, second))
            k1, k2 = (projected[:, D + m * K : D + (m + 1) * K] for m in (first, second))
            v = projected[:, 2 * D + h * 2 * K : 2 * D + (h + 1) * 2 * K]
            out = (attend(q1, k1) - lam * attend(q2, k2)) @ v
            if isinstance(layer.sub_norm, nn.LayerNorm):
                centred = out - out.mean(dim=1, keepdim=True)
                normed = centred / torch.sqrt((centred**2).mean(dim=1, keepdim=True) + 1e-5)
                heads.append((normed * layer.sub_norm.weight + layer.sub_norm.bias) * (1 - layer.lambda_init))
                continue
            rms = torch.sqrt((out**2).mean(dim=1, keepdim=True) + 1e-5)
            heads.append(out / rms * layer.sub_norm.weight * (1 - layer.lambda_init))
        else:
            first, second = 2 * h, 2 * h + 1
            q1, q2 = (projected[:, m * K : (m + 1) * K] for m in (first, second))
            k = projected[:, 2 * D + h * K : 2 * D + (h + 1) * K]
            v = projected[:, 3 * D + h * K : 3 * D + (h + 1) * K]
            lam = x @ layer.lambda_proj.weight[h]  # (N,)
            heads.append(attend(q1, k) @ v - torch.sigmoid(lam)[:, None] * (attend(q2, k) @ v))
    return torch.cat(heads, dim=1) @ layer.proj.weight.T + layer.proj.bias


@pytest.mark.parametrize("kind", VARIANTS)
def test_equations(kind: type[nn.Module]) -> None:
    options = {"lambda_init": 0.37} if kind is DiffAttention else {}
    layer, x = build(kind, **options), inputs(kind)
    torch.testing.assert_close(layer(x), reference(layer, x), rtol=1e-9, atol=1e-9)


def test_layer_norm_in_the_place_of_rms_norm() -> None:
    layer, x = build(DiffAttention, lambda_init=0.37, head_norm="layer"), inputs(DiffAttention)
    torch.testing.assert_close(layer(x), reference(layer, x), rtol=1e-9, atol=1e-9)
    assert set(layer.state_dict()) == {*build(DiffAttention).state_dict(), "sub_norm.bias"}
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("dots", "lambda_max", "expected"),
    [((1.5, 0.3), None, None), ((1.5, 0.3), 0.9, 0.9), ((0.1, 0.0), 0.9, None), ((0.1, 1.2), 0.9, 0.0)],
)
def test_lambda_stays_in_its_bounds_and_keeps_its_gradient(
    dots: tuple[float, float], lambda_max: float | None, expected: float | None
) -> None:
    layer = DiffAttention(2, 1, lambda_init=0.3, lambda_max=lambda_max).double()
    with torch.no_grad():
        for name, value in zip(("q1", "k1", "q2", "k2"), (dots[0], 1.0, dots[1], 1.0), strict=True):
            getattr(layer, f"lambda_{name}").fill_(value)
    learned = math.exp(dots[0]) - math.exp(dots[1]) + 0.3
    value = layer.current_lambda()
    assert value.item() == pytest.approx(learned if expected is None else expected)
    value.backward()
    assert layer.lambda_k1.grad.item() == pytest.approx(dots[0] * math.exp(dots[0]))


def test_bounds_of_lambda_are_those_of_forward() -> None:
    layer, x = build(DiffAttention, lambda_init=0.37), inputs(DiffAttention)
    free, lam = layer(x), layer.current_lambda().item()
    layer.lambda_max = lam + 0.1
    torch.testing.assert_close(layer(x), free)
    layer.lambda_max = lam / 2
    assert layer.attention_maps(x).weight.item() == pytest.approx(lam / 2)
    assert (layer(x) - free).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [DiffAttention, DiffAttentionV2])
@pytest.mark.parametrize(
    ("path", "heads_a_block"),
    [("subtract_maps", H), ("subtract_outputs", H), ("subtract_in_blocks", 2 * H), ("subtract_in_blocks", H - 1)],
)
def test_all_paths_have_the_references_values_and_gradients(
    kind: type[nn.Module], path: str, heads_a_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused path is what CUDA runs; here it runs on the CPU.

    Five images are three blocks, the last one short; or each of them is two, the second one short.
    """
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(module, "attend_two_maps", getattr(two_maps, path))
    monkeypatch.setattr(two_maps, "_BLOCK_ENTRIES", heads_a_block * 2 * N * N)
    layer = build(kind)
    x = torch.randn(5, N, WIDTH[kind], dtype=torch.float64).requires_grad_()
    x_reference = x.detach().clone().requires_grad_()
    upstream = torch.randn(5, N, WIDTH[kind], dtype=torch.float64)
    parameters = list(layer.parameters())
    ours = torch.autograd.grad((layer(x) * upstream).sum(), [x, *parameters])
    theirs = torch.autograd.grad((reference(layer, x_reference) * upstream).sum(), [x_reference, *parameters])
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-8, atol=1e-8)
    with torch.no_grad():  # in blocks no map is kept then
        torch.testing.assert_close(layer(x), reference(layer, x))


def test_the_cpu_works_in_blocks_unless_something_else_reads_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("subtract_maps", "subtract_in_blocks"):
        path = getattr(two_maps, name)
        monkeypatch.setattr(two_maps, name, lambda *args, name=name, path=path: (taken.append(name), path(*args))[1])
    layer, x = build(DiffAttention, torch.float32), torch.randn(3 * torch.get_num_threads(), N, WIDTH[DiffAttention])
    layer(x)  # all maps are one block
    monkeypatch.setattr(two_maps, "_BLOCK_ENTRIES", 2 * H * N * N)
    layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert taken == ["subtract_maps", "subtract_in_blocks", "subtract_maps"]


@pytest.mark.parametrize("kind", VARIANTS)
def test_maps_are_those_of_forward(kind: type[nn.Module]) -> None:
    """Softmax comes before the subtraction: each map's rows sum to 1, the combined ones to 1 - lambda."""
    layer, x = build(kind), inputs(kind)
    maps = layer.attention_maps(x)
    ones = torch.ones(B, H, N, dtype=torch.float64)
    torch.testing.assert_close(maps.positive.sum(-1), ones)
    if kind is Attention:
        assert maps.negative is None
        assert maps.combined is maps.positive
    else:
        torch.testing.assert_close(maps.negative.sum(-1), ones)
        torch.testing.assert_close(maps.combined.sum(-1), 1 - maps.weight.expand(B, H, N, 1).squeeze(-1))
    size = 2 * K if kind is DiffAttention else K
    values = layer.qkv(x)[..., -H * size :].unflatten(-1, (H, size)).transpose(1, 2)
    heads = maps.combined @ values
    if kind is DiffAttention:
        heads = layer.sub_norm(heads) * (1 - layer.lambda_init)
    torch.testing.assert_close(layer.proj(heads.transpose(1, 2).flatten(2)), layer(x))


def test_lambda_by_hand() -> None:
    layer = DiffAttention(4, 1, lambda_init=0.3)
    with torch.no_grad():
        layer.lambda_q1.copy_(torch.tensor([1.0, 2.0]))
        layer.lambda_k1.copy_(torch.tensor([0.5, -0.25]))  # dot 0
        layer.lambda_q2.copy_(torch.tensor([1.0, 0.0]))
        layer.lambda_k2.copy_(torch.tensor([math.log(0.5), 9.0]))
    assert layer.current_lambda().item() == pytest.approx(1 - 0.5 + 0.3)


def test_depth_schedule_by_hand() -> None:
    assert depth_lambda_init(0) == pytest.approx(0.2)
    assert depth_lambda_init(11) == pytest.approx(0.8 - 0.6 * math.exp(-3.3))


def test_v2_with_closed_gate_is_plain_attention_over_its_first_queries() -> None:
    layer, x = build(DiffAttentionV2), inputs(DiffAttentionV2)
    layer.gate = lambda x: torch.zeros(B, H, N, 1, dtype=x.dtype)
    plain = build(Attention)
    D = WIDTH[Attention]
    with torch.no_grad():
        rows = torch.cat([torch.arange(2 * h * K, (2 * h + 1) * K) for h in range(H)])
        rows = torch.cat([rows, torch.arange(2 * D, 4 * D)])
        plain.qkv.weight.copy_(layer.qkv.weight[rows])
        plain.qkv.bias.copy_(layer.qkv.bias[rows])
        plain.proj.load_state_dict(layer.proj.state_dict())
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("kind", VARIANTS)
def test_bf16_autocast_stays_near_and_keeps_softmax_in_float32(kind: type[nn.Module]) -> None:
    layer, x = build(kind, torch.float32), inputs(kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        maps = layer.attention_maps(x)
    assert out.dtype == torch.bfloat16
    assert maps.positive.dtype == torch.float32
    error = (out.float() - layer(x)).norm() / layer(x).norm()
    assert error < 0.03


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("enabled", [False, True])
def test_of_no_images_there_is_no_output(kind: type[nn.Module], enabled: bool) -> None:
    """As a rank of a sharded model asks that has fewer batches than another."""
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        assert kind(24, 2)(torch.zeros(0, 5, 24)).shape == (0, 5, 24)


@pytest.mark.parametrize("kind", VARIANTS)
def test_compiles_without_a_graph_break(kind: type[nn.Module]) -> None:
    layer, x = build(kind), inputs(kind)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_lambda_vectors_start_as_published() -> None:
    torch.manual_seed(0)
    layer = DiffAttention(4096, 2)
    for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
        assert getattr(layer, name).std().item() == pytest.approx(0.1, rel=0.15)
        assert getattr(layer, name).shape == (1024,)
    assert torch.equal(layer.sub_norm.weight, torch.ones(2048))


@pytest.mark.parametrize("kind", VARIANTS)
def test_width_that_does_not_divide_is_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="embed_dim must be divisible by"):
        kind(31, 2)


def test_lambda_max_must_be_positive() -> None:
    with pytest.raises(ValueError, match="lambda_max must be positive, got 0"):
        DiffAttention(8, 2, lambda_max=0.0)


def test_v1_needs_two_maps_a_head() -> None:
    with pytest.raises(ValueError, match="two maps"):
        DiffAttention(6, 6)
