"""A sweep from its first trial to its answer: `run_sweep`, read top to bottom.

Trials are judged on images held out of the training set; the best configurations are trained again with new seeds and
compared on the same images; the winner alone is then scored, once, on the recipe's own validation split.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from diffvit.config import RunConfig, from_json, to_json
from diffvit.data.datasets import open_dataset
from diffvit.data.fingerprint import fingerprint_of
from diffvit.data.loader import plan_run
from diffvit.data.subset import parted_for_search
from diffvit.search.cluster import connect_for, require_shared
from diffvit.search.config import SweepConfig
from diffvit.search.folder import SWEEP_FILE, open_sweep, write_atomically
from diffvit.search.records import Candidate, Journal, ranked
from diffvit.search.report import write_report
from diffvit.search.sitting import Sitting, SweepFailed
from diffvit.training.compilation import require_compiler
from diffvit.training.resolve import require_weights, resolve
from diffvit.training.run_folder import RESULTS_NAME, write_results
from diffvit.training.run_lock import RunLock

__all__ = ["SweepFailed", "run_sweep"]


def run_sweep(sweep: SweepConfig) -> dict[str, Any]:
    """Run, or continue, a sweep; its results, which are also in `results.json`.

    Raises:
        ValueError: data, weights, name, storage or cluster do not fit the sweep; found before the first trial.
        SweepFailed: no trial came to its end; says why the last one did not.
        KeyboardInterrupt: the user ended the sweep; the same call continues it.
    """
    started = time.monotonic()
    require_compiler(sweep.run.scale)
    dataset = open_dataset(sweep.run.data)
    sweep = dataclasses.replace(sweep, run=resolve(sweep.run, dataset))
    parted = parted_for_search(dataset, sweep.search.holdout, sweep.search.seed)
    if len(parted.train) < sweep.run.optim.batch_size:
        raise ValueError(
            f"optim.batch_size must not exceed the {len(parted.train)} training images that search.holdout = "
            f"{sweep.search.holdout} leaves, got {sweep.run.optim.batch_size}"
        )
    plan_run(sweep.trial_recipe, parted, sweep.search.workers_per_trial)
    require_weights(sweep.run)
    connect_for(sweep)
    folder = sweep.run.folder
    with RunLock(folder):
        open_sweep(sweep, fingerprint_of(dataset))
        require_shared(folder / SWEEP_FILE)
        sitting = Sitting(sweep, parted)
        (folder / RESULTS_NAME).unlink(missing_ok=True)  # of an earlier sitting, which may have had less to find
        sitting.search()
        write_report(sweep, sitting.journal)
        finalists = sitting.compare_finalists()
        winner = finalists[0]
        write_recipes(sweep, winner, sitting.journal)
        val = sitting.score_once(winner, dataset)
        results = {"status": "finished", **summary(sweep, sitting.journal, finalists, val)}
        results["wall_seconds"] = round(time.monotonic() - started, 1)
        write_results(folder, results)
        sitting.write_csv()
        write_report(sweep, sitting.journal, results, finalists)
    return results


def write_recipes(sweep: SweepConfig, winner: Candidate, journal: Journal) -> None:
    """`best.json` and, with two objectives, `pareto/<number>.json` for each point of the front; pretrain takes them."""
    folder = sweep.run.folder
    write_atomically(folder / "best.json", to_json(_as_recipe(sweep, winner.runs[0].config, "best")))
    if len(sweep.search.objective) > 1:
        shutil.rmtree(folder / "pareto", ignore_errors=True)  # of an earlier sitting, whose front was another
        (folder / "pareto").mkdir()
        for run in ranked(journal.records("trial"), sweep.search.objective):
            number = f"{run.number:04d}"
            write_atomically(folder / "pareto" / f"{number}.json", to_json(_as_recipe(sweep, run.config, number)))


def _as_recipe(sweep: SweepConfig, config: str, suffix: str) -> RunConfig:
    """The sweep's own recipe, seed and scale with the values of one of its runs."""
    chosen = from_json(config, "a run's config")
    return dataclasses.replace(sweep.run, name=f"{sweep.run.name}-{suffix}", model=chosen.model, optim=chosen.optim)


def summary(
    sweep: SweepConfig, journal: Journal, finalists: Sequence[Candidate], val: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """What the sweep found, for `results.json`; `val` are the winner's scores on the validation split."""
    trials = journal.records("trial")
    winner = finalists[0]
    return {
        "winner": {
            **_described(winner),
            "val_top1": _spread([run["top1"] for run in val]),
            "val_loss": _spread([run["loss"] for run in val]),
        },
        "val_looked_at": journal.scored(),
        "finalists": [_described(finalist) for finalist in finalists],
        "finalists_failed": [
            f"{run.name} failed: {run.reason}" for run in journal.records("finalist") if run.status == "failed"
        ],
        "pareto_front": [
            {"number": run.number, "values": run.values, "top1": run.best_top1, "latency_ms": run.latency_ms}
            for run in ranked(trials, sweep.search.objective)
        ]
        if len(sweep.search.objective) > 1
        else None,
        "trials": dict(Counter(run.status for run in trials)),
        "epochs_trained": {
            "trials": sum(run.epochs for run in trials),
            "finalists": sum(run.epochs for run in journal.records("finalist")),
        },
    }


def _described(finalist: Candidate) -> dict[str, Any]:
    return {"number": finalist.number, "values": finalist.values, "search_top1": _spread(finalist.top1)}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "seeds": len(values), "values": list(values)}
