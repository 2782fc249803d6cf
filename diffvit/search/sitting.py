"""One sitting of a sweep: Ray Tune runs what the journal does not hold yet. The only place that builds a `Tuner`."""

from __future__ import annotations

import dataclasses
import random
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import Trial
from ray import tune
from ray.tune.error import TuneError
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
from ray.tune.search.optuna import OptunaSearch

from diffvit.config import RunConfig, from_json, to_json
from diffvit.data.datasets import Dataset
from diffvit.manifest import checkpoints_in
from diffvit.search.cluster import share_of_trial
from diffvit.search.config import DIRECTIONS, SearchConfig, SweepConfig
from diffvit.search.console import SweepTable
from diffvit.search.folder import write_atomically
from diffvit.search.hparams import write_experiment, write_trial
from diffvit.search.progress import Progress, reason_of
from diffvit.search.records import STUDY_FILE, Candidate, Journal, Record, Role, candidates, ranked, to_csv
from diffvit.search.trial import METRIC, Job, latencies_ms, score, shape_of, train_trial
from diffvit.training.logbook import Logbook
from diffvit.training.notes import read_messages

_TUNE_FOLDER = "tune"
"""Ray Tune's own notes, which nothing here reads."""

_ENDED = "config.json"
"""Written last into the folder of a run that ended."""


class SweepFailed(RuntimeError):
    """No trial, or no finalist, came to its end."""


