"""Whole sweeps through Ray Tune: what a researcher gets, what a failed trial and a killed driver cost."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from conftest import with_fields
from ray.tune.error import TuneError
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.util import placement_group_table
from sweeps import record
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffvit.config import RunConfig, from_json, to_json
from diffvit.data.datasets import Dataset, open_dataset
from diffvit.data.fingerprint import fingerprint_of
from diffvit.data.subset import parted_for_search
from diffvit.search import cluster
from diffvit.search.cluster import clusters_here, connect_for
from diffvit.search.config import SearchConfig, SweepConfig
from diffvit.search.folder import open_sweep
from diffvit.search.progress import Progress
from diffvit.search.records import Candidate, Journal, Record
from diffvit.search.sitting import Sitting, remind
from diffvit.search.space import Space
from diffvit.search.sweep import SweepFailed, run_sweep
from diffvit.search.trial import Job
from diffvit.training.resolve import resolve

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@pytest.fixture
def sweep(tiny_config: RunConfig) -> SweepConfig:
    """Four trials of two epochs; without clipping, so that a hopeless learning rate diverges."""
    recipe = with_fields(tiny_config, optim={"clip_norm": 0.0, "warmup_epochs": 0.0})
    return SweepConfig(recipe, SearchConfig(trials=4, concurrent=2, finalists=2, seeds=2, holdout=0.2), Space())


def rows(sweep: SweepConfig) -> list[dict[str, str]]:
    with (sweep.run.folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def reservations() -> set[str]:
    """Placement groups that Ray has not removed: other tests' may take their time."""
    return {group for group, told in placement_group_table().items() if told["state"] != "REMOVED"}


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


