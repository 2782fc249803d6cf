"""Whole sweeps through Ray Tune: what a researcher gets, what a failed trial and a killed driver cost."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import with_fields
from ray.tune.schedulers import AsyncHyperBandScheduler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffvit.config import RunConfig, from_json
from diffvit.data.sources import open_dataset
from diffvit.data.subset import parted_for_search
from diffvit.search.cluster import connect_for
from diffvit.search.config import SearchConfig, SweepConfig
from diffvit.search.folder import open_sweep
from diffvit.search.records import Journal, Record, ranked
from diffvit.search.sitting import Sitting, remind
from diffvit.search.space import Space
from diffvit.search.sweep import SweepFailed, run_sweep
from diffvit.training.launch import resolve

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@pytest.fixture
def sweep(tiny_config: RunConfig) -> SweepConfig:
    """Four trials of two epochs; without clipping, so that a hopeless learning rate diverges."""
    recipe = with_fields(tiny_config, optim={"clip_norm": 0.0, "warmup_epochs": 0.0})
    return SweepConfig(recipe, SearchConfig(trials=4, concurrent=2, finalists=2, seeds=2, holdout=0.2), Space())


def rows(sweep: SweepConfig) -> list[dict[str, str]]:
    with (sweep.run.folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_sweep_from_start_to_finish_and_on(sweep: SweepConfig, capsys: pytest.CaptureFixture[str]) -> None:
    results = run_sweep(sweep)
    folder = sweep.run.folder
    runs = rows(sweep)
    trials, finalists = ([r for r in runs if r["run"].startswith(kind)] for kind in ("trials", "finalists"))
    assert len(trials) == 4
    assert {run["status"] for run in trials} <= {"finished", "stopped"}
    assert (trials[0]["lambda_init"], float(trials[0]["lr"])) == ("depth", 3e-3)  # the recipe itself
    assert sorted(int(run["seed"]) for run in finalists) == [1, 1, 2, 2]  # never the trials' own seed
    assert results["winner"]["search_top1"]["seeds"] == results["winner"]["val_top1"]["seeds"] == 2
    assert json.loads((folder / "results.json").read_text()).items() >= results.items()
    # 36 training images, 2 of each class's 12 held out; the 15 validation images are for the winner alone
    assert "trained on 30 images, judged on 6 others" in capsys.readouterr().out
    assert not (folder / "tune").exists()
    assert "no winner yet" not in (folder / "report.html").read_text()
    for run in trials:  # curves and HParams beside each other, for stopped trials too
        events = EventAccumulator(str(folder / run["run"] / "tensorboard")).Reload()
        assert len(events.Scalars("val/top1")) == int(run["epochs"])
        assert events.Scalars("search/best_top1")[0].value == pytest.approx(float(run["best_top1"]), abs=1e-3)
        assert "_hparams_/session_start_info" in events._plugin_to_tag_to_content["hparams"]

    # the answer is a recipe that pretrain takes
    best = from_json((folder / "best.json").read_text(), "best.json")
    assert (best.name, best.optim.epochs, best.seed) == ("tiny-best", 2, 0)
    assert best.optim.lr == results["winner"]["values"]["lr"]
    assert best.model.lambda_init == results["winner"]["values"]["lambda_init"]

    # the same command again trains nothing; more trials go on where it ended
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/tensorboard/*")}
    again = run_sweep(sweep)
    assert again["winner"] == results["winner"]
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*/tensorboard/*")} == before
    run_sweep(dataclasses.replace(sweep, search=dataclasses.replace(sweep.search, trials=5)))
    assert [run for run in rows(sweep) if run["run"].startswith("trials")][:4] == trials
    assert (folder / "trials/0004/tensorboard").is_dir()


def test_a_failed_trial_is_named_and_a_cut_one_repeated(sweep: SweepConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver goes away when the second trial has ended; the first, with the recipe's lr of 1e30, diverges."""
    recipe = with_fields(sweep.run, optim={"lr": 1e30})
    space = Space(lr=(1e-3, 1e30), num_heads=None)
    search = dataclasses.replace(sweep.search, concurrent=1, trials=3, finalists=1, seeds=1, sampler="random")
    cut = SweepConfig(recipe, search, space)
    ended: list[str] = []
    save = Journal.save

    def killing(journal: Journal, record: Any) -> None:
        save(journal, record)
        if record.status == "running" and record.number == 1:
            ended.append(record.name)
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "save", killing)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(cut)
    assert ended == ["trials/0001"]
    journal = Journal(recipe.folder, recipe.name, ["max"])
    drawn = journal.study.trials[1].params
    (failed, _) = journal.records("trial")
    assert failed.status == "failed"
    assert failed.reason.startswith("RunStopped: ")
    assert "not finite" in failed.reason

    with contextlib.suppress(SweepFailed):  # where every rate drawn was hopeless
        run_sweep(cut)
    trials = {run["run"]: run for run in rows(cut) if run["run"].startswith("trials")}
    assert sorted(trials) == ["trials/0000", "trials/0002", "trials/0003"]  # 0001 was cut, and drawn again as 0002
    assert float(trials["trials/0002"]["lr"]) == drawn["lr"]
    assert trials["trials/0000"]["reason"] == failed.reason


