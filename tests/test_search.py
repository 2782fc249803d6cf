"""What a sweep is made of, without Ray: space, checks, memory, ranking, and the page that it leaves."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import optuna
import pytest
from conftest import with_fields
from optuna.trial import TrialState
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

from diffvit.cli import parse_sweep_config
from diffvit.config import RunConfig, from_json, to_json, valid_num_heads
from diffvit.search.config import SearchConfig, SweepConfig, differing_sweep_fields, sweep_from_json, sweep_to_json
from diffvit.search.console import SweepTable
from diffvit.search.figures import Scale, best_so_far
from diffvit.search.folder import held, open_sweep
from diffvit.search.hparams import write_experiment, write_trial
from diffvit.search.progress import reason_of
from diffvit.search.records import Journal, Record, candidates, ranked, to_csv
from diffvit.search.report import importances, render
from diffvit.search.space import Space
from diffvit.search.sweep import write_recipes


@pytest.fixture
def recipe(tiny_config: RunConfig) -> RunConfig:
    """48 wide: V1 has room for 1, 2 or 3 heads, the plain model for 1, 2, 3, 4 or 6."""
    return with_fields(tiny_config, model={"embed_dim": 48, "num_heads": 3})


def record(number: int, *top1: float, status: str = "finished", **fields: Any) -> Record:
    history = tuple(
        {"epoch": epoch, "top1": value, "top5": 100.0, "loss": 1.0, "train_loss": 1.0, "at": 100.0 * number + epoch}
        for epoch, value in enumerate(top1, start=1)
    )
    defaults = {"role": "trial", "seed": 0, "values": {"lr": 0.001 * (number + 1)}, "config": "{}"}
    return Record(number, **{**defaults, "status": status, "history": history, **fields})


# --- the space


def test_every_point_drawn_is_a_model_that_exists(recipe: RunConfig) -> None:
    space = Space(variant=("softmax", "diff", "diff_v2"), patch_size=(2, 4, 8), drop_path=(0.0, 0.3))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=5))
    drawn = [space.propose(study.ask(), recipe).model for _ in range(80)]
    for model in drawn:  # building one checks it
        assert model.num_heads in valid_num_heads(48, model.variant)
        assert model.variant == "diff" or model.lambda_init == recipe.model.lambda_init
    assert {model.num_heads for model in drawn if model.variant == "diff"} == {1, 2, 3}
    assert {model.num_heads for model in drawn if model.variant == "softmax"} == {1, 2, 3, 4, 6}
    constants = [model.lambda_init for model in drawn if isinstance(model.lambda_init, float)]
    assert constants
    assert all(0.0 <= value <= 0.95 for value in constants)
    assert "depth" in {model.lambda_init for model in drawn if model.variant == "diff"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": (2, 5)}, r"must fit model.embed_dim = 48 .* got \[2, 5\]; what fits: \[1, 2, 3\]"),
        ({"variant": ("softmax", "diff"), "num_heads": (6, 16)}, r"for variant 'diff', got \[6, 16\]"),
        ({"patch_size": (4, 5)}, r"must divide model.image_size = 16, got \[5\]"),
        ({"lr": None, "lambda_init": None, "depth_schedule": False, "num_heads": None}, "nothing to vary"),
    ],
)
def test_a_space_without_a_valid_point_is_refused(recipe: RunConfig, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SweepConfig(recipe, SearchConfig(), Space(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": (1e-2, 1e-3)}, "space.lr must be LOW HIGH"),
        ({"lr": (0.0, 1e-3)}, "log scale: LOW must be positive"),
        ({"lambda_init": (0.2, 1.0)}, r"must lie in \[0, 1\)"),
        ({"num_heads": (2, 2)}, "must not name a value twice"),
    ],
)
def test_bounds_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Space(**fields)


def test_the_recipe_as_a_point_of_the_space(recipe: RunConfig) -> None:
    assert Space().parameters(recipe) == ({"num_heads": 3, "lambda_schedule": "depth", "lr": 3e-3}, [])
    constant = with_fields(recipe, model={"lambda_init": 0.5})
    point, outside = Space(lambda_init=(0.6, 0.9), lr=(1e-4, 1e-3), num_heads=(1, 2)).parameters(constant)
    assert point["lambda_init"] == 0.5
    assert outside == ["num_heads", "lambda_init", "lr"]
    assert Space(lambda_init=None).parameters(constant)[1] == ["lambda_init"]  # only the depth schedule is on offer
    assert Space(depth_schedule=False).parameters(recipe)[1] == ["lambda_init"]


def test_the_space_prints_itself(recipe: RunConfig) -> None:
    words = Space(variant=("softmax", "diff"), weight_decay=(0.01, 0.2)).describe(recipe)
    assert words == {
        "variant": "softmax, diff",
        "num_heads": "1, 2, 3, 4, 6 (softmax); 1, 2, 3 (diff)",
        "lambda_init": "the depth schedule or a constant in [0, 0.95]",
        "lr": "0.0001 to 0.01, log scale",
        "weight_decay": "0.01 to 0.2, log scale",
        "first trial": "the recipe itself",
    }
    assert Space(lr=(1e-5, 1e-4)).describe(recipe)["first trial"].endswith("own lr lies outside")


def test_the_command_line_narrows_and_widens() -> None:
    sweep = parse_sweep_config("", ["sample", "--space.num-heads", "2", "4", "--space.lr", "1e-5", "1e-1",
                                    "--search.trials", "7", "--optim.epochs", "4"])  # fmt: skip
    assert (sweep.space.num_heads, sweep.space.lr) == ((2, 4), (1e-5, 1e-1))
    assert (sweep.search.trials, sweep.run.optim.epochs) == (7, 4)


def test_population_based_training_is_refused_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_sweep_config("", ["sample", "--search.scheduler", "pbt"])
    assert end.value.code == 2
    assert "population" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trials": 0}, "search.trials must be at least 1, got 0"),
        ({"objective": ("latency",)}, "must be 'top1' or 'top1 latency', got 'latency'"),
        ({"reduction": 1.0}, "search.reduction must be more than 1"),
        ({"holdout": 1.0}, "search.holdout must be between 0 and 1"),
        ({"gpus_per_trial": 1.5}, r"must be in \(0, 1\], got 1.5"),
        ({"grace_epochs": 3}, "must not exceed optim.epochs = 2, got 3"),
        ({"workers_per_trial": 5}, "must divide optim.batch_size = 12, got 5"),
    ],
)
def test_search_options_are_checked(recipe: RunConfig, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SweepConfig(recipe, SearchConfig(**fields), Space())


# --- the folder


def test_a_taken_name_is_refused_with_the_differences(recipe: RunConfig) -> None:
    sweep = SweepConfig(recipe, SearchConfig(), Space())
    open_sweep(sweep)
    open_sweep(dataclasses.replace(sweep, search=SearchConfig(trials=90, concurrent=2)))  # continues
    other = SweepConfig(with_fields(recipe, optim={"lr": 0.1}), SearchConfig(seed=4), Space(num_heads=(1, 2)))
    assert differing_sweep_fields(sweep, other) == {
        "optim.lr": (3e-3, 0.1),
        "search.seed": (0, 4),
        "space.num_heads": ((), (1, 2)),
    }
    with pytest.raises(ValueError, match=r"(?s)with other values.*space.num_heads: \(\) there, \(1, 2\) now"):
        open_sweep(other)
    with pytest.raises(ValueError, match="leave --resume on"):
        open_sweep(dataclasses.replace(sweep, run=dataclasses.replace(recipe, resume=False)))


def test_a_folder_that_is_no_sweep_is_refused(recipe: RunConfig) -> None:
    recipe.folder.mkdir(parents=True)
    (recipe.folder / "config.json").write_text(to_json(recipe))
    with pytest.raises(ValueError, match=r"holds files but no sweep.json"):
        open_sweep(SweepConfig(recipe, SearchConfig(), Space()))


def test_two_processes_cannot_run_one_sweep(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(ValueError, match="another process runs the sweep"), held(tmp_path):
        pass
    with held(tmp_path):  # free again
        pass


def test_sweeps_round_trip_and_other_versions_are_refused(recipe: RunConfig) -> None:
    sweep = SweepConfig(recipe, SearchConfig(objective=("top1", "latency")), Space(variant=("diff", "softmax")))
    assert sweep_from_json(sweep_to_json(sweep), "") == sweep
    data = json.loads(sweep_to_json(sweep))
    data["search"]["population"] = 3
    with pytest.raises(ValueError, match=r"old.json is not a sweep of this version: search.population"):
        sweep_from_json(json.dumps(data), "old.json")


# --- the memory


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
    for run in (whole, stopped, failed, cut, finalist):
        journal.save(run)
    journal.study.tell(trials[0], 60.0)
    journal.study.tell(trials[1], 40.0)  # Optuna heard of the end, the record did not
    journal.study.tell(trials[2], state=TrialState.FAIL)
    # trial 3 was training, trial 4 had been drawn

    again = Journal(tmp_path, "sweep", ["max"])
    assert again.recover(epochs=2) == [{"lr": 0.4}, {"lr": 0.5}]
    kept = again.records("trial")
    assert [(run.number, run.status) for run in kept] == [(0, "finished"), (1, "stopped"), (2, "failed")]
    assert kept[0] == whole
    assert again.records("finalist") == []
    assert [trial.state.name for trial in again.study.trials] == ["COMPLETE", "COMPLETE", "FAIL", "FAIL", "FAIL"]
    assert again.recover(epochs=2) == []


def test_scores_are_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "sweep", ["max"])
    assert journal.score(3) is None
    assert journal.scored() == []
    journal.save_score(3, {"runs": [{"top1": 80.5}]})
    assert Journal(tmp_path, "sweep", ["max"]).score(3) == {"runs": [{"top1": 80.5}]}
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


# --- the ranking


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
    assert [run.number for run in ranked(runs, ["top1", "latency"])] == [1, 3, 5]


def test_the_winner_has_the_highest_mean_of_last_epochs_over_whole_seeds() -> None:
    def seeds(number: int, *last: float, failed: int = 0) -> list[Record]:
        whole = [record(number, 99.0, top1, role="finalist", seed=s) for s, top1 in enumerate(last)]
        return whole + [record(number, role="finalist", seed=9 + s, status="failed") for s in range(failed)]

    found = candidates([*seeds(4, 80.0, 83.0), *seeds(7, 82.0, 82.0), *seeds(2, 95.0, failed=1), *seeds(1, failed=2)])
    assert [candidate.number for candidate in found] == [7, 4, 2]  # 82.0, 81.5, one seed of two
    assert found[1].mean == 81.5
    assert found[1].std == pytest.approx(2.1213203435596424)  # 3 / sqrt(2)
    assert found[2].std is None


def test_csv_has_a_line_a_run() -> None:
    runs = [record(0, 50.0, 61.25, 60.0, seconds=12.34), record(1, status="failed", reason='not finite, "at" step 2')]
    lines = to_csv(runs, ["lr", "lambda_init"]).splitlines()
    assert lines[0] == "run,number,seed,lr,lambda_init,status,epochs,best_top1,last_top1,latency_ms,seconds,reason"
    assert lines[1] == "trials/0000,0,0,0.001,,finished,3,61.2500,60.0000,,12.3,"
    assert lines[2] == 'trials/0001,1,0,0.002,,failed,0,,,,0.0,"not finite, ""at"" step 2"'


# --- what it shows


def test_the_live_table_fits_the_screen_and_shows_what_runs_first(recipe: RunConfig) -> None:
    sweep = SweepConfig(recipe, SearchConfig(), Space(variant=("diff", "diff_v2"), weight_decay=(0.01, 0.1)))
    values = {"variant": "diff_v2", "num_heads": 6, "lr": 1.234567e-3, "weight_decay": 0.0123}
    runs = [record(n, 30.0 + n, values=values) for n in range(40)]
    runs += [record(40, values=values, status="running"), record(41, values=values, status="failed", reason="x" * 200)]
    text = io.StringIO()
    console = Console(file=text, width=80, height=24, force_terminal=True, color_system=None)
    with SweepTable(sweep, runs[:-1], console) as table:
        table.changed(runs[-1])
        shown = io.StringIO()
        Console(file=shown, width=80).print(table._screen())
    lines = shown.getvalue().rstrip().splitlines()
    assert len(lines) < 24
    assert max(map(len, lines)) <= 80
    assert lines[0].rstrip().split(", ") == ["1 running", "1 failed", "40 finished"]
    numbers = [line.split()[0] for line in lines[2:]]
    assert numbers[:3] == ["0040", "0039", "0038"]  # running, then the best
    assert lines[3].split() == [
        "0039",
        "diff_v2",
        "6",
        "-",
        "0.00123",
        "0.0123",
        "1",
        "69.00",
        "69.00",
        "0",
        "finished",
    ]
    assert lines[-1].startswith("0041 failed: xxx")


def test_runs_are_lines_where_nothing_can_be_redrawn(recipe: RunConfig) -> None:
    text = io.StringIO()
    table = SweepTable(SweepConfig(recipe, SearchConfig(), Space()), [], Console(file=text, width=200))
    table.changed(record(0, 30.0, status="running"))
    table.changed(record(0, 30.0, 29.0, values={"num_heads": 2, "lambda_init": 0.25, "lr": 1e-3}))
    table.changed(record(1, status="failed", reason="[/] out of memory", values={"num_heads": 1, "lr": 1e-3}))
    first, second = text.getvalue().splitlines()
    assert first == "trials/0000  num_heads 2  lambda_init 0.25  lr 0.001  2 epochs  best top-1 30.00 %  finished"
    assert second == "trials/0001  num_heads 1  lambda_init -  lr 0.001  0 epochs  failed: [/] out of memory"


# --- what it leaves


def test_places_on_an_axis() -> None:
    rate = Scale("lr", (1e-4, 1e-2, 1e-3))
    assert [rate.place(value) for value in (1e-4, 1e-3, 1e-2)] == pytest.approx([0.0, 0.5, 1.0])
    schedule = Scale("lambda_init", (0.2, "depth", 0.6))
    assert [schedule.place(value) for value in (0.2, 0.4, 0.6, "depth")] == pytest.approx([0.0, 0.425, 0.85, 1.0])
    assert [label for _, label in schedule.ticks()] == ["0.2", "0.4", "0.6", "depth"]
    assert [Scale("num_heads", (6, 2, 3)).place(heads) for heads in (2, 3, 6)] == [0.0, 0.5, 1.0]
    assert Scale("lr", (1e-3,)).place(1e-3) == 0.5


def test_budget_counts_epochs_in_the_order_in_which_they_happened() -> None:
    first, second = record(0, 50.0, 40.0), record(1, 45.0, 70.0)
    times = {0: (1.0, 4.0), 1: (2.0, 3.0)}
    runs = [
        dataclasses.replace(
            run,
            history=tuple({**entry, "at": at} for entry, at in zip(run.history, times[run.number], strict=True)),
        )
        for run in (first, second)
    ]
    assert best_so_far(runs) == ([1, 2, 3, 4], [50.0, 50.0, 70.0, 70.0])


def filled_journal(folder: Path, recipe: RunConfig, space: Space, count: int) -> Journal:
    """Trials whose top-1 depends on the learning rate alone, the last one failed with a hostile reason."""
    journal = Journal(folder, "sweep", ["max"])
    journal.study.sampler = optuna.samplers.RandomSampler(seed=3)
    for number in range(count):
        trial = journal.study.ask()
        config = space.propose(trial, recipe)
        top1 = 90.0 - 1e3 * config.optim.lr
        journal.study.tell(trial, top1)
        journal.save(record(number, top1 / 2, top1, values=space.values(config), config=to_json(config)))
    failed = journal.study.ask()
    values = space.values(space.propose(failed, recipe))
    journal.study.tell(failed, state=TrialState.FAIL)
    journal.save(record(count, status="failed", values=values, reason="<script>alert(1)</script>"))
    return journal


def test_the_report_is_whole_and_escapes_what_it_shows(recipe: RunConfig, tmp_path: Path) -> None:
    space = Space(variant=("softmax", "diff"))
    sweep = SweepConfig(dataclasses.replace(recipe, name="a<b"), SearchConfig(), space)
    journal = filled_journal(tmp_path, recipe, space, count=13)
    for seed in (1, 2):
        journal.save(record(0, 60.0, 80.0 + seed, role="finalist", seed=seed, values={"lr": 1e-3}))
    found = {"mean": 81.5, "std": 0.71, "seeds": 2}
    winner = {"number": 0, "values": {"lr": 1e-3}, "search_top1": found, "val_top1": {**found, "mean": 79.25}}
    page = render(sweep, journal, {"winner": winner, "val_looked_at": [0]})
    assert "Sweep a&lt;b" in page
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "79.25 ± 0.71 % (2 seeds) on the validation split, looked at for this one only" in page
    sections = re.findall(r"<h2>(.*?)</h2>", page)
    assert sections == ["What was tried", "Finalists", "All trials", "Importance", "Slices", "Learning curves",
                        "Spent and found", "Every trial"]  # fmt: skip
    images = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]*)" alt="([^"]+)"', page)
    assert len(images) == 5 + 4  # one a section, and a slice for each of variant, num_heads, lambda_init, lr
    for encoded, _ in images:
        assert ElementTree.fromstring(base64.b64decode(encoded)).tag.endswith("svg")
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)  # nothing is fetched


def test_the_report_of_a_sweep_without_results_says_so(recipe: RunConfig, tmp_path: Path) -> None:
    journal = Journal(tmp_path, "sweep", ["max"])
    journal.save(record(0, status="failed", reason="out of memory"))
    page = render(SweepConfig(recipe, SearchConfig(), Space()), journal, None)
    assert "no winner yet" in page
    assert "out of memory" in page
    assert "<img" not in page


def test_importance_finds_the_parameter_that_matters(recipe: RunConfig, tmp_path: Path) -> None:
    shares = importances(filled_journal(tmp_path, recipe, Space(), count=30))
    assert shares is not None
    assert max(shares, key=lambda name: shares[name]) == "lr"
    assert set(shares) == {"num_heads", "lambda_schedule", "lr"}  # not every trial draws a constant lambda_init
    (tmp_path / "few").mkdir()
    assert importances(filled_journal(tmp_path / "few", recipe, Space(), count=5)) is None


def test_hparams_are_written_for_trials_that_were_stopped(recipe: RunConfig, tmp_path: Path) -> None:
    write_experiment(tmp_path, Space(), recipe, with_latency=False)
    values = {"num_heads": 3, "lambda_init": 0.25, "lr": 1e-3}
    write_trial(tmp_path, record(7, 61.5, 60.0, status="stopped", values=values))
    events = EventAccumulator(str(tmp_path / "trials/0007/tensorboard")).Reload()
    (reached,) = events.Scalars("search/best_top1")
    assert reached.value == 61.5
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    shown = parse_session_start_info_plugin_data(content).hparams
    assert shown["lambda_init"].string_value == "0.250"
    assert (shown["num_heads"].number_value, shown["lr"].number_value) == (3, 1e-3)
    assert "_hparams_/session_end_info" in events._plugin_to_tag_to_content["hparams"]
    experiment = EventAccumulator(str(tmp_path / "trials")).Reload()
    assert "_hparams_/experiment" in experiment._plugin_to_tag_to_content["hparams"]


def test_the_answers_are_recipes(recipe: RunConfig) -> None:
    recipe.folder.mkdir(parents=True)
    journal = Journal(recipe.folder, "sweep", ["max", "min"])
    for number, (lr, top1, ms) in enumerate([(0.1, 80.0, 5.0), (0.2, 70.0, 4.0), (0.3, 60.0, 6.0)]):
        config = to_json(dataclasses.replace(with_fields(recipe, optim={"lr": lr}), name="x", storage="y", seed=7))
        journal.save(record(number, top1, latency_ms=ms, config=config))
    sweep = SweepConfig(recipe, SearchConfig(objective=("top1", "latency")), Space())
    again = record(1, 71.0, role="finalist", seed=8, config=journal.records("trial")[1].config)
    write_recipes(sweep, candidates([again])[0], journal)
    expected = dataclasses.replace(with_fields(recipe, optim={"lr": 0.2}), name="tiny-best")
    assert from_json((recipe.folder / "best.json").read_text(), "best.json") == expected
    front = sorted((recipe.folder / "pareto").iterdir())
    assert [path.name for path in front] == ["0000.json", "0001.json"]  # 0002 is slower and worse
    assert from_json(front[0].read_text(), "").optim.lr == 0.1
