"""The space of a sweep, its options and its folder."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import optuna
import pytest
from conftest import with_fields

from diffvit.cli import parse_sweep_config
from diffvit.config import RunConfig, ScaleConfig, to_json, valid_num_heads
from diffvit.data.fingerprint import Fingerprint, SplitFingerprint
from diffvit.search import cluster as search_cluster
from diffvit.search.cluster import require_room, share_of_trial
from diffvit.search.config import (
    SearchConfig,
    SweepConfig,
    as_asked,
    differing_sweep_fields,
    sweep_from_json,
    sweep_to_json,
)
from diffvit.search.folder import open_sweep
from diffvit.search.space import Space

IMAGES = Fingerprint(SplitFingerprint(36, "a"), SplitFingerprint(15, "b"))


@pytest.fixture
def recipe(tiny_config: RunConfig) -> RunConfig:
    """48 wide: V1 has room for 1, 2 or 3 heads, the plain model for 1, 2, 3, 4 or 6."""
    return with_fields(tiny_config, model={"embed_dim": 48, "num_heads": 3})


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


def test_the_points_of_a_space_are_those_that_a_trial_can_hold(recipe: RunConfig) -> None:
    space = Space(variant=("softmax", "diff"), num_heads=(1, 2), lr=None, lambda_init=(0.5, 0.5), patch_size=(2, 4))
    points = space.points(recipe)
    assert points is not None
    assert len(points) == 2 * 2 + 2 * 2 * 2  # lambda_init is depth or 0.5, of V1 alone
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=5))
    for point in points:
        study.enqueue_trial(point)
        trial = study.ask()
        model = space.propose(trial, recipe)
        assert trial.params == point == space.parameters(model)[0]
    assert Space().points(recipe) is None
    assert Space(lambda_init=None, num_heads=None, depth_schedule=False).points(recipe) is None  # a range of rates


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": (2, 5)}, r"must fit model.embed_dim = 48 .* got \[2, 5\]; what fits: \[1, 2, 3\]"),
        ({"variant": ("softmax", "diff"), "num_heads": (6, 16)}, r"for variant 'diff', got \[6, 16\]"),
        ({"patch_size": (4, 5)}, r"must divide model.image_size = 16, got \[5\]"),
        ({"lr": None, "lambda_init": None, "depth_schedule": False, "num_heads": None}, "nothing to vary"),
        ({"lr": None, "lambda_init": None, "num_heads": None}, "nothing to vary"),  # but the one schedule
        ({"lr": None, "lambda_init": None, "num_heads": (2,)}, "the space has a single point, so there is nothing to"),
        ({"lr": (1e-3, 1e-3), "lambda_init": None, "num_heads": None}, "the space has a single point"),
    ],
)
def test_a_space_without_a_valid_point_is_refused(recipe: RunConfig, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_asked(SweepConfig(recipe, SearchConfig(), Space(**fields)))


def test_a_space_without_ranges_has_as_many_trials_as_points(recipe: RunConfig) -> None:
    space = Space(lr=None, lambda_init=None)
    assert as_asked(SweepConfig(recipe, SearchConfig(), space)).search.trials == 3
    assert as_asked(SweepConfig(recipe, SearchConfig(trials=2), space)).search.trials == 2
    with pytest.raises(ValueError, match=r"trials must be at most 3, the points that this space has, .* got 4"):
        as_asked(SweepConfig(recipe, SearchConfig(trials=4), space))


def test_a_sweep_that_was_written_before_can_be_read(recipe: RunConfig) -> None:
    """What it does not heed was not refused then, and does not change what it does."""
    for search, space in (
        (SearchConfig(scheduler="none", grace_epochs=2), Space()),
        (SearchConfig(objective=("top1", "latency"), reduction=2.0), Space(muon_lr=(0.1, 0.2))),
        (SearchConfig(), Space(muon_lr=(0.1, 0.2))),
    ):
        written = SweepConfig(recipe, search, space)
        assert sweep_from_json(sweep_to_json(written), "sweep.json") == written
        with pytest.raises(ValueError, match="leave it out"):
            as_asked(written)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": (1e-2, 1e-3)}, "space.lr must be LOW HIGH"),
        ({"lr": (0.0, 1e-3)}, "log scale: LOW must be positive"),
        ({"lr": (1e-4, float("inf"))}, "space.lr must be LOW HIGH, two finite numbers"),
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


def test_muons_rate_is_varied_where_muon_trains(recipe: RunConfig) -> None:
    muon = with_fields(recipe, optim={"optimizer": "muon", "muon_lr": 0.02})
    assert Space().varied(recipe) == ["num_heads", "lambda_init", "lr"]
    assert Space().varied(muon) == ["num_heads", "lambda_init", "lr", "muon_lr"]
    assert Space().describe(muon)["muon_lr"] == "0.005 to 0.05, log scale"
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=5))
    rates = [Space().propose(study.ask(), muon).optim.muon_lr for _ in range(20)]
    assert len(set(rates)) == 20
    assert 5e-3 <= min(rates) < 0.01 < max(rates) <= 5e-2


def test_the_command_line_narrows_and_widens() -> None:
    sweep = parse_sweep_config("", ["sample", "--space.num-heads", "2", "4", "--space.lr", "1e-5", "1e-1",
                                    "--search.trials", "7", "--optim.epochs", "4"])  # fmt: skip
    assert (sweep.space.num_heads, sweep.space.lr) == ((2, 4), (1e-5, 1e-1))
    assert (sweep.search.trials, sweep.run.optim.epochs) == (7, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--scale.workers", "4"], "error: tune takes no --scale.workers, got 4: --search.workers-per-trial"),
        (["sample", "--optim.muon-lr", "0.1"], "error: optim.muon_lr is for optim.optimizer = 'muon', got 'adamw'"),
        (
            ["sample", "--space.muon-lr", "1e-3", "1e-2"],
            "space.muon_lr is for optim.optimizer = 'muon', which no trial",
        ),
        (["sample-vit", "--space.lambda-init", "0.1", "0.5"], "space.lambda_init is for variant 'diff' (V1), which no"),
        (["sample-vit", "--space.no-depth-schedule"], ""),
        (["sample-vit", "--space.lambda-init", "None"], ""),
        (["sample-vit", "--space.lambda-init", "0.1", "0.5", "--space.variant", "softmax", "diff"], ""),
    ],
)
def test_what_no_trial_would_heed_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if not message:
        parse_sweep_config("", arguments)
        return
    with pytest.raises(SystemExit) as end:
        parse_sweep_config("", arguments)
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


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
        ({"gpus_per_trial": 0.0}, r"must be in \(0, 1\], got 0.0"),
        ({"gpus_per_trial": 0.25}, r"gpus_per_trial = 0.25 is a share of a GPU and needs scale.gpu"),
        ({"grace_epochs": 3}, "must not exceed optim.epochs = 2, got 3"),
        ({"cpus_per_trial": math.inf}, "search.cpus_per_trial must be finite, got inf"),
        ({"reduction": math.inf}, "search.reduction must be finite, got inf"),
        ({"scheduler": "none", "reduction": 2.0}, "search.reduction is for ASHA, which does not judge this sweep, got"),
        (
            {"objective": ("top1", "latency"), "grace_epochs": 2},
            "search.grace_epochs is for ASHA, which does not judge",
        ),
        ({"workers_per_trial": 5}, "must divide optim.batch_size = 12, got 5"),
    ],
)
def test_search_options_are_checked(recipe: RunConfig, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_asked(SweepConfig(recipe, SearchConfig(**fields), Space()))


def test_a_share_of_a_gpu_is_for_trials_of_one_worker(recipe: RunConfig) -> None:
    on_gpu = with_fields(recipe, scale={"gpu": True})
    with pytest.raises(ValueError, match=r"is for trials of one worker; each of search.workers_per_trial = 2 workers"):
        SweepConfig(on_gpu, SearchConfig(gpus_per_trial=0.5, workers_per_trial=2), Space())
    groups = SweepConfig(on_gpu, SearchConfig(workers_per_trial=2), Space())
    assert share_of_trial(groups) == {"CPU": 0.1}  # its workers bring their own
    assert share_of_trial(groups, alone=True) == {"CPU": 1.0, "GPU": 1.0}
    shared = SweepConfig(on_gpu, SearchConfig(gpus_per_trial=0.5), Space())
    assert share_of_trial(shared) == {"CPU": 1.0, "GPU": 0.5}
    assert share_of_trial(SweepConfig(recipe, SearchConfig(), Space())) == {"CPU": 1.0}


@pytest.mark.parametrize(
    ("share", "cpus", "room"),
    [
        (0.25, 1.0, 8 + 2),  # four on each GPU, but the second node has CPUs for two
        (0.6, 1.0, 2 + 1),  # two GPUs have 2.0, yet no trial gets 0.2 of one and 0.4 of the other
        (0.3, 0.1, 6 + 3),  # three on each
        (1.0, 3.0, 2),  # the second node has too few CPUs
    ],
)
def test_concurrent_trials_are_checked_against_whole_gpus(
    recipe: RunConfig, share: float, cpus: float, room: int
) -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 2.0, "GPU": 1.0}, {"CPU": 64.0}]
    on_gpu = with_fields(recipe, scale={"gpu": True})

    def sweep(concurrent: int) -> SweepConfig:
        search = SearchConfig(gpus_per_trial=share, cpus_per_trial=cpus, concurrent=concurrent)
        return SweepConfig(on_gpu, search, Space())

    require_room(sweep(room), nodes)
    wanted = rf"{room + 1} trials need {cpus:g} CPUs and {share:g} GPUs each; .* 3 node.s. with 74 CPUs and 3 GPUs"
    with pytest.raises(ValueError, match=rf"{wanted} in all, room for {room}; lower"):
        require_room(sweep(room + 1), nodes)


def test_a_probe_varies_nothing_of_the_features(recipe: RunConfig) -> None:
    probe = with_fields(recipe, model={"variant": "diff"}, init={"weights": "runs/v1", "train": "head"})
    with pytest.raises(ValueError, match=r"one lambda_init, so a sweep cannot vary it; pass --space.lambda-init None"):
        SweepConfig(probe, SearchConfig(), Space(num_heads=None))
    SweepConfig(probe, SearchConfig(), Space(num_heads=None, lambda_init=None, depth_schedule=False))


def test_a_taken_name_is_refused_with_the_differences(recipe: RunConfig) -> None:
    sweep = SweepConfig(recipe, SearchConfig(), Space())
    recipe.folder.mkdir(parents=True)
    (recipe.folder / "run.lock").touch()  # of this process
    open_sweep(sweep, IMAGES)
    open_sweep(dataclasses.replace(sweep, search=SearchConfig(trials=90, concurrent=2)), IMAGES)  # continues
    other = SweepConfig(with_fields(recipe, optim={"lr": 0.1}), SearchConfig(seed=4), Space(num_heads=(1, 2)))
    assert differing_sweep_fields(sweep, other) == {
        "optim.lr": (3e-3, 0.1),
        "search.seed": (0, 4),
        "space.num_heads": ((), (1, 2)),
    }
    with pytest.raises(ValueError, match=r"(?s)with other values.*space.num_heads: \(\) there, \(1, 2\) now"):
        open_sweep(other, IMAGES)
    grown = dataclasses.replace(IMAGES, training=SplitFingerprint(40, "c"))
    with pytest.raises(ValueError, match=r"was begun with 36 training images, .* has 40 now; bring them back"):
        open_sweep(sweep, grown)
    with pytest.raises(ValueError, match="leave --resume on"):
        open_sweep(dataclasses.replace(sweep, run=dataclasses.replace(recipe, resume=False)), IMAGES)


def test_a_folder_that_is_no_sweep_is_refused(recipe: RunConfig) -> None:
    recipe.folder.mkdir(parents=True)
    (recipe.folder / "config.json").write_text(to_json(recipe))
    with pytest.raises(ValueError, match=r"holds files but no sweep.json"):
        open_sweep(SweepConfig(recipe, SearchConfig(), Space()), IMAGES)


@pytest.mark.parametrize(
    ("recipe_fields", "search_fields", "space_fields", "message"),
    [
        (
            {"init": {"weights": "w", "gate_opening_steps": 9}, "model": {"variant": "diff_v2"}},
            {},
            {"variant": ("diff_v2", "diff"), "num_heads": None},
            r"cannot be trained, {'variant': 'diff', .*: init.gate_opening_steps is for model.variant = 'diff_v2'",
        ),
        ({"init": {"weights": "w"}}, {}, {}, "init.weights fixes the shape .* pass --space.num-heads None"),
        ({"init": {"weights": "w"}}, {}, {"num_heads": None, "patch_size": (2, 4)}, "init.weights fixes the shape"),
    ],
)  # fmt: skip
def test_a_sweep_with_a_trial_that_cannot_be_is_refused(
    recipe: RunConfig,
    recipe_fields: dict[str, Any],
    search_fields: dict[str, Any],
    space_fields: dict[str, Any],
    message: str,
) -> None:
    run = with_fields(recipe, **recipe_fields)
    with pytest.raises(ValueError, match=message):
        SweepConfig(run, SearchConfig(**search_fields), Space(**space_fields))


def test_weights_leave_what_does_not_change_the_shape(recipe: RunConfig) -> None:
    sweep = SweepConfig(with_fields(recipe, init={"weights": "w"}), SearchConfig(), Space(num_heads=None))
    assert sweep.space.varied(sweep.run) == ["lambda_init", "lr"]


def test_two_objectives_are_for_trials_that_run_to_their_end() -> None:
    assert SearchConfig().stops_early
    assert not SearchConfig(objective=("top1", "latency")).stops_early
    assert not SearchConfig(scheduler="none").stops_early


def test_a_local_ray_offers_the_cores_that_there_are(recipe: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be as large as `concurrent` asks for, and the check against it would say nothing."""
    started: list[ScaleConfig | None] = []
    for name, stand_in in {
        "connect": lambda scale, dashboard: started.append(scale),
        "can_grow": lambda: False,
        "require_packages": lambda say: None,
    }.items():
        monkeypatch.setattr(search_cluster, name, stand_in)
    monkeypatch.setattr(search_cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    with pytest.raises(ValueError, match=r"concurrent = 100 trials need 1 CPUs each; .* 2 CPUs .* room for 2"):
        search_cluster.connect_for(SweepConfig(recipe, SearchConfig(concurrent=100), Space()))
    with pytest.raises(ValueError, match=r"room for 0"):
        search_cluster.connect_for(SweepConfig(recipe, SearchConfig(concurrent=50, workers_per_trial=2), Space()))
    alone, group = started
    assert alone is None
    assert group is not None
    assert (group.workers, group.cpus_per_worker) == (1, 2.1)  # 0.1 + 2 x 0.5 + 1, of a single trial


def test_a_cluster_that_can_grow_is_asked_for_all_trials(recipe: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[tuple[Any, float]] = []
    for name, stand_in in {
        "connect": lambda scale, dashboard: None,
        "can_grow": lambda: True,
        "wait_for_nodes": lambda bundles, limit, say: waited.append((bundles, limit)),
        "require_packages": lambda say: None,
    }.items():
        monkeypatch.setattr(search_cluster, name, stand_in)
    grown = [{"Alive": True, "Resources": {"CPU": 16.0, "GPU": 4.0}}]
    monkeypatch.setattr(search_cluster.ray, "nodes", lambda: grown if waited else [])
    on_gpu = with_fields(recipe, scale={"gpu": True, "wait_minutes": 3.0})
    search_cluster.connect_for(SweepConfig(on_gpu, SearchConfig(concurrent=2, workers_per_trial=2), Space()))
    trial = [{"CPU": 0.1}, {"CPU": 0.5, "GPU": 1.0}, {"CPU": 0.5, "GPU": 1.0}, {"CPU": 1.0}]
    assert waited == [(trial * 2, 180.0)]


def test_sweeps_round_trip_and_other_versions_are_refused(recipe: RunConfig) -> None:
    sweep = SweepConfig(recipe, SearchConfig(objective=("top1", "latency")), Space(variant=("diff", "softmax")))
    assert sweep_from_json(sweep_to_json(sweep), "") == sweep
    data = json.loads(sweep_to_json(sweep))
    data["search"]["population"] = 3
    with pytest.raises(ValueError, match=r"old.json is not a sweep of this version: search.population"):
        sweep_from_json(json.dumps(data), "old.json")
