"""What a sweep remembers, and how it ranks what it found."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState
from sweeps import record

from diffvit.config import RunConfig, to_json
from diffvit.data.datasets import open_dataset
from diffvit.search.config import SearchConfig, SweepConfig
from diffvit.search.console import print_sweep
from diffvit.search.progress import Progress, reason_of
from diffvit.search.records import Journal, Record, candidates, ranked, to_csv
from diffvit.search.sitting import Sitting
from diffvit.search.space import Space
from diffvit.search.sweep import summary, write_recipes
from diffvit.search.trial import DIVERGED, METRIC, Job


def test_a_killed_driver_loses_what_was_running_and_nothing_else(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "sweep", ["max"])
    for lr in (0.1, 0.2, 0.3, 0.4, 0.5):
        journal.study.enqueue_trial({"lr": lr})
    trials = [journal.study.ask() for _ in range(5)]
    for trial in trials:
        trial.suggest_float("lr", 0.0, 1.0)
    whole, stopped, failed, cut, finalist = (
        record(0, 50.0, 60.0),
        record(1, 40.0, status="running"),
        record(2, status="running"),
        record(3, 30.0, status="running"),
        record(0, 55.0, status="running", role="finalist", seed=1),
    )
    lost = record(1, 55.0, status="failed", role="finalist", seed=1)  # which is trained again, too
    for run in (whole, stopped, failed, cut, finalist, lost):
        journal.save(run)
    journal.study.tell(trials[0], 60.0)
    journal.study.tell(trials[1], 40.0)  # Optuna heard of the end, the record did not
    journal.study.tell(trials[2], state=TrialState.FAIL)
    # trial 3 was training, trial 4 had been drawn

    again = Journal(tmp_path, "sweep", ["max"])
    again.recover(epochs=2)
    kept = again.records("trial")
    assert [(run.number, run.status) for run in kept] == [(0, "finished"), (1, "stopped"), (2, "failed")]
    assert kept[0] == whole
    assert again.records("finalist") == []
    states = ["COMPLETE", "COMPLETE", "FAIL", "FAIL", "FAIL", "WAITING", "WAITING"]
    assert [trial.state.name for trial in again.study.trials] == states
    again.recover(epochs=2)
    assert len(again.study.trials) == 7
    assert [again.study.ask().suggest_float("lr", 0.0, 1.0) for _ in range(2)] == [0.4, 0.5]


@pytest.mark.parametrize("writes", range(4))
def test_a_recovery_that_is_killed_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """Whatever number of its three writes were made, the cut trial is drawn again, once, and never called a failure."""
    journal = Journal(tmp_path, "sweep", ["max"])
    journal.study.ask().suggest_float("lr", 0.3, 0.3)
    journal.save(record(0, 30.0, status="running"))

    class Killed(Exception):
        pass

    done = []
    for name in ("create_new_trial", "set_study_user_attr", "set_trial_state_values"):
        write = getattr(journal.storage, name)

        def limited(*arguments: Any, write: Any = write, **fields: Any) -> Any:
            if len(done) == writes:
                raise Killed
            done.append(write)
            return write(*arguments, **fields)

        monkeypatch.setattr(type(journal.study._storage), name, staticmethod(limited))
    with pytest.raises(Killed) if writes < 3 else nullcontext():
        journal.recover(epochs=2)
    monkeypatch.undo()

    again = Journal(tmp_path, "sweep", ["max"])
    again.recover(epochs=2)
    assert again.records("trial") == []
    assert [trial.state.name for trial in again.study.trials] == ["FAIL", "WAITING"]
    assert again.study.ask().suggest_float("lr", 0.0, 1.0) == 0.3


def test_scores_are_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "sweep", ["max"])
    assert journal.scores(3) == {}
    assert journal.scored() == []
    journal.save_scores(3, {"finalists/0003-seed-1": {"top1": 80.5}})
    assert Journal(tmp_path, "sweep", ["max"]).scores(3) == {"finalists/0003-seed-1": {"top1": 80.5}}
    assert journal.scored() == [3]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            'Failure # 1 (occurred at noon)\n\x1b[36mray::ImplicitFunc.train()\x1b[39m (pid=7)\n  File "x.py", line 3\n'
            "diffvit.training.loop.RunStopped: not finite at step 3. A lower optim.lr\n",
            "RunStopped: not finite at step 3. A lower optim.lr",
        ),
        (
            "Failure # 1 (occurred at noon)\nThe actor died unexpectedly before finishing this task.\n\tpid: 7\n",
            "The actor died unexpectedly before finishing this task. pid: 7",
        ),
        ("", "no reason was given"),
    ],
)
def test_the_reason_of_a_failure_is_one_sentence(error: str, reason: str) -> None:
    assert reason_of(error) == reason


def test_a_renamed_sweep_keeps_its_records(tiny_config: RunConfig) -> None:
    folder = tiny_config.folder
    (folder / "trials/0000").mkdir(parents=True)
    (folder / "trials/0000/config.json").write_text("{}")
    Journal(folder, "before", ["max"]).save(record(0, 50.0, 60.0))
    sitting = Sitting(SweepConfig(tiny_config, SearchConfig(), Space()), open_dataset(tiny_config.data))
    assert [run.number for run in sitting.journal.records("trial")] == [0]
    assert (folder / "trials/0000/config.json").exists()


def test_runs_that_ended_are_not_deleted_where_their_records_were_lost(tiny_config: RunConfig) -> None:
    folder = tiny_config.folder
    (folder / "finalists/0000-seed-1").mkdir(parents=True)
    (folder / "finalists/0000-seed-1/config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"study\.db knows none of the runs that have ended in .*: it was lost, or is"):
        Sitting(SweepConfig(tiny_config, SearchConfig(), Space()), open_dataset(tiny_config.data))
    assert (folder / "finalists/0000-seed-1/config.json").exists()


class Following:
    """A `Progress` over a journal, and Ray Tune's words for one trial of `tiny_config`."""

    def __init__(self, config: RunConfig) -> None:
        config.folder.mkdir(parents=True)
        self.journal = Journal(config.folder, "sweep", ["max"])
        self.heard: list[str] = []
        self.progress = Progress(self.journal, Space(), "trial", lambda run: self.heard.append(run.status))
        self.trial = SimpleNamespace(trial_id="a", config=Job(0, to_json(config)).pack(), error_file=None)
        self.progress.on_trial_start(self.trial)

    def train(self, epochs: int) -> None:
        for epoch in range(1, epochs + 1):
            (entry,) = record(0, 50.0).history
            self.progress.on_trial_result(self.trial, {**entry, "epoch": epoch})

    @property
    def record(self) -> Record:
        (found,) = self.journal.records("trial")
        return found


