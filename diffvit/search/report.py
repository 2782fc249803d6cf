"""`report.html`: what a sweep tried, what it found and what that cost, in one page that needs nothing else."""

from __future__ import annotations

import base64
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import optuna
from jinja2 import Environment, PackageLoader
from optuna.trial import TrialState

from diffvit.search import figures
from diffvit.search.config import SweepConfig
from diffvit.search.console import looked_at, mean_and_std, shown
from diffvit.search.folder import write_atomically
from diffvit.search.records import Candidate, Journal, candidates, ranked

REPORT_FILE = "report.html"
_MIN_TRIALS_FOR_IMPORTANCE = 12
_TOP_QUANTILE = 0.25
"""Importance is that for reaching the best quarter of the trials."""


def write_report(
    sweep: SweepConfig,
    journal: Journal,
    results: dict[str, Any] | None = None,
    finalists: Sequence[Candidate] | None = None,
) -> None:
    """Write the page; `results` (see `diffvit.search.sweep.summary`) and the `finalists` once there is a winner."""
    write_atomically(sweep.run.folder / REPORT_FILE, render(sweep, journal, results, finalists))


def render(
    sweep: SweepConfig,
    journal: Journal,
    results: dict[str, Any] | None,
    finalists: Sequence[Candidate] | None = None,
) -> str:
    """The page as HTML. Every text in it is escaped; the figures are SVG inside of it.

    `finalists` are those that `results` are of; None: all that were ever trained.
    """
    columns = sweep.space.varied(sweep.run)
    trials, again = journal.records("trial"), journal.records("finalist")
    page = Environment(loader=PackageLoader("diffvit.search"), autoescape=True).get_template(REPORT_FILE)
    return page.render(
        name=sweep.run.name,
        sweep=sweep,
        space=sweep.space.describe(sweep.run),
        columns=columns,
        results=results,
        counts=Counter(run.status for run in trials),
        epochs={"trials": sum(run.epochs for run in trials), "finalists": sum(run.epochs for run in again)},
        runs=sorted(trials, key=lambda run: (-(run.best_top1 or -1.0), run.number)),
        figures=_figures(sweep, journal, columns, candidates(again) if finalists is None else finalists),
        shown=shown,
        mean_and_std=mean_and_std,
        looked_at=looked_at,
    )


def _figures(
    sweep: SweepConfig, journal: Journal, columns: list[str], finalists: Sequence[Candidate]
) -> dict[str, dict[str, str]]:
    """`{section: {caption: data URI}}`; a section that the trials cannot fill is left out."""
    trials = journal.records("trial")
    if not ranked(trials, ["top1"]):
        return {}
    shares = importances(journal)
    made = {
        "Finalists": {"every seed of the finalists": figures.finalists(finalists)} if finalists else {},
        "Accuracy against time": {"the Pareto front": figures.pareto(trials)}
        if len(sweep.search.objective) > 1
        else {},
        "All trials": {"values and what they reached": figures.parallel_coordinates(trials, columns)},
        "Importance": {"importance of each parameter": figures.importance(shares)} if shares else {},
        "Slices": {f"{name} against top-1": svg for name, svg in figures.slices(trials, columns).items()},
        "Learning curves": {"top-1 by epoch": figures.learning_curves(trials)},
        "Spent and found": {"best top-1 against epochs trained": figures.budget(trials)},
    }
    return {
        section: {caption: _data_uri(svg) for caption, svg in images.items()}
        for section, images in made.items()
        if images
    }


def importances(journal: Journal) -> dict[str, float] | None:
    """Share of each parameter in reaching the best quarter, by PED-ANOVA (arXiv 2304.10255); None for few trials.

    Parameters that only some trials draw are left out: the best quarter has too few of them to tell (one lone constant
    of lambda_init among 24 trials once came out with 0.97).
    """
    complete = [t for t in journal.study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    if len(complete) < _MIN_TRIALS_FOR_IMPORTANCE:
        return None
    shared = sorted(set.intersection(*(set(trial.params) for trial in complete)))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_TOP_QUANTILE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental, and that a target is minimised, which the sign accounts for
        found = optuna.importance.get_param_importances(
            journal.study, evaluator=evaluator, params=shared, target=lambda trial: -float(trial.values[0])
        )
    return dict(found) or None


def _data_uri(svg: str) -> str:
    """Images and not inline SVG, whose identifiers would meet those of the other figures."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
