"""What README.md and RESULTS.md tell one to type is understood, and the example in Python runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_image, with_fields

from diffvit import cli
from diffvit.config import ExportConfig, PredictConfig, PrepareConfig, RunConfig
from diffvit.data.datasets import open_dataset
from diffvit.training.alone import train_alone

ROOT = Path(__file__).parents[1]
PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "pretrain": lambda arguments: cli.parse_pretrain_config("", arguments),
    "compare": lambda arguments: cli.parse_compare_config("", arguments),
    "tune": lambda arguments: cli.parse_sweep_config("", arguments),
    "prepare": lambda arguments: cli.parse_options(PrepareConfig, "", arguments),
    "predict": lambda arguments: cli.parse_options(PredictConfig, "", arguments),
    "export": lambda arguments: cli.parse_options(ExportConfig, "", arguments),
}  # finetune.py asks the weights for their model


def commands() -> list[tuple[str, str]]:
    text = "".join((ROOT / name).read_text().replace("\\\n", "") for name in ("README.md", "RESULTS.md"))
    found = re.findall(r"python ray_jobs/(\w+)\.py ([^`#\n]+)", text)
    asking = ("--help", "--config runs/")  # for help, or for a file of an earlier run
    return [(job, options) for job, options in found if job in PARSERS and not any(word in options for word in asking)]


def test_there_are_commands_of_every_job() -> None:
    assert {job for job, _ in commands()} == PARSERS.keys()


@pytest.mark.parametrize(("job", "options"), commands())
def test_commands_are_understood(job: str, options: str) -> None:
    PARSERS[job](shlex.split(options))


def test_the_example_in_python_runs(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example, timms = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    dataset = open_dataset(tiny_config.data)
    config = with_fields(
        tiny_config,
        model={"num_classes": 3, "depth": 4},
        data={"classes": dataset.classes},
        optim={"epochs": 1, "warmup_epochs": 0.5},
    )
    train_alone(config, dataset)
    config.folder.rename(config.folder.with_name("sample"))
    make_image(tmp_path / "photo.jpg", hue=0, seed=1)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() in dataset.classes
    names: dict[str, Any] = {}
    exec(compile(timms.partition("load_weights(model")[0], "README.md", "exec"), names)
    assert names["model"].config.embed_dim == 256
