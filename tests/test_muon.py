import pytest
import torch
from conftest import with_fields

from diffvit.config import ModelConfig, OptimConfig, RunConfig
from diffvit.models.vit import VisionTransformer
from diffvit.training.health import skip_poisoned
from diffvit.training.muon import MuonAdamW, orthogonalize
from diffvit.training.optim import build_optimizer

MUON = OptimConfig(optimizer="muon", lr=1e-3, muon_lr=0.1, weight_decay=0.5, muon_momentum=0.75)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_orthogonal_but_for_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(6, *shape)
    found = torch.linalg.svdvals(orthogonalize(matrices))
    assert 0.6 < found.min() <= found.max() < 1.3
    U, _, Vh = torch.linalg.svd(matrices, full_matrices=False)
    assert ((orthogonalize(matrices) * (U @ Vh)).sum((-2, -1)) / min(shape) > 0.8).all()


def test_steps_like_torchs_muon() -> None:
    torch.manual_seed(0)
    for shape in ((6, 4), (4, 6)):
        start = torch.randn(shape)
        ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
        mine = MuonAdamW([{"params": [ours], "muon": True, "momentum": 0.75}], lr=0.1, weight_decay=0.5, fused=True)
        peer = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.5, momentum=0.75)
        for _ in range(3):
            gradient = torch.randn(shape)
            ours.grad, theirs.grad = gradient.clone(), gradient.clone()
            mine.step()
            peer.step()
        torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)  # theirs is in bf16
        assert (ours - start).abs().max() > 0.1


def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        ModelConfig(variant="diff", image_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=1, num_classes=3)
    )


def test_takes_the_matrices_of_the_blocks_and_leaves_the_rest_to_adamw() -> None:
    vit = model()
    optimizer = build_optimizer(vit, MUON)
    names = {id(parameter): name for name, parameter in vit.named_parameters()}
    (muon,) = (group for group in optimizer.param_groups if group.get("muon"))
    assert {names[id(p)].rpartition(".")[0].partition(".")[2][2:] for p in muon["params"]} == {
        "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2",
    }  # fmt: skip
    assert (muon["lr"], muon["weight_decay"], len(muon["params"])) == (0.1, 0.5, 8)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    before = {name: parameter.detach().clone() for name, parameter in vit.named_parameters()}
    vit(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    moved = {name for name, parameter in vit.named_parameters() if not torch.equal(parameter, before[name])}
    assert {"head.weight", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.bias"} <= moved
    assert "momentum" in optimizer.state[vit.blocks[0].mlp.fc1.weight]
    assert "exp_avg" in optimizer.state[vit.head.weight]
    assert "exp_avg" not in optimizer.state[vit.blocks[0].mlp.fc1.weight]


def test_a_poisoned_step_changes_nothing() -> None:
    vit = model()
    optimizer = build_optimizer(vit, MUON)
    for poison in (False, True):
        vit(torch.randn(2, 3, 8, 8)).square().sum().backward()
        before = {name: parameter.detach().clone() for name, parameter in vit.named_parameters()}
        moment = optimizer.state[vit.blocks[0].mlp.fc1.weight].get("momentum", torch.zeros(())).clone()
        if poison:
            vit.blocks[0].mlp.fc1.weight.grad.fill_(float("nan"))
        skip_poisoned(optimizer, torch.tensor(float("nan") if poison else 1.0))
        optimizer.step()
        unchanged = [name for name, parameter in vit.named_parameters() if torch.equal(parameter, before[name])]
        assert (len(unchanged) == len(before)) is poison
        assert torch.equal(optimizer.state[vit.blocks[0].mlp.fc1.weight]["momentum"], moment) is poison


def test_refused_where_matrices_are_spread(tiny_config: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"scale\.sharding must be 'none', got 'fsdp'"):
        with_fields(tiny_config, optim={"optimizer": "muon"}, scale={"sharding": "fsdp"})
