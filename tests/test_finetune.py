"""Starting from weights: what a plain ViT becomes, who learns how fast, what is frozen, and the command line."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_folder, with_fields
from safetensors.torch import load_file, save_file

from diffvit.cli import parse_finetune_config, parse_sweep_config
from diffvit.config import InitConfig, ModelConfig, OptimConfig, RunConfig, to_json
from diffvit.data.datasets import open_dataset
from diffvit.manifest import read_manifest, write_manifest
from diffvit.models.convert import convert_plain, is_plain
from diffvit.models.origin import TIMM_MODELS, origin_by_name
from diffvit.models.pretrained import UnknownOriginError, model_from, origin_of
from diffvit.models.saved import load_saved
from diffvit.models.vit import VisionTransformer
from diffvit.models.weights import load_weights
from diffvit.recipes import RECIPES
from diffvit.training import launch
from diffvit.training.alone import train_alone
from diffvit.training.initial import load_initial
from diffvit.training.loop import RunStopped
from diffvit.training.optim import build_optimizer
from diffvit.training.resolve import require_weights, resolve

PLAIN = ModelConfig(variant="softmax", image_size=20, patch_size=5, num_classes=7, embed_dim=48, depth=3, num_heads=6)


def random_model(config: ModelConfig, seed: int = 0) -> VisionTransformer:
    """With every parameter away from its initial value, so that nothing hides behind 0 or 1."""
    torch.manual_seed(seed)
    model = VisionTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def images(side: int = 20) -> torch.Tensor:
    return torch.randn(5, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_v2_from_plain_is_exact_while_the_gate_is_closed() -> None:
    plain = random_model(PLAIN)
    model = random_model(dataclasses.replace(PLAIN, variant="diff_v2"), seed=1)
    report = load_weights(model, plain.state_dict(), from_plain=True)
    assert report.converted
    model.open_gates(0.0)
    torch.testing.assert_close(model(images()), plain(images()))
    model.open_gates(1.0)
    assert (model(images()) - plain(images())).abs().max() > 1e-3


def test_the_gate_opens_linearly() -> None:
    """With W = 0 a gate is half open: out = A1 V - opening / 2 A2 V, which is linear in `opening`."""
    layer = VisionTransformer(dataclasses.replace(PLAIN, variant="diff_v2")).blocks[0].attn
    torch.nn.init.zeros_(layer.lambda_proj.weight)
    x = torch.randn(2, 17, 48)
    outs = []
    for opening in (0.0, 0.5, 1.0):
        layer.gate_opening.fill_(opening)
        outs.append(layer(x))
    torch.testing.assert_close(outs[1], (outs[0] + outs[2]) / 2)
    assert layer.attention_maps(x).weight.unique().tolist() == [0.5]
    assert "gate_opening" not in layer.state_dict()


def test_both_maps_of_v2_differ_from_each_other() -> None:
    plain = random_model(PLAIN)
    model = VisionTransformer(dataclasses.replace(PLAIN, variant="diff_v2"))
    weights = convert_plain(plain.state_dict(), model)
    q = weights["blocks.1.attn.qkv.weight"][: 2 * 48].unflatten(0, (6, 2, 8))
    own = plain.state_dict()["blocks.1.attn.qkv.weight"][:48].unflatten(0, (6, 8))
    assert torch.equal(q[:, 0], own)
    assert torch.equal(q[:, 1], own[[1, 2, 3, 4, 5, 0]])


def test_v1_from_plain_keeps_what_is_outside_of_attention() -> None:
    plain = random_model(PLAIN)
    config = dataclasses.replace(PLAIN, variant="diff", num_heads=3, lambda_init=0.0)
    model = VisionTransformer(config)
    load_weights(model, plain.state_dict(), from_plain=True)
    ours, theirs = model.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert set(ours) - set(theirs) == {
        f"blocks.{i}.attn.{name}"
        for i in range(3)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "sub_norm.weight")
    }
    normed = VisionTransformer(dataclasses.replace(config, head_norm="layer"))
    load_weights(normed, plain.state_dict(), from_plain=True)
    assert not normed.state_dict()["blocks.2.attn.sub_norm.bias"].any()
    # the first value half of head 0 is read through plain head 0's own map: the direction of its output is kept
    x = torch.randn(2, 17, 48)
    maps, own = model.blocks[0].attn.attention_maps(x), plain.blocks[0].attn.attention_maps(x)
    torch.testing.assert_close(maps.positive, own.positive[:, 0::2])
    torch.testing.assert_close(maps.negative, own.positive[:, 1::2])
    assert model.lambdas() == [0.0] * 3  # nothing is subtracted at first, and both terms of lambda learn
    model.blocks[0].attn.current_lambda().backward()
    assert model.blocks[0].attn.lambda_q1.grad.abs().sum() > 0


def test_conversion_is_asked_for_and_of_one_width() -> None:
    plain = random_model(PLAIN)
    model = VisionTransformer(dataclasses.replace(PLAIN, variant="diff_v2"))
    assert is_plain(plain.state_dict())
    assert not is_plain(model.state_dict())
    with pytest.raises(ValueError, match=r"missing: blocks\.0\.attn\.lambda_proj\.weight"):
        load_weights(model, plain.state_dict())
    wide = VisionTransformer(dataclasses.replace(PLAIN, variant="diff_v2", embed_dim=96))
    with pytest.raises(ValueError, match=r"converts to a model of its own width; .* has 144 rows, embed_dim = 96"):
        load_weights(wide, plain.state_dict(), from_plain=True)


def test_layers_learn_at_decaying_rates() -> None:
    model = VisionTransformer(PLAIN)
    optimizer = build_optimizer(model, OptimConfig(lr=1.0, layer_decay=0.5))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(rates) == len(names)
    assert rates["head.weight"] == (1.0, 0.05)
    assert rates["norm.weight"] == (1.0, 0.0)
    assert rates["blocks.2.mlp.fc1.weight"] == (0.5, 0.05)
    assert rates["blocks.0.attn.qkv.bias"] == (0.125, 0.0)
    assert rates["patch_embed.proj.weight"] == (0.0625, 0.05)
    assert rates["pos_embed"] == (0.0625, 0.0)


def test_one_rate_makes_two_groups_as_before() -> None:
    groups = build_optimizer(VisionTransformer(PLAIN), OptimConfig(lr=0.3)).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.3, 0.05), (0.3, 0.0)]


@pytest.mark.parametrize(
    ("variant", "heads", "right"), [("diff_v2", 3, 6), ("diff_v2", 12, 6), ("diff", 6, 3), ("softmax", 3, 6)]
)
def test_heads_that_would_be_cut_otherwise_are_refused(tmp_path: Path, variant: Any, heads: int, right: int) -> None:
    """Every tensor has the same shape for any number of them."""
    folder = save_trained(tmp_path / "plain", random_model(PLAIN))
    model = VisionTransformer(dataclasses.replace(PLAIN, variant=variant, num_heads=heads))
    with pytest.raises(ValueError, match=rf"model\.num_heads = {right}, got {heads}"):
        load_weights(model, folder, from_plain=True)
    load_weights(
        VisionTransformer(dataclasses.replace(PLAIN, variant=variant, num_heads=right)), folder, from_plain=True
    )


def test_sincos_positions_are_those_of_the_trained_size(tmp_path: Path) -> None:
    """A model that goes on at 40 px is the one of 20 px shown images of 40 px."""
    config = dataclasses.replace(PLAIN, pos_embed="sincos2d")
    trained = random_model(config)
    folder = save_trained(tmp_path / "sincos", trained)
    shape = model_from(origin_of(str(folder)))
    assert shape.position_grid == 4
    larger = VisionTransformer(dataclasses.replace(shape, num_classes=7, image_size=40)).eval()
    load_weights(larger, folder)
    torch.testing.assert_close(larger(images(40)), trained(images(40)))
    fresh = VisionTransformer(dataclasses.replace(config, image_size=40))
    with pytest.raises(ValueError, match=r"needs model\.position_grid = 4, .* got None for a grid of 8"):
        load_weights(fresh, folder)


def save_trained(folder: Path, model: VisionTransformer, **fields: Any) -> Path:
    """A checkpoint as a run writes it."""
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    classes = [f"class {i}" for i in range(model.config.num_classes)]
    data = {"classes": classes, "mean": [0.1], "std": [0.2], "eval_crop_ratio": 1.0}
    write_manifest(folder, {"step": 1, "model": dataclasses.asdict(model.config), "data": data, **fields})
    return folder


def test_the_classifier_of_other_classes_is_not_kept(tmp_path: Path) -> None:
    source = random_model(PLAIN)
    folder = save_trained(tmp_path / "seven", source)
    same = tuple(f"class {i}" for i in range(7))
    model = VisionTransformer(PLAIN)
    report = load_weights(model, folder, replace_head=True, classes=same)
    assert str(report) == "their own classifier"
    assert torch.equal(model.head.weight, source.head.weight)
    model = VisionTransformer(PLAIN)
    own = model.head.weight.detach().clone()
    report = load_weights(model, folder, replace_head=True, classes=(*same[:6], "another"))
    assert str(report) == "a new classifier"
    assert torch.equal(model.head.weight, own)


def test_a_gate_that_was_part_open_when_saved_is_loaded_so(tmp_path: Path) -> None:
    v2 = dataclasses.replace(PLAIN, variant="diff_v2")
    model = random_model(v2)
    model.open_gates(0.25)
    folder = save_trained(tmp_path / "part", model, gate_opening=0.25)
    expected = model(images())
    torch.testing.assert_close(load_saved(folder).model(images()), expected)
    assert (VisionTransformer(v2).eval()(images()) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("train", "opening"), [("all", 1.0), ("head", 0.25)])
def test_gates_that_were_part_open_do_not_stay_so_in_a_run_that_starts_from_them(
    tmp_path: Path, tiny_config: RunConfig, train: str, opening: float
) -> None:
    """Nothing would open them further; a linear probe keeps its features."""
    v2 = dataclasses.replace(PLAIN, variant="diff_v2")
    folder = save_trained(tmp_path / "part", random_model(v2), gate_opening=0.25)
    config = dataclasses.replace(tiny_config, model=v2, init=InitConfig(weights=str(folder), train=train))
    model = VisionTransformer(v2)
    load_initial(model, config)
    assert model.gate_opening == opening


@pytest.fixture
def pretrained(tiny_config: RunConfig) -> RunConfig:
    """A finished run of a plain ViT."""
    dataset = open_dataset(tiny_config.data)
    config = with_fields(
        tiny_config,
        model={"variant": "softmax", "num_classes": 3},
        data={"classes": dataset.classes},
        optim={"epochs": 1},
    )
    train_alone(config, dataset)
    return config


def finetuned(pretrained: RunConfig, tmp_path: Path, **sections: dict[str, object]) -> tuple[RunConfig, dict, dict]:
    """Two classes of other images, from the run's weights: config, weights before and after."""
    images = make_folder(tmp_path / "two", images_per_class=12)
    for file in (images / "red").iterdir():
        file.unlink()
    (images / "red").rmdir()
    config = dataclasses.replace(pretrained, name="tuned")
    config = with_fields(config, data={"path": str(images), "classes": ("blue", "green")}, model={"num_classes": 2})
    config = with_fields(
        config,
        init={"weights": str(pretrained.folder), **sections.pop("init", {})},
        optim={"epochs": 2, "batch_size": 10},
        **sections,
    )
    results = train_alone(config, open_dataset(config.data))
    best = load_file(next(iter(sorted(pretrained.folder.glob("checkpoint*/model.safetensors")))))
    return config, best, load_file(config.folder / results["last"]["checkpoint"] / "model.safetensors")


