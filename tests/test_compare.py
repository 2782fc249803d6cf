"""The comparison as a user runs it: arms that differ as stated, trained once, and a report of them."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from conftest import with_fields

from diffvit.analysis.comparison import CompareOptions, compare
from diffvit.arms import ArmRoom, _outcome, _train_arm, arm_configs, train_arms
from diffvit.cli import parse_compare_config
from diffvit.compare import CompareConfig, run_comparison
from diffvit.config import RunConfig, differing_fields, to_json
from diffvit.data.datasets import open_dataset
from diffvit.models.vit import VisionTransformer
from diffvit.recipes import RECIPES
from diffvit.training.alone import train_alone
from diffvit.training.loop import RunStopped
from diffvit.training.resolve import resolve

JOB = Path(__file__).parents[1] / "ray_jobs/compare.py"
QUICK = CompareOptions(batch_size=8, resamples=100, speed_rounds=2)


def quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("recipe", ["sample", "sample-vit", "sample-v2", "folder"])
def test_arms_have_the_same_parameters_and_recipe(recipe: str) -> None:
    arms = arm_configs(RECIPES[recipe]())
    counts = {
        name: sum(p.numel() for p in VisionTransformer(dataclasses.replace(arm.model, num_classes=10)).parameters())
        for name, arm in arms.items()
    }
    for count in counts.values():
        assert count == pytest.approx(counts["plain"], rel=0.01)
    for arm in arms.values():
        assert set(differing_fields(arms["plain"], arm)) <= {"model.variant", "model.num_heads", "model.mlp_ratio"}
    assert [arm.model.variant for arm in arms.values()] == ["softmax", "diff", "diff_v2"]
    assert arms["plain"].model.num_heads == arms["v2"].model.num_heads == 2 * arms["v1"].model.num_heads


def test_the_mlp_of_the_recipe_is_that_of_the_plain_vit() -> None:
    ratios = [
        [arm.model.mlp_ratio for arm in arm_configs(RECIPES[name]()).values()] for name in ("sample", "deit-s16-v2")
    ]
    assert ratios == [[2.0, 2.0, 1.5], [4.0, 4.0, 3.5]]


def test_odd_heads_are_refused() -> None:
    recipe = RECIPES["sample-vit"]()
    with pytest.raises(ValueError, match=r"model\.num_heads must be even, got 3"):
        arm_configs(with_fields(recipe, model={"num_heads": 3}))


def test_arms_are_kept_below_out_or_where_storage_says(tmp_path: Path) -> None:
    earlier = tmp_path / "config.json"
    earlier.write_text(to_json(dataclasses.replace(RECIPES["sample"](), storage="/elsewhere", seed=3)))
    config = parse_compare_config("", ["--config", str(earlier), "--out", str(tmp_path / "out")])
    assert config.recipe.storage == str(tmp_path / "out" / "runs")
    for storage in ("s3://bucket/arms", "runs"):
        assert parse_compare_config("", ["sample", "--storage", storage]).recipe.storage == storage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "mine"], "takes no --name, got 'mine': --out names the comparison"),
        (["--seed", "3"], "takes no --seed, got 3: --seeds N"),
        (["--scale.workers", "4"], "takes no --scale.workers, got 4: an arm has one"),
        (["--runs", "a", "b", "--optim.lr", "1.0"], "as they were trained, got optim.lr too"),
    ],
)
def test_options_that_would_not_be_heeded_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_compare_config("", ["sample", *arguments])
    assert message in capsys.readouterr().err


def test_arms_that_saw_other_images_are_refused_before_any_is_trained(tiny_config: RunConfig) -> None:
    """Also those that are trained already; and so are finished runs whose validation images have changed."""
    recipe = with_fields(tiny_config, model={"num_heads": 1, "num_classes": 3})
    arm = dataclasses.replace(arm_configs(recipe)["plain"], name="plain-seed0")
    dataset = open_dataset(recipe.data)
    train_alone(resolve(arm, dataset), dataset)
    image = next(Path(recipe.data.path).glob("val/*/*.png"))
    image.rename(image.with_name("another.png"))
    with pytest.raises(ValueError, match=r"plain-seed0 was begun with 15 validation images, .* has 15 now, but with"):
        train_arms(recipe, 1, ArmRoom(), quiet)
    with pytest.raises(ValueError, match=r"init.weights must be empty: the arms are compared from scratch"):
        train_arms(with_fields(recipe, init={"weights": "runs/plain"}), 1, ArmRoom(), quiet)
    config = CompareConfig(run=recipe, runs=(str(arm.folder),), out=str(arm.folder.parent / "out"))
    with pytest.raises(ValueError, match=r"run 'plain-seed0' was begun with 15 validation images"):
        run_comparison(config, quiet)
    assert not Path(config.out).exists()


@pytest.mark.slow
def test_images_are_drawn_and_no_other_comparison_is_overwritten(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image folder lies class by class: the first of it are of one class, and so would be the batches of CKA."""
    recipe = with_fields(tiny_config, model={"num_heads": 1, "num_classes": 3}, optim={"epochs": 1})
    arm = dataclasses.replace(arm_configs(recipe)["plain"], name="plain-seed0", storage=str(tmp_path / "a"))
    dataset = open_dataset(recipe.data)
    train_alone(resolve(arm, dataset), dataset)
    labels: list[list[int]] = []

    def comparing(arms: Any, batches: Any, *rest: Any) -> Any:
        batches = list(batches)
        labels.append([label for batch in batches for label in batch.labels.tolist()])
        return compare(arms, batches, *rest)

    monkeypatch.setattr("diffvit.compare.compare", comparing)
    out = tmp_path / "out"
    config = CompareConfig(recipe, out=str(out), runs=(str(arm.folder),), compare=QUICK)
    run_comparison(config, quiet)
    run_comparison(config, quiet)
    drawn, again = labels
    assert drawn == again != sorted(drawn)
    assert sorted(drawn) == sorted(dataset.val.labels.tolist())
    assert json.loads((out / "compare.json").read_text())["arms"]["plain ViT"]["sources"] == [str(arm.folder)]

    moved = shutil.copytree(arm.folder, tmp_path / "b/plain-seed0")
    with pytest.raises(ValueError, match=rf"other runs, among them seed 0 of 'plain ViT' in {arm.folder}; choose"):
        run_comparison(dataclasses.replace(config, runs=(str(moved),)), quiet)
    (out / "compare.json").write_text('{"arms": ')
    with pytest.raises(ValueError, match=r"out/compare\.json is damaged; delete it, or choose another --out"):
        run_comparison(config, quiet)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
