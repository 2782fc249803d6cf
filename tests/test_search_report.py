"""What a sweep shows and leaves: table, page, HParams, recipes."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from pathlib import Path
from xml.etree import ElementTree

import optuna
import pytest
from conftest import with_fields
from optuna.trial import TrialState
from rich.console import Console
from sweeps import record
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.metadata import parse_experiment_plugin_data, parse_session_start_info_plugin_data

from diffvit.config import RunConfig, from_json, to_json
from diffvit.search.config import SearchConfig, SweepConfig
from diffvit.search.console import SweepTable
from diffvit.search.figures import Scale, best_so_far
from diffvit.search.hparams import write_experiment, write_trial
from diffvit.search.records import Journal, candidates
from diffvit.search.report import importances, render
from diffvit.search.space import Space
from diffvit.search.sweep import write_recipes


@pytest.fixture
def recipe(tiny_config: RunConfig) -> RunConfig:
    """48 wide: V1 has room for 1, 2 or 3 heads, the plain model for 1, 2, 3, 4 or 6."""
    return with_fields(tiny_config, model={"embed_dim": 48, "num_heads": 3})


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


def test_places_on_an_axis() -> None:
    rate = Scale("lr", (1e-4, 1e-2, 1e-3))
    assert [rate.place(value) for value in (1e-4, 1e-3, 1e-2)] == pytest.approx([0.0, 0.5, 1.0])
    assert Scale("muon_lr", (0.005, 0.05)).place(0.05 / 10**0.5) == pytest.approx(0.5)
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    content = experiment.SummaryMetadata("_hparams_/experiment").plugin_data.content
    columns = {info.name: info for info in parse_experiment_plugin_data(content).hparam_infos}
    assert columns["lr"].type == columns["num_heads"].type == api_pb2.DATA_TYPE_FLOAT64  # or they were text
    assert (columns["lr"].domain_interval.min_value, columns["lr"].domain_interval.max_value) == (1e-4, 1e-2)
    assert list(columns["num_heads"].domain_discrete) == [1, 2, 3]
    assert columns["lambda_init"].type == api_pb2.DATA_TYPE_UNSET


@pytest.mark.parametrize(("grace", "warned"), [(1, True), (2, False)])
def test_the_header_says_what_will_be_drawn_and_whether_asha_judges_in_the_warm_up(
    recipe: RunConfig, grace: int, warned: bool
) -> None:
    text = io.StringIO()
    recipe = with_fields(recipe, optim={"epochs": 4, "warmup_epochs": 0.0, "warmup_steps": 4})
    recipe = dataclasses.replace(recipe, name="a [b]")
    sweep = SweepConfig(recipe, SearchConfig(grace_epochs=grace, trials=3), Space(lr=None, lambda_init=None))
    SweepTable(sweep, [], Console(file=text, width=200)).print_header(trained_on=36, judged_on=6, left=3)
    assert text.getvalue().startswith("a [b]: 3 trials of 4 epochs, 3 to go\n")
    assert "3 points, each trained once at most, in random order and by no sampler" in text.getvalue()
    found = "ASHA may stop a trial after 1 epochs, but the warm-up takes 1.33: to judge rates at their peak give"
    assert (f"{found} --search.grace-epochs 2 or more" in text.getvalue()) == warned


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


@pytest.mark.slow
def test_the_report_of_two_objectives_shows_the_front_and_speaks_of_no_asha(recipe: RunConfig, tmp_path: Path) -> None:
    journal = Journal(tmp_path, "sweep", ["max", "min"])
    for number, (top1, ms) in enumerate([(80.0, 5.0), (70.0, 4.0), (60.0, 6.0)]):
        journal.save(record(number, top1, latency_ms=ms))
    sweep = SweepConfig(recipe, SearchConfig(objective=("top1", "latency")), Space())
    page = render(sweep, journal, None)
    assert 'alt="the Pareto front"' in page
    assert "<td>5.00</td>" in page
    assert "ASHA" not in page
    assert "stopped early" not in page