@pytest.mark.slow
def test_linear_probe_trains_the_classifier_only(pretrained: RunConfig, tmp_path: Path) -> None:
    _, _, after = finetuned(pretrained, tmp_path, init={"train": "head"})
    reference = VisionTransformer(pretrained.model)
    load_weights(reference, pretrained.folder)
    before = reference.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith("head."))
    assert after["head.weight"].shape == (2, 16)


def test_a_probe_of_features_that_conversion_changes_is_refused(pretrained: RunConfig) -> None:
    config = with_fields(
        dataclasses.replace(pretrained, name="probe"),
        model={"variant": "diff_v2"},
        init={"weights": str(pretrained.folder), "train": "head"},
    )
    with pytest.raises(ValueError, match=r"train = 'head' keeps the features .* model.variant = 'diff_v2' they"):
        require_weights(config)
    with pytest.raises(RunStopped, match=r"take --model\.variant softmax"):
        train_alone(config, open_dataset(config.data))


def test_a_probe_of_a_v1_keeps_its_lambda(pretrained: RunConfig) -> None:
    v1 = with_fields(pretrained, model={"variant": "diff", "lambda_init": 0.5})
    dataset = open_dataset(v1.data)
    trained = dataclasses.replace(v1, name="v1", optim=dataclasses.replace(v1.optim, epochs=1, warmup_epochs=0.0))
    train_alone(resolve(trained, dataset), dataset)
    probe = with_fields(v1, init={"weights": str(trained.folder), "train": "head"})
    require_weights(probe)
    with pytest.raises(ValueError, match=r"trained with another lambda_init: leave that as it was, or train all of it"):
        require_weights(with_fields(probe, model={"lambda_init": 0.9}))


