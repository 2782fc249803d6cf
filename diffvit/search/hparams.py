"""TensorBoard's HParams tab: the varied fields of every trial against what it reached.

Written by the driver when a trial ends, because a trial that ASHA stops is ended from outside and writes nothing more.
"""

from __future__ import annotations

from pathlib import Path

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams import summary_v2 as hp
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard.summary import scalar

from diffvit.config import RunConfig
from diffvit.search.records import Record
from diffvit.search.space import Space
from diffvit.training.tracking import TENSORBOARD_FOLDER

METRICS = {"search/best_top1": "best top-1", "search/epochs": "epochs", "search/latency_ms": "ms an image"}
"""Tag and the name that the tab shows."""


def write_experiment(folder: Path, space: Space, recipe: RunConfig, *, with_latency: bool) -> None:
    """Name the columns of the tab, once a sweep."""
    trials = folder / "trials"
    if list(trials.glob("events.*")):
        return
    tags = [tag for tag in METRICS if with_latency or tag != "search/latency_ms"]
    columns = hp.hparams_config_pb(
        hparams=[hp.HParam(name, _domain(name, space, recipe)) for name in space.varied(recipe)],
        metrics=[hp.Metric(tag, display_name=METRICS[tag]) for tag in tags],
    )
    _write(trials, columns)


def _domain(name: str, space: Space, recipe: RunConfig) -> hp.Domain | None:
    """What TensorBoard offers as filter, scale and colour of a column; without one it takes numbers for text."""
    choices = space.choices(name, recipe)
    if choices is not None:
        return hp.Discrete(choices)
    return None if name == "lambda_init" else hp.RealInterval(*map(float, getattr(space, name)))


def write_trial(folder: Path, record: Record) -> None:
    """Put a trial that ended into the tab, beside its own curves."""
    scalars = {
        "search/best_top1": record.best_top1,
        "search/epochs": float(record.epochs),
        "search/latency_ms": record.latency_ms,
    }
    values = {name: _cell(name, value) for name, value in record.values.items()}
    _write(
        folder / record.name / TENSORBOARD_FOLDER,
        hp.hparams_pb(values, trial_id=record.name),
        *(scalar(tag, value) for tag, value in scalars.items() if value is not None),
        _ending(api_pb2.STATUS_FAILURE if record.status == "failed" else api_pb2.STATUS_SUCCESS),
    )


def _cell(name: str, value: object) -> object:
    """lambda_init as text of equal length, so that one ordered column holds constants and the depth schedule."""
    return f"{value:.3f}" if name == "lambda_init" and isinstance(value, float) else value


def _ending(status: int) -> Summary:
    info = HParamsPluginData(session_end_info=SessionEndInfo(status=status), version=metadata.PLUGIN_DATA_VERSION)
    value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=metadata.create_summary_metadata(info))
    return Summary(value=[value])


def _write(folder: Path, *summaries: Summary) -> None:
    writer = FileWriter(str(folder))
    for part in summaries:
        writer.add_summary(part, 0)
    writer.close()