def test_a_disk_that_fails_after_a_trial_does_not_make_it_a_failure(tiny_config: RunConfig, tmp_path: Path) -> None:
    """Ray Tune takes what `on_trial_complete` raises for an error of the trial, and says so to `on_trial_error`."""
    following = Following(tiny_config)
    following.train(tiny_config.optim.epochs)
    following.progress._changed = lambda _: (_ for _ in ()).throw(OSError("stale file handle"))
    with pytest.raises(OSError, match="stale"):
        following.progress.on_trial_complete(following.trial)
    following.trial.error_file = str(tmp_path / "error.txt")
    Path(following.trial.error_file).write_text("OSError: stale file handle")
    following.progress.on_trial_error(following.trial)
    assert (following.record.status, following.record.reason) == ("finished", "")


def test_a_trial_that_diverged_is_a_failure_though_it_ends_without_an_error(tiny_config: RunConfig) -> None:
    following = Following(tiny_config)
    following.train(1)
    following.progress.on_trial_result(following.trial, {METRIC: 0.0, DIVERGED: "not finite at step 9"})
    following.progress.on_trial_complete(following.trial)
    assert (following.record.status, following.record.reason) == ("failed", "not finite at step 9")
    assert following.record.epochs == 1
    assert not following.record.counts
    assert following.heard == ["running", "running", "failed"]


@pytest.mark.parametrize("drawn", [0, 2])
def test_every_point_of_a_space_without_ranges_is_trained_once(tiny_config: RunConfig, drawn: int) -> None:
    tiny_config.folder.mkdir(parents=True)
    space = Space(num_heads=(1, 2), lr=None, lambda_init=(0.5, 0.5), patch_size=(4, 8))
    sitting = Sitting(SweepConfig(tiny_config, SearchConfig(trials=8), space), open_dataset(tiny_config.data))
    points = sitting._first_points()
    own, _ = space.parameters(tiny_config)
    assert points[0] == own
    assert len(points) == len({str(sorted(point.items())) for point in points}) == 8
    for point in points[:drawn]:
        sitting.journal.study.enqueue_trial(point)
        space.propose(sitting.journal.study.ask(), tiny_config)
    assert sitting._first_points() == points[drawn:]