@pytest.mark.slow
def test_a_plain_run_goes_on_as_v2_at_another_size(pretrained: RunConfig, tmp_path: Path) -> None:
    config, before, after = finetuned(
        pretrained,
        tmp_path,
        model={"variant": "diff_v2", "image_size": 24},
        init={"gate_opening_steps": 4},
    )
    steps = {int(folder.name[-8:]): read_manifest(folder) for folder in config.folder.glob("checkpoint_step_*")}
    assert {step: manifest["gate_opening"] for step, manifest in steps.items()} == {
        step: (step - 1) / 4 for step in steps
    }
    assert after["pos_embed"].shape == (1, 36, 16)
    assert after["blocks.0.attn.qkv.weight"].shape == (64, 16)
    assert not torch.equal(after["blocks.0.attn.lambda_proj.weight"], torch.zeros(1, 16))
    assert before["pos_embed"].shape == (1, 16, 16)
    assert config.folder != pretrained.folder


def parse(*arguments: str) -> RunConfig:
    return parse_finetune_config("", list(arguments))[0]


def test_the_command_line_takes_the_model_from_the_weights(pretrained: RunConfig, tmp_path: Path) -> None:
    config = parse("--init.weights", str(pretrained.folder), "--data.path", "x", "--model.image-size", "24")
    assert config.model == dataclasses.replace(pretrained.model, num_classes=0, image_size=24)
    assert config.data.mean == ()  # the weights' own, which `resolve` finds
    again = tmp_path / "again.json"
    again.write_text(to_json(with_fields(config, model={"image_size": 48}, data={"path": "y"})))
    assert parse("--config", str(again)).model.image_size == 48
    # other weights than the file's: its model stays, what pixels are normalised by goes
    again.write_text(to_json(with_fields(config, model={"image_size": 48}, data={"mean": (0.1,), "std": (0.2,)})))
    assert parse("--config", str(again)).data.mean == (0.1,)
    other = parse("--config", str(again), "--init.weights", "elsewhere")
    assert (other.model.image_size, other.data.mean, other.init.weights) == (48, (), "elsewhere")
    told = parse("--config", str(again), "--init.weights", "elsewhere", "--data.mean", "0.3", "--data.std", "0.4")
    assert (told.data.mean, told.data.std) == ((0.3,), (0.4,))
    assert (config.name, config.optim.layer_decay) == ("finetune", 0.75)
    file = tmp_path / "vit_dwee_patch16_reg1_gap_256.sbb.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    assert parse(f"--init.weights={file}").model == TIMM_MODELS["vit_dwee_patch16_reg1_gap_256"]
    flowers = parse("flowers", f"--init.weights={file}")
    assert (flowers.name, flowers.model.num_classes, flowers.init.weights) == ("flowers", 102, str(file))
    assert flowers.data.mean == ()
    assert parse("flowers").data.mean == (0.5, 0.5, 0.5)
    assert parse("flowers").init.weights.startswith("hf-hub:timm/")


