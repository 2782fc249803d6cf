import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import with_fields

from diffvit.cli import job_ends, parse_finetune_config, parse_pretrain_config, parse_sweep_config
from diffvit.config import (
    ModelConfig,
    RehearsalOptions,
    RunConfig,
    differing_fields,
    from_json,
    model_preset,
    to_json,
    valid_num_heads,
)
from diffvit.recipes import RECIPES
from diffvit.storage import StorageError


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_valid_and_round_trip(recipe: str) -> None:
    config = RECIPES[recipe]()
    assert from_json(to_json(config), "test") == config


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"num_heads": 5}}, r"divisible by 2 x model.num_heads .* num_heads that fit: \[1\]"),
        ({"model": {"patch_size": 5}}, "patch_size must divide model.image_size, got 5 and 16"),
        ({"model": {"mlp_ratio": 0.01}}, "must be at least 1 and finite, got 0.01 x 16"),
        ({"optim": {"lr": float("inf")}}, "optim.lr must be positive and finite, got inf"),
        ({"model": {"in_channels": 2}}, "in_channels must be 1 or 3, got 2"),
        ({"model": {"pool": "token"}}, "must be 'avg' when model.class_token is off"),
        ({"model": {"lambda_init": 1.0}}, r"lambda_init must be 'depth' or a constant in \[0, 1\), got 1.0"),
        ({"model": {"lambda_max": -0.5}}, "lambda_max must be positive, got -0.5"),
        (
            {"model": {"variant": "softmax", "lambda_max": 0.5}},
            "lambda_max is for V1 alone, got 0.5",
        ),
        ({"model": {"variant": "diff_v2", "head_norm": "layer"}}, "got 'layer' for model.variant = 'diff_v2'"),
        ({"augment": {"repeats": 0}}, "repeats must be at least 1, got 0"),
        ({"model": {"drop_path": 1.0}}, r"drop_path must be in \[0, 1\)"),
        ({"model": {"depth": 0}}, "depth must be at least 1"),
        ({"data": {"val_fraction": 1.0}}, "val_fraction must be between 0 and 1"),
        ({"data": {"mean": (0.5, 0.5), "std": (1.0, 1.0)}}, "must have 1 or model.in_channels = 3 values"),
        ({"data": {"std": (0.0,)}}, "std must be positive"),
        ({"augment": {"crop_scale": (0.9, 0.5)}}, "0 < low <= high <= 1"),
        ({"augment": {"flip": 1.5}}, "flip is a probability"),
        ({"optim": {"lr": 0.0}}, "lr must be positive"),
        ({"optim": {"warmup_epochs": 3.0}}, "between 0 and optim.epochs = 2, got 3.0"),
        ({"optim": {"warmup_steps": 5}}, "instead of optim.warmup_epochs, which must then be 0; got 5 and 1"),
        ({"optim": {"batch_size": 0}}, "batch_size must be at least 1"),
        ({"augment": {"mixup": 0.2}, "optim": {"batch_size": 9}}, r"must be even \(9 / 1 = 9\)"),
        ({"augment": {"rand_augment_layers": 2, "auto_augment": "svhn"}}, "exclude each other, got 'svhn' and 2"),
        ({"augment": {"policy_fill": (0, 256, 0)}}, r"policy_fill must be in 0..255, got \(0, 256, 0\)"),
        (
            {"augment": {"policy_fill": (1, 2, 3)}, "model": {"in_channels": 1}},
            r"policy_fill is a colour, \(1, 2, 3\), so model.in_channels must be 3, got 1: give one grey level",
        ),
        ({"augment": {"color_jitter": -0.1}}, "color_jitter must not be negative"),
        (
            {"scale": {"workers": 5}},
            "must divide optim.batch_size, got 5 and 12; the nearest batch sizes are 10 and 15",
        ),
        ({"scale": {"micro_batch_size": 1}, "augment": {"mixup": 0.2}}, "micro_batch_size at least 2, got 1"),
        (
            {"scale": {"micro_batch_size": 64}, "optim": {"batch_size": 998}},
            r"divide a worker's share of the batch, 998 images, .* got 64; the nearest .* for 64 are 960 and 1024",
        ),
        (
            {"scale": {"micro_batch_size": 8, "workers": 2}, "optim": {"batch_size": 22}},
            r"share of the batch, 11 images, or be .* twice a number .* got 8; the nearest .* for 8 are 16 and 32",
        ),
        (
            {"scale": {"micro_batch_size": 5}, "optim": {"batch_size": 6}, "augment": {"mixup": 0.2}},
            r"share of the batch, 6 images, or be .* twice an even .* got 5; the nearest .* for 4 are 4 and 8",
        ),
        (
            {"scale": {"micro_batch_size": 8, "workers": (1, 2)}, "optim": {"batch_size": 22}},
            r"workers = \(1, 2\) must hold a number .*micro_batch_size = 8 or half of that at least",
        ),
        (
            {"init": {"weights": "x", "train": "head", "gate_opening_steps": 3}, "model": {"variant": "diff_v2"}},
            "gate_opening_steps changes what the model computes",
        ),
        (
            {"scale": {"workers": (1, 4)}, "init": {"gate_opening_steps": 3, "weights": "x"}},
            "is for model.variant = 'diff_v2'",
        ),
        ({"scale": {"workers": (3, 2)}}, r"at least 1, or two numbers in order, got \(3, 2\)"),
        ({"scale": {"workers": (5, 5)}}, r"\(5, 5\) must hold a number that divides optim.batch_size = 12"),
        ({"scale": {"workers": (12, 99)}, "augment": {"mixup": 0.5}}, "even ones where images are mixed"),
        ({"scale": {"max_preemptions": -2}}, "max_preemptions must be -1 or more, got -2"),
        ({"checkpoint": {"every_steps": 0}}, "every_steps must be at least 1"),
        ({"checkpoint": {"every_minutes": 0.0}}, "every_minutes must be positive, got 0.0"),
        ({"checkpoint": {"keep_last": 0}}, "keep_last must be at least 1, got 0"),
        ({"checkpoint": {"keep_every_epochs": 0}}, "keep_every_epochs must be at least 1, got 0"),
        ({"optim": {"max_skipped_steps": -1}}, "max_skipped_steps must not be negative"),
        ({"checkpoint": {"retry_minutes": float("inf")}}, "^checkpoint.retry_minutes must be finite, got inf"),
        ({"model": {"init_values": float("nan")}}, "^model.init_values must be finite, got nan"),
        ({"data": {"mean": (float("nan"),)}}, r"^data.mean must be finite, got \(nan,\)"),
        ({"scale": {"cpus_per_worker": 1e-5}}, "cpus_per_worker must be at least 0.0001, and finite, got 1e-05"),
        ({"scale": {"cpus_per_worker": float("inf")}}, "cpus_per_worker must be at least 0.0001, and finite, got inf"),
    ],
)
def test_impossible_combinations_say_rule_and_value(tiny_config: RunConfig, sections, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_fields(tiny_config, **sections)


@pytest.mark.parametrize(
    "fields", [{"name": "a/b"}, {"name": ".."}, {"name": ""}, {"storage": "ftp://host"}, {"seed": -1}]
)
def test_run_fields_are_checked(tiny_config: RunConfig, fields) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        dataclasses.replace(tiny_config, **fields)


def test_json_refuses_what_it_does_not_know() -> None:
    data = json.loads(to_json(RunConfig()))
    data["optim"]["learning_rate"] = 1.0
    with pytest.raises(ValueError, match=r"best.json is not a run config.*optim.learning_rate: Unexpected"):
        from_json(json.dumps(data), "best.json")
    with pytest.raises(ValueError, match="not a run config"):
        from_json("{", "best.json")


def test_differing_fields_ignore_what_a_sitting_may_change(tiny_config: RunConfig) -> None:
    moved = with_fields(tiny_config, scale={"workers": 3}, checkpoint={"every_steps": 5})
    assert differing_fields(tiny_config, dataclasses.replace(moved, storage="elsewhere")) == {}
    limits = with_fields(tiny_config, data={"max_skipped_fraction": 0.5}, optim={"max_rollbacks": 9})
    assert differing_fields(tiny_config, limits) == {}
    assert len(differing_fields(tiny_config, limits, limits=True)) == 2
    other = with_fields(dataclasses.replace(tiny_config, seed=4), optim={"lr": 1.0})
    assert differing_fields(tiny_config, other) == {"seed": (0, 4), "optim.lr": (3e-3, 1.0)}


def test_presets_halve_the_heads_of_v1() -> None:
    heads = {
        size: [model_preset(size, v).num_heads for v in ("softmax", "diff", "diff_v2")] for size in ("tiny", "base")
    }
    assert heads == {"tiny": [3, 2, 3], "base": [12, 6, 12]}
    assert model_preset("small", "diff", depth=3).depth == 3


def test_valid_num_heads() -> None:
    assert valid_num_heads(96, "diff") == [1, 2, 3, 4, 6]
    assert valid_num_heads(96, "softmax") == [1, 2, 3, 4, 6, 8, 12]
    for heads in valid_num_heads(96, "diff"):
        ModelConfig(embed_dim=96, num_heads=heads)


def test_command_line_starts_from_a_recipe_and_applies_options() -> None:
    arguments = ["sample-vit", "--optim.lr", "3e-4", "--model.reg-tokens", "2", "--no-resume"]
    config, _ = parse_pretrain_config("", arguments)
    assert (config.model.variant, config.optim.lr, config.model.reg_tokens) == ("softmax", 3e-4, 2)
    assert not config.resume
    assert parse_pretrain_config("", [])[0] == RECIPES["sample"]()


def test_command_line_starts_from_a_file(tmp_path) -> None:
    file = tmp_path / "config.json"
    file.write_text(to_json(RECIPES["sample-v2"]()))
    for arguments in (["--config", str(file), "--seed", "3"], ["--seed=3", f"--config={file}"]):
        config = parse_pretrain_config("", arguments)[0]
        assert (config.model.variant, config.seed) == ("diff_v2", 3)


def test_a_run_that_was_moved_goes_on_where_it_lies(tmp_path) -> None:
    config = dataclasses.replace(RECIPES["sample"](), storage=str(tmp_path / "old"))
    for folder, storage in (("new/sample", "new"), ("old/sample", "old"), ("copies/mine", "old")):
        file = tmp_path / folder / "config.json"
        file.parent.mkdir(parents=True)
        file.write_text(to_json(config))
        assert parse_pretrain_config("", ["--config", str(file)])[0].storage == str(tmp_path / storage)
    file.write_text(to_json(dataclasses.replace(config, storage="s3://bucket/runs", name="mine")))
    assert parse_pretrain_config("", ["--config", str(file)])[0].storage == "s3://bucket/runs"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smaple"], "did you mean 'sample'?"),
        (["--optim.warmpu-epochs", "1"], "--optim.warmup-epochs"),
        (["--optim.lr", "fast"], "could not convert string to float: 'fast'"),
        (["--model.num-heads", "7"], "got 96 and num_heads=7"),
        (["--config"], "--config needs a file"),
        (["--config", "nowhere.json"], "must name a JSON file"),
    ],
)
def test_wrong_command_lines_end_with_status_2_and_a_hint(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        parse_pretrain_config("", arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("workers", "micro_batch_size", "mixup", "counts", "steps"),
    [
        (3, None, 0.0, (3,), [1]),
        (3, 2, 0.0, (3,), [2]),
        ((2, 7), None, 0.0, (2, 3, 4, 6), [3, 2, 3, 1]),  # as with 6 workers, two images at once and no more
        ((1, 4), None, 0.3, (1, 2, 3), [3, 3, 1]),
        (1, 5, 0.0, (1,), [3]),
        ((1, 4), 5, 0.0, (1, 2, 3, 4), [3, 2, 1, 1]),  # shares of 12, 6, 4, 3 in micro-batches of 4, 3, 4, 3
        ((1, 4), 5, 0.3, (1, 3), [3, 1]),  # even ones only, so that 2 workers would take micro-batches of 2
    ],
)
def test_numbers_of_workers_that_a_run_can_have(
    tiny_config: RunConfig, workers, micro_batch_size, mixup, counts, steps
) -> None:
    scale = {"workers": workers, "micro_batch_size": micro_batch_size}
    config = with_fields(tiny_config, scale=scale, augment={"mixup": mixup})
    assert config.worker_counts == counts
    assert [config.accumulation_steps_of(count) for count in counts] == steps
    assert from_json(to_json(config), "") == config


def test_workers_on_the_command_line() -> None:
    assert parse_pretrain_config("", ["sample", "--scale.workers", "4"])[0].scale.workers == 4
    assert parse_pretrain_config("", ["sample", "--scale.workers", "1", "4"])[0].scale.workers == (1, 4)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("x must be 1, got 2"), 2, "error: x must be 1, got 2\n"),
        (RuntimeError("it stopped"), 1, "error: it stopped\n"),
        (OSError("disk gone"), 1, "error: disk gone; the same command goes on from here\n"),
        (StorageError("store away"), 1, "error: store away; the same command goes on from here\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; the same command goes on from here\n"),
    ],
)
def test_jobs_end_with_one_line_and_a_status(error: BaseException, status: int, said: str, capsys) -> None:
    with pytest.raises(SystemExit) as end, job_ends("from here", RuntimeError):
        raise error
    assert (end.value.code, capsys.readouterr().err) == (status, said)