def test_ranking_takes_each_configuration_once_and_no_failure() -> None:
    runs = [
        record(0, 70.0, 60.0),  # its best is 70
        record(1, 80.0, status="stopped"),
        record(2, 99.0, status="failed"),
        record(3, 75.0, values={"lr": 0.002}),  # the values of number 1
        record(4, status="stopped"),
        record(5, 90.0, status="running"),
    ]
    assert [run.number for run in ranked(runs, ["top1"])] == [1, 0]


def test_the_pareto_front() -> None:
    points = {0: (80.0, 5.0), 1: (90.0, 9.0), 2: (79.0, 6.0), 3: (85.0, 5.0), 4: (90.0, 9.5), 5: (60.0, 1.0)}
    runs = [record(number, top1, latency_ms=ms) for number, (top1, ms) in points.items()]
    runs += [record(6, 95.0, latency_ms=0.5, status="stopped")]  # after fewer epochs: no match for the others
    assert [run.number for run in ranked(runs, ["top1", "latency"])] == [1, 3, 5]


def test_the_winner_has_the_highest_mean_of_last_epochs_over_whole_seeds() -> None:
    def seeds(number: int, *last: float, failed: int = 0) -> list[Record]:
        whole = [record(number, 99.0, top1, role="finalist", seed=s) for s, top1 in enumerate(last)]
        return whole + [record(number, role="finalist", seed=9 + s, status="failed") for s in range(failed)]

    found = candidates([*seeds(4, 80.0, 83.0), *seeds(7, 82.0, 82.0), *seeds(2, 95.0, failed=1), *seeds(1, failed=2)])
    assert [candidate.number for candidate in found] == [7, 4, 2]  # 82.0, 81.5, one seed of two
    assert found[1].mean == 81.5


def test_csv_has_a_line_a_run() -> None:
    runs = [record(0, 50.0, 61.25, 60.0, seconds=12.34), record(1, status="failed", reason='not finite, "at" step 2')]
    lines = to_csv(runs, ["lr", "lambda_init"]).splitlines()
    names = "run,number,seed,lr,lambda_init,status,epochs,best_top1,last_top1,latency_ms,train_seconds,seconds,reason"
    assert lines[0] == names
    assert lines[1] == "trials/0000,0,0,0.001,,finished,3,61.2500,60.0000,,7.5,12.3,"
    assert lines[2] == 'trials/0001,1,0,0.002,,failed,0,,,,0.0,0.0,"not finite, ""at"" step 2"'


def test_finalists_are_compared_over_the_seeds_that_are_asked_for_now(
    tiny_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """An earlier sitting asked for four of the weaker one; and its Pareto front held another point."""
    search = SearchConfig(trials=2, finalists=2, seeds=2, holdout=0.2, objective=("top1", "latency"))
    sweep = SweepConfig(tiny_config, search, Space())
    folder, text = tiny_config.folder, to_json(tiny_config)
    folder.mkdir(parents=True)
    journal = Journal(folder, tiny_config.name, ["max", "min"])
    values = {"num_heads": 1, "lambda_init": "depth"}
    for number, latency, top1, seeds in ((0, 1.0, 50.0, 4), (1, 2.0, 60.0, 2)):
        shared = {"config": text, "values": {**values, "lr": 1e-3 * (number + 1)}, "latency_ms": latency}
        journal.save(record(number, top1, top1, **shared))
        for seed in range(1, seeds + 1):
            journal.save(record(number, top1, top1, role="finalist", seed=seed, **shared))
    sitting = Sitting(sweep, open_dataset(tiny_config.data))
    winner, other = sitting.compare_finalists()
    assert (winner.number, winner.top1, other.top1) == (1, (60.0, 60.0), (50.0, 50.0))
    lost = record(1, status="failed", reason="OSError: the node died", role="finalist", seed=9, config=text)
    sitting.journal.save(lost)
    found = summary(sweep, sitting.journal, [winner, other], [{"top1": 61.0, "loss": 1.0}])
    print_sweep(folder.with_name("a [b] c"), found)
    told = "finalists/0001-seed-9 failed: OSError: the node died; the same command trains it again"
    shown = capsys.readouterr().out
    assert told in shown
    assert "a [b] c: configuration 0001" in shown
    assert f"tensorboard --logdir '{folder.with_name('a [b] c')}'" in shown
    (folder / "pareto").mkdir()
    (folder / "pareto/0007.json").write_text("of an earlier front")
    write_recipes(sweep, winner, sitting.journal)
    assert sorted(path.name for path in (folder / "pareto").iterdir()) == ["0000.json", "0001.json"]