def test_a_sweep_takes_the_model_from_the_weights_too(pretrained: RunConfig) -> None:
    varied = ("--space.num-heads", "None", "--space.lr", "1e-4", "1e-3")
    sweep = parse_sweep_config("", ["finetune", "--init.weights", str(pretrained.folder), "--data.path", "x", *varied])
    assert (sweep.run.name, sweep.run.init.weights) == ("finetune-sweep", str(pretrained.folder))
    assert sweep.run.model == dataclasses.replace(pretrained.model, num_classes=0)
    # of another recipe it is the recipe's, as with pretrain.py, whatever the file says of its own
    other = parse_sweep_config("", ["cifar10", "--init.weights", "mine.safetensors", "--data.path", "x", *varied])
    assert (other.run.model, other.run.data.mean) == (RECIPES["cifar10"]().model, RECIPES["cifar10"]().data.mean)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "init.weights is missing"),
        (["--init.weights", "nowhere"], "must be a run, a checkpoint, a .safetensors file or hf-hub:NAME"),
        (["--init.weights", "hf-hub:someone/resnet50"], "says nothing of its model's shape"),
        (["--init.weights", "hf-hub:timm/vit_tiny_patch16_224", "--model.num-heads", "5"], "num_heads that fit"),
        (["--init.weights", "hf-hub:timm/vit_tiny_patch16_224", "--model.variant", "diff"], "its 3 are odd"),
    ],
)
def test_command_lines_that_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_the_hub_without_its_package_or_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="needs huggingface_hub"):
        load_weights(VisionTransformer(PLAIN), "hf-hub:timm/vit_tiny_patch16_224")


