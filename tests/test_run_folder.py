from __future__ import annotations

import dataclasses
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
from conftest import with_fields

from diffvit.config import RunConfig
from diffvit.training import run_folder
from diffvit.training.run_folder import open_run, write_results


def test_new_then_continued_then_finished(tiny_config: RunConfig) -> None:
    assert open_run(tiny_config) is None
    assert (tiny_config.folder / "config.json").is_file()
    moved = with_fields(tiny_config, scale={"workers": 3})
    assert open_run(moved) is None  # another number of workers is the same run
    write_results(tiny_config.folder, {"status": "finished"})
    results = open_run(tiny_config)
    assert results is not None
    assert results["status"] == "finished"
    assert results["versions"]["torch"]
    assert sorted(path.name for path in tiny_config.folder.iterdir()) == ["config.json", "results.json"]


def test_another_config_is_refused_with_the_fields(tiny_config: RunConfig) -> None:
    open_run(tiny_config)
    other = with_fields(dataclasses.replace(tiny_config, seed=9), model={"depth": 5})
    with pytest.raises(ValueError, match=r"(?s)seed: 0 there, 9 now.*model.depth: 2 there, 5 now"):
        open_run(other)


def test_a_folder_that_is_no_run_is_left_alone(tiny_config: RunConfig) -> None:
    tiny_config.folder.mkdir(parents=True)
    (tiny_config.folder / "thesis.tex").write_text("do not lose me")
    with pytest.raises(ValueError, match="it is not a run"):
        open_run(tiny_config)


def test_unreadable_config_is_said(tiny_config: RunConfig) -> None:
    tiny_config.folder.mkdir(parents=True)
    (tiny_config.folder / "config.json").write_text('{"name": ')
    with pytest.raises(ValueError, match="is not a run config of this version"):
        open_run(tiny_config)


def test_too_little_space(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 5 * 2**20))
    with pytest.raises(ValueError, match=r"has 5 MiB free, this model's checkpoints need 64 MiB"):
        open_run(tiny_config)


def test_full_disk(tiny_config: RunConfig, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(3 * 2**19))
    config = dataclasses.replace(tiny_config, storage=str(small_disk))
    with pytest.raises(ValueError, match="cannot be written: No space left on device"):
        open_run(config)


def test_read_only_disk(tiny_config: RunConfig, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    config = dataclasses.replace(tiny_config, storage=str(small_disk))
    with pytest.raises(ValueError, match="cannot be written: Read-only file system"):
        open_run(config)


def test_storage_below_a_file(tiny_config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written: Not a directory"):
        open_run(dataclasses.replace(tiny_config, storage=str(tmp_path / "file")))
