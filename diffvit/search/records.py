"""What a sweep remembers: one SQLite file with Optuna's study and, beside it, a record of every run.

Only the driver writes it, a record at every epoch, so a driver killed at any moment loses at most what was running.
Every table, curve and page of the sweep is made from these records. Nothing is unpickled.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState

from diffvit.search.space import Values

STUDY_FILE = "study.db"

Role = Literal["trial", "finalist"]
Status = Literal["running", "finished", "stopped", "failed"]

_DIRECTIONS = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
_SCORE = "score/"
_LATENCIES = "latencies_ms"
_REPEATS = "repeats"
"""On a trial of the study: the number of the interrupted one that it repeats."""
_LOST_REASON = "the driver ended before it could say why"


@dataclass(frozen=True)
class Record:
    """One training run of a sweep: a trial, or a finalist trained again with another seed."""

    number: int
    """Of the configuration: the number of its trial in Optuna's study."""
    role: Role
    seed: int
    values: Values
    """The varied fields."""
    config: str
    """The whole `RunConfig`, as JSON."""
    status: Status = "running"
    """finished: trained to its last epoch; stopped: ended early by ASHA; failed: see `reason`."""
    reason: str = ""
    history: tuple[dict[str, float], ...] = ()
    """One entry an epoch: epoch, top1, top5, loss, train_loss, train_seconds, at (seconds since 1970)."""
    latency_ms: float | None = None
    """Time of one image through the model, where the sweep measures it."""
    seconds: float = 0.0
    """From the start of the run to its end, with everything around the training."""

    @property
    def name(self) -> str:
        """`trials/0007` or `finalists/0007-seed-3`: its folder below the sweep's."""
        return f"trials/{self.number:04d}" if self.role == "trial" else f"finalists/{self.number:04d}-seed-{self.seed}"

    @property
    def epochs(self) -> int:
        """Trained so far."""
        return int(self.history[-1]["epoch"]) if self.history else 0

    @property
    def best_top1(self) -> float | None:
        """Of all epochs, percent on the images held out for the search."""
        return max((entry["top1"] for entry in self.history), default=None)

    @property
    def last_top1(self) -> float | None:
        return self.history[-1]["top1"] if self.history else None

    @property
    def train_seconds(self) -> float:
        """Of `seconds`, what went into training and evaluating."""
        return self.history[-1]["train_seconds"] if self.history else 0.0

    @property
    def counts(self) -> bool:
        """Whether its metric may be compared: it came to its end, or ASHA ended it."""
        return self.status in ("finished", "stopped") and bool(self.history)


@dataclass(frozen=True)
class Candidate:
    """A finalist over its seeds."""

    number: int
    values: Values
    top1: tuple[float, ...]
    """After the last epoch, one value a seed that came to its end."""
    runs: tuple[Record, ...] = field(repr=False, default=())

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1)


class Journal:
    """The records of a sweep, in the study's SQLite file."""

    def __init__(self, folder: Path, name: str, directions: Sequence[str]) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage = optuna.storages.RDBStorage(f"sqlite:///{folder / STUDY_FILE}")
        there = optuna.get_all_study_names(self.storage)
        self.study_name = there[0] if there else name  # the folder may have been renamed since
        self.study = optuna.create_study(
            storage=self.storage,
            study_name=self.study_name,
            directions=[_DIRECTIONS[direction] for direction in directions],
            load_if_exists=True,
        )

    def save(self, record: Record) -> None:
        self.study.set_user_attr(record.name, json.dumps(dataclasses.asdict(record)))

    def records(self, role: Role) -> list[Record]:
        """Every run of that role, in the order of their names."""
        attributes = sorted(self.study.user_attrs.items())
        found = [json.loads(text) for name, text in attributes if name.startswith(f"{role}s/")]
        return [Record(**{**fields, "history": tuple(fields["history"])}) for fields in found if fields is not None]

    def save_scores(self, number: int, scores: dict[str, dict[str, float]]) -> None:
        self.study.set_user_attr(f"{_SCORE}{number:04d}", json.dumps(scores))

    def scores(self, number: int) -> dict[str, dict[str, float]]:
        """What runs of configuration `number` scored on the recipe's own validation split, by name, if asked before."""
        return dict(json.loads(self.study.user_attrs.get(f"{_SCORE}{number:04d}", "{}")))

    def scored(self) -> list[int]:
        """Configurations that have seen the validation split: one, unless a continued sweep found a better one."""
        return sorted(int(name.removeprefix(_SCORE)) for name in self.study.user_attrs if name.startswith(_SCORE))

    def save_latencies(self, found: dict[str, float]) -> None:
        self.study.set_user_attr(_LATENCIES, found)

    def latencies(self) -> dict[str, float]:
        """Milliseconds of one image by shape of model, as measured before the first trial; empty before that."""
        return dict(self.study.user_attrs.get(_LATENCIES, {}))

    def recover(self, epochs: int) -> None:
        """Bring what a killed driver left behind in order, and be as ready to be killed oneself.

        A trial whose end Optuna heard of and the record did not is closed. One that was under way is queued in the
        study to be drawn again, its record forgotten, and only then is it given up, in the study as a failure that no
        sampler looks at: whoever finds it still running does again what is left of this.
        """
        records = {record.number: record for record in self.records("trial")}
        trials = self.study.get_trials(deepcopy=False)
        repeated = {trial.user_attrs.get(_REPEATS) for trial in trials}
        for trial in trials:
            record = records.get(trial.number)
            if trial.state == TrialState.RUNNING:
                if record is None or record.status == "running":
                    point = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
                    if point and trial.number not in repeated:
                        self.study.enqueue_trial(point, user_attrs={_REPEATS: trial.number})
                    self._forget(record)
                self.study.tell(trial.number, state=TrialState.FAIL)
            elif record is not None and record.status == "running" and trial.state.is_finished():
                self.save(_closed(record, trial.state, epochs))
        for finalist in self.records("finalist"):
            if finalist.status in ("running", "failed"):  # what ended it may have been mended
                self._forget(finalist)

    def _forget(self, record: Record | None) -> None:
        if record is not None:
            self.study.set_user_attr(record.name, json.dumps(None))  # Optuna cannot remove one