def test_weights_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    source = random_model(PLAIN)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    asked: list[tuple[str, str]] = []

    def downloads(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "hf_hub_download", downloads)
    model = VisionTransformer(PLAIN).eval()
    load_weights(model, "hf-hub:someone/plain")
    assert asked == [("someone/plain", "model.safetensors")]
    torch.testing.assert_close(model(images()), source(images()))
    # a name of timm's says how many heads there are
    with pytest.raises(ValueError, match=r"model\.num_heads = 12, got 6"):
        load_weights(model, "hf-hub:timm/vit_base_patch16_224.augreg_in1k")

    def offline(repository: str, file: str) -> str:
        raise hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(ValueError, match="hf-hub:someone/plain cannot be fetched: no network"):
        load_weights(model, "hf-hub:someone/plain")


def test_known_shapes_are_timms() -> None:
    timm = pytest.importorskip("timm")
    for name, config in TIMM_MODELS.items():
        with torch.device("meta"):
            theirs = timm.create_model(name).state_dict()
            ours = VisionTransformer(dataclasses.replace(config, num_classes=1000)).state_dict()
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}, name
        for published in timm.list_models(f"{name}.*", pretrained=True):
            cfg, origin = timm.get_pretrained_cfg(published), origin_by_name(f"hf-hub:timm/{published}")
            assert origin is not None
            assert origin.model == config, published
            assert (origin.mean, origin.std) == (tuple(cfg.mean), tuple(cfg.std)), published


def test_the_file_names_the_model_and_not_the_folder_around_it() -> None:
    mae = origin_by_name("vit_base_patch16_224/vit_base_patch16_224.mae.safetensors")
    assert mae == origin_by_name("vit_base_patch16_224.mae.safetensors") != origin_by_name("vit_base_patch16_224")
    (larger,) = {name for name in TIMM_MODELS if name.startswith("vit_small_patch16_384")}
    found = origin_by_name(f"/data/vit_small_patch16_224-backup/{larger}.augreg.safetensors")
    assert found is not None
    assert found.model.image_size == 384
    assert origin_by_name("models--timm--vit_base_patch16_224.mae/snapshots/0a1b/model.safetensors") == mae


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_224_mae.safetensors", "vit_base_patch16_224-mae", "samvit_base_patch16_224.sa1b"]
)
def test_a_name_that_only_holds_that_of_a_model_is_no_origin(name: str, tmp_path: Path) -> None:
    """Its pixels may have been normalised otherwise."""
    assert origin_by_name(f"/data/{name}") is None
    assert origin_by_name("vit_base_patch16_224_in21k.safetensors") == origin_by_name("vit_base_patch16_224")
    (tmp_path / name).touch()
    with pytest.raises(
        UnknownOriginError,
        match="says nothing of its model's shape; give the file one of these names, before a dot: vit_",
    ):
        origin_of(str(tmp_path / name))