class Sitting:
    """One go at a sweep: what the journal holds is not done again."""

    def __init__(self, sweep: SweepConfig, dataset: Dataset) -> None:
        self.sweep, self.dataset = sweep, dataset
        self._in_group = sweep.search.workers_per_trial > 1
        self.folder = sweep.run.folder
        directions = [DIRECTIONS[name] for name in sweep.search.objective]
        self.journal = Journal(self.folder, sweep.run.name, directions)
        self.journal.recover(sweep.run.optim.epochs)
        self._remove_cut_runs()
        for record in (*self.journal.records("trial"), *self.journal.records("finalist")):
            if not (self.folder / record.name / _ENDED).exists():
                self._file(record)
        write_experiment(self.folder, sweep.space, sweep.run, with_latency="latency" in sweep.search.objective)

    def search(self) -> None:
        """Run the trials that are left."""
        search = self.sweep.search
        left = search.trials - len(self.journal.records("trial"))
        with SweepTable(self.sweep, self.journal.records("trial")) as table:
            table.print_header(len(self.dataset.train), len(self.dataset.val), max(left, 0))
            if left <= 0:
                return
            tune_config = tune.TuneConfig(
                num_samples=left,
                max_concurrent_trials=search.concurrent,
                search_alg=OptunaSearch(
                    space=partial(_propose, self.sweep, self._latencies()),
                    metric=[METRIC, "latency_ms"] if len(search.objective) > 1 else METRIC,
                    mode=[DIRECTIONS[name] for name in search.objective] if len(search.objective) > 1 else "max",
                    points_to_evaluate=self._first_points()[:left],
                    sampler=self._sampler(),
                    study_name=self.journal.study_name,
                    storage=self.journal.storage,
                ),
                scheduler=self._scheduler(),
            )
            self._run("trial", tune_config, {}, table)

    def _first_points(self) -> list[dict[str, Any]]:
        """Points that no sampler is asked for: the recipe's own, and of a space without ranges all that are left."""
        recipe_point, outside = self.sweep.space.parameters(self.sweep.run)
        points = self.sweep.space.points(self.sweep.run) or []
        random.Random(self.sweep.search.seed).shuffle(points)
        if not outside:
            points.insert(0, recipe_point)
        drawn = [
            {**trial.system_attrs.get("fixed_params", {}), **trial.params}
            for trial in self.journal.study.get_trials(deepcopy=False)
        ]
        return [point for place, point in enumerate(points) if point not in (*drawn, *points[:place])]

    def compare_finalists(self) -> list[Candidate]:
        """Train the best configurations with seeds that their trials did not have; the winner first."""
        search = self.sweep.search
        best = ranked(self.journal.records("trial"), search.objective)[: search.finalists]
        if not best:
            failed = [record for record in self.journal.records("trial") if record.status == "failed"]
            more = "" if self.sweep.space.points(self.sweep.run) else "more --search.trials go on, or "
            raise SweepFailed(
                f"no trial came to its end; the last one failed: {failed[-1].reason if failed else '?'}; once that is "
                f"mended, {more}another --name begins anew"
            )
        done = {(record.number, record.seed) for record in self.journal.records("finalist")}
        jobs, asked = [], set[tuple[int, int]]()
        for record in best:
            config = self._on_todays_resources(record)
            for seed in range(config.seed + 1, config.seed + 1 + search.seeds):
                asked.add((record.number, seed))
                if (record.number, seed) not in done:
                    placed = _placed(dataclasses.replace(config, seed=seed), self.folder, "finalists", record.number)
                    jobs.append(Job(record.number, to_json(placed), keep=True, latency_ms=record.latency_ms))
        if jobs:
            with SweepTable(self.sweep, self.journal.records("finalist")) as table:
                param_space = tune.grid_search([job.pack()["job"] for job in jobs])
                tune_config = tune.TuneConfig(max_concurrent_trials=search.concurrent)
                self._run("finalist", tune_config, {"job": param_space}, table)
        # an earlier sitting may have asked for more of them, or for others
        found = candidates(run for run in self.journal.records("finalist") if (run.number, run.seed) in asked)
        if not found:
            raise SweepFailed(f"no finalist came to its end; {self.folder / 'trials.csv'} says why")
        return found

    def score_once(self, winner: Candidate, dataset: Dataset) -> list[dict[str, float]]:
        """The winner's runs on the recipe's own validation split; kept, so that each is looked at once."""
        known = self.journal.scores(winner.number)
        remote = self._alone(score)
        runs = [run for run in winner.runs if run.status == "finished"]
        pending = {
            run.name: remote.remote(to_json(self._on_todays_resources(run)), dataset, str(self.folder / run.name))
            for run in runs
            if run.name not in known
        }
        if pending:
            known |= dict(zip(pending, ray.get(list(pending.values())), strict=True))
            self.journal.save_scores(winner.number, known)
        return [known[run.name] for run in runs]

    def _on_todays_resources(self, record: Record) -> RunConfig:
        """An earlier sitting may have had others."""
        return dataclasses.replace(from_json(record.config, record.name), scale=self.sweep.trial_recipe.scale)

    def write_csv(self) -> None:
        """`trials.csv`, from the journal."""
        records = [*self.journal.records("trial"), *self.journal.records("finalist")]
        write_atomically(self.folder / "trials.csv", to_csv(records, self.sweep.space.varied(self.sweep.run)))

    def _file(self, record: Record) -> None:
        """Leave in the folder of a run that ended what is read there."""
        folder = self.folder / record.name
        folder.mkdir(parents=True, exist_ok=True)  # its process may have died before
        if record.role == "trial":
            write_trial(self.folder, record)
            if self._in_group:
                Logbook(folder).end()
                _remove_checkpoints(folder)
        write_atomically(folder / _ENDED, record.config)

    def _latencies(self) -> dict[str, float]:
        """By shape of model, timed once a sweep while nothing else of it runs, so that equal models are as fast."""
        if "latency" not in self.sweep.search.objective:
            return {}
        if not self.journal.latencies():
            shapes = list(self.sweep.space.shapes(self.sweep.run))
            timed = self._alone(latencies_ms).remote(shapes, self._threads)
            self.journal.save_latencies(ray.get(timed))
        return self.journal.latencies()

    def _alone(self, function: Callable[..., Any]) -> Any:
        """A Ray task with the resources of a one-worker trial."""
        share = share_of_trial(self.sweep, alone=True)
        return ray.remote(num_cpus=share["CPU"], num_gpus=share.get("GPU", 0))(function)

    @property
    def _threads(self) -> int:
        return max(int(self.sweep.search.cpus_per_trial), 1)

    def _remove_cut_runs(self) -> None:
        """Interrupted runs start over, so their old curves are deleted."""
        known = {run.name for run in (*self.journal.records("trial"), *self.journal.records("finalist"))}
        folders = [*self.folder.glob("trials/*/"), *self.folder.glob("finalists/*/")]
        if not known and any((folder / _ENDED).exists() for folder in folders):
            raise ValueError(
                f"{self.folder / STUDY_FILE} knows none of the runs that have ended in {self.folder}: it was lost, or "
                "is another sweep's; bring it back, or choose another --name"
            )
        for folder in folders:
            if f"{folder.parent.name}/{folder.name}" not in known:
                shutil.rmtree(folder, ignore_errors=True)

    def _run(self, role: Role, tune_config: tune.TuneConfig, param_space: dict[str, Any], table: SweepTable) -> None:
        def changed(record: Record) -> None:
            table.changed(record)
            if record.status != "running":
                for message in read_messages(str(self.folder / record.name)):
                    table.tell(record, message)
                self._file(record)
                self.write_csv()

        tune_config.reuse_actors = not self._in_group  # importing torch again takes longer than a small trial
        tune_config.trial_dirname_creator = tune_config.trial_name_creator = lambda trial: str(trial.trial_id)
        trainable = tune.with_parameters(
            train_trial,
            dataset=self.dataset,
            threads=self._threads,
        )
        progress = Progress(self.journal, self.sweep.space, role, changed)
        shutil.rmtree(self.folder / _TUNE_FOLDER, ignore_errors=True)
        tuner = tune.Tuner(
            tune.with_resources(trainable, share_of_trial(self.sweep)),
            param_space=param_space,
            tune_config=tune_config,
            run_config=tune.RunConfig(
                name=_TUNE_FOLDER, storage_path=str(self.folder), callbacks=[progress], verbose=0
            ),
        )
        with warnings.catch_warnings():
            # Optuna's file lies on a disk that may be busy
            warnings.filterwarnings("ignore", message="Define-by-run function .* seconds to run")
            try:
                tuner.fit()
            except TuneError as error:  # of what is done here between the epochs, such as writing to a full disk
                raise SweepFailed(f"{reason_of(str(error))}; the same command goes on") from error
        shutil.rmtree(self.folder / _TUNE_FOLDER, ignore_errors=True)
        if role == "trial":
            _remove_checkpoints(*self.folder.glob("trials/*"))  # those that were being written when their trial ended

    def _sampler(self) -> BaseSampler:
        # a sampler that starts anew must not draw what it drew in an earlier sitting
        seed = self.sweep.search.seed + 1_000_003 * len(self.journal.study.get_trials(deepcopy=False))
        return build_sampler(self.sweep.search, seed % 2**32)  # NumPy takes no larger one

    def _scheduler(self) -> Any:
        if not self.sweep.search.stops_early:
            return FIFOScheduler()
        scheduler = build_asha(self.sweep.search, self.sweep.run.optim.epochs)
        remind(scheduler, self.journal.records("trial"))
        return scheduler