def searched(sweep: SweepConfig) -> list[Record]:
    """The first half of a sweep: its trials."""
    dataset = open_dataset(sweep.run.data)
    sweep = dataclasses.replace(sweep, run=resolve(sweep.run, dataset))
    connect_for(sweep)
    open_sweep(sweep)
    sitting = Sitting(sweep, parted_for_search(dataset, sweep.search.holdout, sweep.search.seed))
    sitting.search()
    return sitting.journal.records("trial")


def test_two_objectives_give_a_front(sweep: SweepConfig) -> None:
    search = dataclasses.replace(sweep.search, objective=("top1", "latency"), trials=3)
    runs = searched(dataclasses.replace(sweep, search=search))
    assert len(runs) == 3
    assert all(run.latency_ms is not None and 0 < run.latency_ms < 1000 for run in runs)
    front = ranked(runs, search.objective)
    latencies = [run.latency_ms or 0.0 for run in front]
    assert latencies == sorted(latencies, reverse=True)  # the most accurate first


def test_a_new_asha_knows_what_earlier_sittings_trained() -> None:
    scheduler = AsyncHyperBandScheduler(metric="best_top1", mode="max", max_t=9, reduction_factor=3.0)
    curves = ((10.0, 20.0, 15.0), (30.0, 40.0, 50.0), (60.0,))
    runs = [
        Record(number, "trial", 0, {}, "", history=tuple({"epoch": e, "top1": x} for e, x in enumerate(curve, 1)))
        for number, curve in enumerate(curves)
    ]
    remind(scheduler, runs)
    rungs = {milestone: sorted(seen.values()) for milestone, seen in scheduler._brackets[0]._rungs}
    assert rungs == {9.0: [], 3.0: [20.0, 50.0], 1.0: [10.0, 30.0, 60.0]}  # the best so far at each rung


def test_more_trials_than_the_cluster_holds_are_refused(sweep: SweepConfig) -> None:
    cpus = ray.cluster_resources()["CPU"]
    search = dataclasses.replace(sweep.search, concurrent=100)
    with pytest.raises(ValueError, match=rf"100 trials need 1 CPUs each; .* {cpus:g} CPUs .* room for {cpus:g}"):
        run_sweep(dataclasses.replace(sweep, search=search))
    groups = dataclasses.replace(sweep.search, concurrent=4, workers_per_trial=2)  # 0.1 + 2 x 0.5 + 1 CPUs each
    with pytest.raises(ValueError, match=r"4 trials need 2.1 CPUs each; .* room for 2"):
        run_sweep(dataclasses.replace(sweep, search=groups))
    assert not sweep.run.folder.exists()


def test_a_trial_of_two_workers_goes_through_ray_train(sweep: SweepConfig) -> None:
    search = dataclasses.replace(sweep.search, workers_per_trial=2, concurrent=1, trials=1)
    (trial,) = searched(dataclasses.replace(sweep, search=search))
    assert (trial.status, trial.epochs) == ("finished", 2)
    assert not list(Path(sweep.run.folder, "trials/0000").glob("checkpoint_step_*"))