def test_origin_of_a_damaged_checkpoint(pretrained: RunConfig) -> None:
    (checkpoint, *_) = pretrained.folder.glob("checkpoint_step_*")
    (checkpoint / "checkpoint.json").write_text('{"model": {"variant": "softmacks"}}')
    with pytest.raises(ValueError, match="of another version"):
        origin_of(str(checkpoint))
    (checkpoint / "checkpoint.json").write_text("{")
    with pytest.raises(ValueError, match=r"is damaged: checkpoint\.json cannot be read"):
        origin_of(str(checkpoint))


@pytest.mark.slow
def test_the_normalisation_is_that_of_the_weights(pretrained: RunConfig) -> None:
    """The first layer computes on the pixels that it was trained on, whatever the new images' own statistics are."""
    config = with_fields(pretrained, data={"mean": (), "std": ()})
    dataset = dataclasses.replace(open_dataset(config.data), mean=(0.4,), std=(0.3,))
    assert resolve(config, dataset).data.mean == (0.4,)
    tuned = with_fields(config, init={"weights": str(pretrained.folder)})
    resolved = resolve(tuned, dataset).data
    assert (resolved.mean, resolved.std) == (pretrained.data.mean, pretrained.data.std)
    assert resolve(with_fields(tuned, data={"mean": (0.7,), "std": (0.6,)}), dataset).data.mean == (0.7,)


@pytest.mark.slow
def test_a_run_goes_on_without_the_weights_that_it_began_from(
    pretrained: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without what they alone knew, their images' mean and deviation."""
    begun: list[RunConfig] = []
    monkeypatch.setattr(launch, "_train", lambda config, *_: begun.append(config) or {})
    tuned = with_fields(
        dataclasses.replace(pretrained, name="tuned"),
        data={"mean": (), "std": ()},
        init={"weights": str(pretrained.folder)},
    )
    launch.train(tuned)
    (tuned.folder / "checkpoint_step_00000003").mkdir()
    shutil.rmtree(pretrained.folder)
    launch.train(tuned)
    assert begun[1] == begun[0]
    assert begun[0].data.mean == pretrained.data.mean
    with pytest.raises(ValueError, match=r"init\.weights .* does not exist"):
        launch.train(dataclasses.replace(tuned, name="anew"))


def test_weights_of_a_model_with_other_channels_are_named(pretrained: RunConfig) -> None:
    grey = with_fields(pretrained, model={"in_channels": 1}, init={"weights": str(pretrained.folder)})
    grey = with_fields(grey, data={"mean": (), "std": ()})
    with pytest.raises(ValueError, match=r"are of a model of 3 channels, so model.in_channels must be 3, got 1"):
        resolve(grey, open_dataset(grey.data))


@pytest.mark.slow
def test_what_became_of_the_weights_is_said(pretrained: RunConfig) -> None:
    config = with_fields(
        dataclasses.replace(pretrained, name="v2"),
        model={"variant": "diff_v2"},
        init={"weights": str(pretrained.folder), "gate_opening_steps": 2},
        optim={"epochs": 1},
    )
    heard: list[str] = []
    train_alone(config, open_dataset(config.data), lambda kind, fields: heard.append(str(fields.get("message"))))
    (said,) = [line for line in heard if line.startswith("started from")]
    assert said.endswith("tiny: converted from a plain ViT, their own classifier")
    # the gates of a V2 have learned when to be open: they are not closed again
    again = with_fields(dataclasses.replace(config, name="again"), init={"weights": str(config.folder)})
    with pytest.raises(RunStopped, match=r"gate_opening_steps is for a plain ViT's weights"):
        train_alone(again, open_dataset(again.data))