def build_sampler(search: SearchConfig, seed: int) -> BaseSampler:
    return TPESampler(seed=seed) if search.sampler == "tpe" else RandomSampler(seed=seed)


def build_asha(search: SearchConfig, epochs: int) -> AsyncHyperBandScheduler:
    """ASHA over trials of `epochs`, with one bracket."""
    return AsyncHyperBandScheduler(
        time_attr="epoch",
        metric=METRIC,
        mode="max",
        max_t=epochs,
        grace_period=search.grace_epochs,
        reduction_factor=search.reduction,
        stop_last_trials=False,  # its end ends a trial
    )


def remind(scheduler: AsyncHyperBandScheduler, records: Iterable[Record]) -> None:
    """Tell a new ASHA of what earlier sittings trained, or it would judge the first trials by themselves alone."""
    (bracket,) = scheduler._brackets
    for record in records:
        for count, entry in enumerate(record.history, start=1):
            best = max(earlier["top1"] for earlier in record.history[:count])
            bracket.on_result(SimpleNamespace(trial_id=record.name), entry["epoch"], best)


def _propose(sweep: SweepConfig, latencies: Mapping[str, float], trial: Trial) -> dict[str, Any]:
    """Called by OptunaSearch for every trial: draws a point, and packs the run that it stands for."""
    config = _placed(sweep.space.propose(trial, sweep.trial_recipe), sweep.run.folder, "trials", trial.number)
    return Job(trial.number, to_json(config), latency_ms=latencies.get(shape_of(config.model))).pack()


def _remove_checkpoints(*trials: Path) -> None:
    """Those that a worker group has kept to outlive a lost worker."""
    for folder in trials:
        for checkpoint in checkpoints_in(folder):
            shutil.rmtree(checkpoint, ignore_errors=True)


def _placed(config: RunConfig, folder: Path, where: str, number: int) -> RunConfig:
    """The run in a folder of its own below the sweep's."""
    name = f"{number:04d}" if where == "trials" else f"{number:04d}-seed-{config.seed}"
    return dataclasses.replace(config, storage=str(folder / where), name=name, resume=True)