def test_results_of_an_earlier_sitting_go_while_more_is_trained(
    sweep: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would name a winner as that of all trials."""
    sweep.run.folder.mkdir(parents=True)
    cut = dataclasses.replace(sweep, search=dataclasses.replace(sweep.search, trials=8))

    def search(sitting: Sitting) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Sitting, "search", search)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(cut)
    (sweep.run.folder / "results.json").write_text('{"status": "finished"}')
    with pytest.raises(KeyboardInterrupt):
        run_sweep(cut)
    assert not (sweep.run.folder / "results.json").exists()


def test_a_disk_that_fails_between_epochs_ends_a_sweep_in_a_line(
    sweep: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Tune wraps what a callback raises."""

    def fit(_: object) -> None:
        raise TuneError("Traceback (most recent call last):\n  File x\nOSError: [Errno 28] No space left on device\n")

    monkeypatch.setattr("ray.tune.Tuner.fit", fit)
    with pytest.raises(SweepFailed, match=r"^OSError: \[Errno 28\] No space left on device; the same command goes on$"):
        run_sweep(sweep)


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
    assert "not finite" in failed.reason
    assert (journal.study.trials[0].state.name, journal.study.trials[0].value) == ("COMPLETE", 0.0)  # so it is learnt

    with contextlib.suppress(SweepFailed):  # where every rate drawn was hopeless
        run_sweep(cut)
    trials = {run["run"]: run for run in rows(cut) if run["run"].startswith("trials")}
    assert sorted(trials) == ["trials/0000", "trials/0002", "trials/0003"]  # 0001 was cut, and drawn again as 0002
    assert float(trials["trials/0002"]["lr"]) == drawn["lr"]
    assert trials["trials/0000"]["reason"] == failed.reason


def opened(sweep: SweepConfig) -> tuple[SweepConfig, Dataset]:
    """What a `Sitting` takes."""
    dataset = open_dataset(sweep.run.data)
    sweep = dataclasses.replace(sweep, run=resolve(sweep.run, dataset))
    connect_for(sweep)
    open_sweep(sweep, fingerprint_of(dataset))
    return sweep, parted_for_search(dataset, sweep.search.holdout, sweep.search.seed)


def test_two_objectives_give_a_front_of_whole_trials(sweep: SweepConfig) -> None:
    """ASHA stays out of it; models of one shape are equally fast."""
    search = dataclasses.replace(sweep.search, objective=("top1", "latency"), finalists=1, seeds=1)
    recipe = with_fields(sweep.run, model={"embed_dim": 48})
    results = run_sweep(SweepConfig(recipe, search, Space(num_heads=(1, 3))))
    trials = [run for run in rows(sweep) if run["run"].startswith("trials")]
    assert [(run["status"], run["epochs"]) for run in trials] == [("finished", "2")] * 4
    latencies = {heads: {r["latency_ms"] for r in trials if r["num_heads"] == heads} for heads in ("1", "3")}
    assert all(len(found) <= 1 for found in latencies.values())
    front = results["pareto_front"]
    assert front
    speeds = [point["latency_ms"] for point in front]
    assert speeds == sorted(speeds, reverse=True)  # the most accurate first
    written = sorted(path.stem for path in (sweep.run.folder / "pareto").iterdir())
    assert written == sorted(f"{point['number']:04d}" for point in front)
    assert "Accuracy against time" in (sweep.run.folder / "report.html").read_text()


def test_finalists_take_todays_resources_and_each_run_is_scored_once(
    sweep: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sitting = Sitting(*opened(sweep))
    elsewhere = to_json(with_fields(sitting.sweep.run, scale={"workers": 2, "gpu": True}))
    sitting.journal.save(record(0, 50.0, config=elsewhere))
    asked: list[RunConfig] = []
    monkeypatch.setattr(Sitting, "_run", lambda _, role, config, space, table: asked.extend(
        from_json(Job.unpack({"job": job}).config, "test") for job in space["job"]["grid_search"]
    ))  # fmt: skip
    with pytest.raises(SweepFailed, match="no finalist"):
        sitting.compare_finalists()
    assert {config.scale for config in asked} == {sitting.sweep.trial_recipe.scale}
    assert len(asked) == sweep.search.seeds

    scored: list[str] = []

    def remote(config: str, _: Dataset, folder: str) -> Any:
        assert from_json(config, "test").scale == sitting.sweep.trial_recipe.scale
        scored.append(Path(folder).name)
        return ray.put({"top1": float(len(scored))})

    monkeypatch.setattr(Sitting, "_alone", lambda *_: SimpleNamespace(remote=remote))
    runs = [record(0, 50.0, role="finalist", seed=seed, config=elsewhere) for seed in (1, 2, 3)]
    first, all_three = (Candidate(0, {}, (), tuple(runs[:count])) for count in (1, 3))
    assert sitting.score_once(first, sitting.dataset) == [{"top1": 1.0}]
    assert sitting.score_once(all_three, sitting.dataset) == [{"top1": 1.0}, {"top1": 2.0}, {"top1": 3.0}]
    assert sitting.score_once(first, sitting.dataset) == [{"top1": 1.0}]
    assert scored == [f"0000-seed-{seed}" for seed in (1, 2, 3)]


@pytest.mark.faults
def test_a_trial_whose_process_dies_is_named_and_the_sweep_goes_on(
    sweep: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel ends a process when memory runs out."""
    told = Progress.on_trial_result

    def killing(progress: Progress, trial: Any, result: dict[str, Any], **fields: Any) -> None:
        told(progress, trial, result, **fields)
        if Job.unpack(trial.config).number == 1:
            os.kill(result["pid"], signal.SIGKILL)

    monkeypatch.setattr(Progress, "on_trial_result", killing)
    search = dataclasses.replace(sweep.search, concurrent=1, trials=3, finalists=1, seeds=1, scheduler="none")
    run_sweep(dataclasses.replace(sweep, search=search))
    first, dead, third = (run for run in rows(sweep) if run["run"].startswith("trials"))
    assert (first["status"], dead["status"], third["status"]) == ("finished", "failed", "finished")
    assert "died" in dead["reason"]


@pytest.mark.faults
def test_a_killed_driver_costs_the_trial_that_was_under_way(sweep: SweepConfig) -> None:
    sweep = dataclasses.replace(
        sweep, search=dataclasses.replace(sweep.search, concurrent=1, trials=3, finalists=1, seeds=1)
    )
    config = sweep.run.folder.parent / "recipe.json"
    config.parent.mkdir(exist_ok=True)
    config.write_text(to_json(sweep.run))
    job = Path(__file__).parents[1] / "ray_jobs/tune.py"
    options = "--search.trials 3 --search.concurrent 1 --search.finalists 1 --search.seeds 1 --search.holdout 0.2"
    command = [sys.executable, str(job), "--config", str(config), *options.split()]
    with (config.parent / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as driver:
        try:
            while not (sweep.run.folder / "trials/0001/tensorboard").exists():
                assert driver.poll() is None, (config.parent / "log").read_text()
                time.sleep(0.01)
        finally:
            driver.kill()
    (whole, *_) = rows(sweep)
    assert (whole["run"], whole["status"]) == ("trials/0000", "finished")
    (sweep.run.folder / "trials/0000/config.json").unlink()  # as if it had been killed before this was written

    run_sweep(sweep)
    trials = [run for run in rows(sweep) if run["run"].startswith("trials")]
    assert len(trials) == 3
    assert trials[0] == whole
    assert len({run["lr"] for run in trials}) == 3
    assert {run["status"] for run in trials} <= {"finished", "stopped"}
    assert (sweep.run.folder / "trials/0000/config.json").exists()


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


def test_worker_groups_beside_another_cluster_are_refused(sweep: SweepConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "clusters_here", lambda: {"127.0.0.1:2", "127.0.0.1:1"})
    connect_for(sweep)
    groups = dataclasses.replace(sweep, search=dataclasses.replace(sweep.search, workers_per_trial=2, concurrent=1))
    with pytest.raises(ValueError, match=r"several Ray clusters run on this machine \(127.0.0.1:1, 127.0.0.1:2\)"):
        connect_for(groups)


@pytest.mark.parametrize("status", ["finished", "stopped"])
def test_a_trial_of_two_workers_goes_through_ray_train(sweep: SweepConfig, status: str) -> None:
    """ASHA stops it where an earlier trial was better than any can be; that takes Ray a second, and so some epochs."""
    if len(clusters_here()) > 1:
        pytest.skip("another Ray cluster runs on this machine: Ray cannot tell which one to ask for the trial's end")
    epochs = 2 if status == "finished" else 20
    sweep = dataclasses.replace(
        sweep,
        run=with_fields(sweep.run, optim={"epochs": epochs}),
        search=dataclasses.replace(sweep.search, workers_per_trial=2, concurrent=1, trials=2),
    )
    sitting = Sitting(*opened(sweep))
    earlier = record(7, 101.0 if status == "stopped" else 0.0, status="stopped", config=to_json(sweep.run))
    sitting.journal.save(earlier)
    before = reservations()
    sitting.search()
    trial, _ = sitting.journal.records("trial")
    assert trial.status == status
    assert (trial.epochs == epochs) == (status == "finished")
    assert (sweep.run.folder / "trials/0000/config.json").exists()
    assert not list(Path(sweep.run.folder, "trials/0000").glob("checkpoint_step_*"))
    limit = time.monotonic() + 60
    while left := reservations() - before:  # its workers are gone too
        assert time.monotonic() < limit, left
        time.sleep(0.5)