def test_a_defect_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(KeyError), job_ends("from here", RuntimeError):
        raise KeyError("bug")


def test_help_of_a_recipe_says_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_pretrain_config("", ["cifar100-v2", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "prepare.py --source torchvision:CIFAR100 --root DIR --download --out cifar100" in shown
    assert "What differs" in shown
    with pytest.raises(SystemExit):
        parse_pretrain_config("", ["--help"])
    shown = capsys.readouterr().out
    assert "deit-s16: " in shown
    assert "deit-s16-v1: " not in shown


def test_the_recipe_for_fine_tuning_wants_weights(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_pretrain_config("", ["finetune", "--data.path", "images"])
    assert "init.weights is missing" in capsys.readouterr().err


def test_a_sweep_is_not_in_the_way_of_its_recipes_run(tmp_path: Path) -> None:
    assert parse_sweep_config("", ["sample"]).run.name == "sample-sweep"
    assert parse_sweep_config("", ["sample", "--name", "mine"]).run.name == "mine"
    (tmp_path / "config.json").write_text(to_json(RECIPES["sample"]()))
    assert parse_sweep_config("", ["--config", str(tmp_path / "config.json")]).run.name == "sample"


def test_a_recipe_behind_the_options_is_told_to_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_pretrain_config("", ["--seed", "1", "sample-vit"])
    assert capsys.readouterr().err.startswith("error: the recipe comes before the options, got 'sample-vit' after '1'")
    assert parse_pretrain_config("", ["--name", "sample-vit"])[0].name == "sample-vit"


def test_help_leaves_signals_as_they_were() -> None:
    before = signal.getsignal(signal.SIGPIPE)
    with pytest.raises(SystemExit):
        parse_pretrain_config("", ["--help"])
    assert signal.getsignal(signal.SIGPIPE) == before


def test_help_may_be_cut_short() -> None:
    command = f"{sys.executable} ray_jobs/pretrain.py --help | true"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=60
    )
    assert done.stderr == ""


def test_a_fine_tune_can_be_rehearsed_and_its_recipe_misspelt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_finetune_config("", ["flowres", "--data.path", "images"])
    assert "unknown recipe 'flowres'; did you mean 'flowers'?" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(to_json(RECIPES["flowers"]()))
    config, rehearsal = parse_finetune_config("", ["--config", str(tmp_path / "config.json"), "--rehearse"])
    assert (config, rehearsal) == (RECIPES["flowers"](), RehearsalOptions(rehearse=True))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_is_one_that_torch_takes(tiny_config: RunConfig, seed: int) -> None:
    torch.manual_seed(dataclasses.replace(tiny_config, seed=2**63 - 1).seed)
    with pytest.raises(ValueError, match=f"seed must be from 0 to .*, got {seed}"):
        dataclasses.replace(tiny_config, seed=seed)


def test_a_rate_of_muon_is_refused_where_adamw_trains(tiny_config: RunConfig, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_pretrain_config("", ["sample", "--optim.muon-lr", "0.1"])
    assert ended.value.code == 2
    assert "optim.muon_lr is for optim.optimizer = 'muon', got 'adamw'" in capsys.readouterr().err
    old = with_fields(tiny_config, optim={"muon_lr": 0.1})  # written before that was refused
    (tmp_path / "config.json").write_text(to_json(old))
    assert parse_pretrain_config("", ["--config", str(tmp_path / "config.json")])[0] == old