class TestRuns:
    @pytest.fixture
    def config(self, tiny_config: RunConfig, tmp_path: Path) -> CompareConfig:
        return CompareConfig(tiny_config, out=str(tmp_path / "out"), seeds=2, compare=QUICK)

    def test_trains_compares_and_does_not_train_twice(
        self, config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        report = run_comparison(config, quiet)
        out = Path(config.out)
        assert report == out / "report.html"
        result = json.loads((out / "compare.json").read_text())
        assert list(result["arms"]) == ["plain ViT", "Diff-ViT V1", "Diff-ViT V2"]
        assert all(arm["seeds"] == [0, 1] for arm in result["arms"].values())
        storage = Path(config.recipe.storage)
        assert result["arms"]["plain ViT"]["sources"] == [str(storage / f"plain-seed{seed}") for seed in (0, 1)]
        runs = sorted(path.name for path in storage.iterdir())
        assert runs == [f"{arm}-seed{seed}" for arm in ("plain", "v1", "v2") for seed in (0, 1)]
        for run in runs:
            last = json.loads((storage / run / "results.json").read_text())["last"]
            arm = {"plain": "plain ViT", "v1": "Diff-ViT V1", "v2": "Diff-ViT V2"}[run.split("-")[0]]
            assert result["arms"][arm]["top1"]["per_seed"][int(run[-1])] == pytest.approx(last["top1"])
        assert list((out / "tensorboard").glob("events.*"))
        finished = {run: (storage / run / "results.json").stat().st_mtime_ns for run in runs}
        train_arms(config.recipe, config.seeds, config.room, quiet)
        assert finished == {run: (storage / run / "results.json").stat().st_mtime_ns for run in runs}

        fewer = dataclasses.replace(config, runs=tuple(str(storage / f"{arm}-seed0") for arm in ("plain", "v1")))
        with pytest.raises(
            ValueError, match=r"has a report of other runs, among them seed 1 of 'plain ViT' in /.*/plain-seed1; choose"
        ):
            run_comparison(fewer, lambda *_: pytest.fail("measured"))
        wider = with_fields(config.recipe, optim={"lr": 0.5})
        with pytest.raises(
            ValueError, match=r"plain-seed0 was trained by another config; choose another --out:\n  optim"
        ):
            train_arms(wider, config.seeds, config.room, quiet)
        # the same runs, given by name, without one seed of an arm
        chosen = [str(storage / run) for run in runs if run != "v1-seed1"]
        given = dataclasses.replace(config, runs=tuple(chosen), out=str(tmp_path / "given"))
        options = ["--runs", *chosen, "--out", given.out, "--compare.batch-size", "8", "--compare.resamples", "100"]
        monkeypatch.setattr(sys, "argv", [str(JOB), *options, "--compare.speed-rounds", "2"])
        runpy.run_path(str(JOB), run_name="__main__")  # as it is typed
        again = json.loads((tmp_path / "given/compare.json").read_text())
        assert again["arms"]["plain ViT"]["top1"] == result["arms"]["plain ViT"]["top1"]
        assert again["arms"]["Diff-ViT V1"]["seeds"] == [0]
        assert again["arms"]["Diff-ViT V1"]["top1_difference"]["paired_by_seed"] is False

    def test_a_run_that_diverges_is_named_when_the_others_are_done(self, config: CompareConfig) -> None:
        run = with_fields(config.run, optim={"lr": 1e30, "warmup_epochs": 0.0, "clip_norm": 0.0})
        with pytest.raises(RunStopped, match=r"6 of 6 runs stopped: .*v1-seed0: the .* not finite"):
            run_comparison(dataclasses.replace(config, run=run), quiet)

    def test_what_ends_an_arm_is_said_of_that_arm(self, config: CompareConfig) -> None:
        """Wrong input, and a process that is lost: neither reaches the user as Ray's traceback, nor ends the others."""
        run = with_fields(config.run, optim={"warmup_epochs": 0.0, "warmup_steps": 10_000})
        with pytest.raises(RunStopped, match=r"3 of 3 runs stopped: .*v1-seed0: optim\.warmup_steps must not exceed"):
            run_comparison(dataclasses.replace(config, run=run, seeds=1), quiet)

        def lost() -> None:
            os._exit(1)

        def broken() -> None:
            raise TypeError("a defect of ours")

        assert "worker" in (_outcome(ray.remote(max_retries=0)(lost).remote())[0] or "")
        assert _outcome(ray.remote(broken).remote()) == ("TypeError: a defect of ours", [])

    def test_what_an_arm_says_and_a_folder_that_its_node_does_not_see(
        self, config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
        run = resolve(with_fields(config.run, scale={"precision": "bf16"}), open_dataset(config.run.data))
        Path(run.storage).mkdir()
        reason, messages = _train_arm(to_json(run), open_dataset(run.data))
        assert reason is None
        assert "would emulate bf16" in messages[0]
        assert _train_arm(to_json(run), open_dataset(run.data)) == (None, [])  # nothing was trained, nothing is said
        arm = dataclasses.replace(config.run, storage=str(tmp_path / "not here"))
        assert "its node does not see" in (_train_arm(to_json(arm), open_dataset(arm.data))[0] or "")

    def test_a_cluster_without_gpus_is_refused(self, config: CompareConfig) -> None:
        run = with_fields(config.run, scale={"gpu": True})
        with pytest.raises(ValueError, match=r"each arm needs 1 GPU; the cluster has 0; leave --scale\.gpu out"):
            run_comparison(dataclasses.replace(config, run=run), quiet)

    def test_an_unfinished_run_is_refused(self, config: CompareConfig, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="is not a finished run"):
            run_comparison(dataclasses.replace(config, runs=(str(tmp_path),)), quiet)
        assert ray.is_initialized()