def _closed(record: Record, state: TrialState, epochs: int) -> Record:
    if state == TrialState.FAIL:
        return dataclasses.replace(record, status="failed", reason=_LOST_REASON)
    return dataclasses.replace(record, status="finished" if record.epochs >= epochs else "stopped")


def ranked(records: Iterable[Record], objectives: Sequence[str]) -> list[Record]:
    """Configurations that may be compared, each once, the most accurate first; with two objectives the Pareto front.

    Only trials of the same number of epochs meet on a front: a stopped one is neither worse nor better, but unfinished.
    """
    usable = [record for record in records if record.counts]
    if "latency" in objectives:
        usable = [record for record in usable if record.status == "finished"]
        usable = [record for record in usable if not any(_dominates(other, record) for other in usable)]
    usable.sort(key=lambda record: (-(record.best_top1 or 0.0), record.number))
    distinct = {json.dumps(record.values, sort_keys=True): record for record in reversed(usable)}
    return [record for record in usable if distinct[json.dumps(record.values, sort_keys=True)] is record]


def _dominates(a: Record, b: Record) -> bool:
    """Whether `a` is at least as accurate and as fast as `b`, and better in one."""
    ours, theirs = (a.best_top1 or 0.0, -(a.latency_ms or 0.0)), (b.best_top1 or 0.0, -(b.latency_ms or 0.0))
    return ours != theirs and all(x >= y for x, y in zip(ours, theirs, strict=True))


def candidates(finalists: Iterable[Record]) -> list[Candidate]:
    """Finalists over their seeds, the winner first: most seeds that came to their end, then the highest mean."""
    by_number: dict[int, list[Record]] = {}
    for record in finalists:
        by_number.setdefault(record.number, []).append(record)
    found = [
        Candidate(
            number,
            runs[0].values,
            tuple(run.history[-1]["top1"] for run in runs if run.status == "finished"),
            tuple(runs),
        )
        for number, runs in by_number.items()
    ]
    whole = [candidate for candidate in found if candidate.top1]
    return sorted(whole, key=lambda candidate: (-len(candidate.top1), -candidate.mean, candidate.number))


def to_csv(records: Iterable[Record], columns: Sequence[str]) -> str:
    """One line a run; `columns` are the names of the varied fields."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["run", "number", "seed", *columns, "status", "epochs", "best_top1", "last_top1", "latency_ms",
         "train_seconds", "seconds", "reason"]
    )  # fmt: skip
    for run in records:
        cells = [run.values.get(name, "") for name in columns]
        numbers = ["" if x is None else f"{x:.4f}" for x in (run.best_top1, run.last_top1, run.latency_ms)]
        writer.writerow(
            [run.name, run.number, run.seed, *cells, run.status, run.epochs, *numbers, f"{run.train_seconds:.1f}",
             f"{run.seconds:.1f}", run.reason]
        )  # fmt: skip
    return text.getvalue()
