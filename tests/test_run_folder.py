from __future__ import annotations

import dataclasses
import os
import subprocess
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from conftest import with_fields

from diffvit.config import RunConfig, from_json, to_json
from diffvit.data.fingerprint import Fingerprint, SplitFingerprint, known_images
from diffvit.storage import Storage
from diffvit.training import run_folder
from diffvit.training.run_folder import begun, close_run, not_the_same_folder, open_run, write_results

IMAGES = Fingerprint(SplitFingerprint(36, "a"), SplitFingerprint(15, "b"))


def test_new_then_continued_then_finished(tiny_config: RunConfig) -> None:
    assert open_run(tiny_config, IMAGES) is None
    assert (tiny_config.folder / "config.json").is_file()
    moved = with_fields(tiny_config, scale={"workers": 3})
    assert open_run(moved, IMAGES) is None  # another number of workers is the same run
    write_results(tiny_config.folder, {"status": "finished"})
    results = open_run(tiny_config, IMAGES)
    assert results is not None
    assert results["status"] == "finished"
    assert results["versions"]["torch"]
    assert sorted(path.name for path in tiny_config.folder.iterdir()) == ["config.json", "data.json", "results.json"]


def test_another_config_is_refused_with_the_fields(tiny_config: RunConfig) -> None:
    _open_and_train(tiny_config)
    other = with_fields(dataclasses.replace(tiny_config, seed=9), model={"depth": 5})
    with pytest.raises(ValueError, match=r"(?s)seed: 0 there, 9 now.*model.depth: 2 there, 5 now"):
        open_run(other, IMAGES)


@pytest.mark.parametrize(
    ("results", "begins_again"),
    [
        (None, True),
        ({"status": "failed", "last": None}, True),
        ({"status": "interrupted", "last": {"step": 3}}, False),  # its checkpoints were moved elsewhere
        ({"status": "finished", "last": {"step": 3}}, False),
    ],
)
def test_a_run_that_learnt_nothing_may_begin_with_another_config(
    tiny_config: RunConfig, results: dict[str, Any] | None, begins_again: bool
) -> None:
    open_run(tiny_config, IMAGES)
    if results is not None:
        write_results(tiny_config.folder, results)
    for name in ("interruptions.json", "skipped.txt", "tensorboard/events.1", "audit/1.parquet", "mine.txt"):
        (tiny_config.folder / name).parent.mkdir(exist_ok=True)
        (tiny_config.folder / name).write_text("of the run before")
    if begins_again:
        open_run(with_fields(tiny_config, scale={"workers": 3}), IMAGES)
        assert (tiny_config.folder / "interruptions.json").exists()  # it is the same run
    other = with_fields(tiny_config, data={"path": "/elsewhere"}, optim={"lr": 0.5})
    with pytest.raises(ValueError, match=r"exists in .*choose another --name or leave --resume on"):
        open_run(dataclasses.replace(other, resume=False), IMAGES)
    images = Fingerprint(IMAGES.training, SplitFingerprint(15, "c"))
    if not begins_again:
        with pytest.raises(ValueError, match=r"optim\.lr: "):
            open_run(other, images)
        return
    open_run(other, images)
    assert from_json((tiny_config.folder / "config.json").read_bytes(), "test") == other
    assert known_images(Storage(other.location)) == images
    assert {path.name for path in tiny_config.folder.iterdir()} == {"config.json", "data.json", "mine.txt"}


def _open_and_train(config: RunConfig) -> None:
    open_run(config, IMAGES)
    (config.folder / "checkpoint_step_00000003").mkdir()


def test_a_folder_that_is_no_run_is_left_alone(tiny_config: RunConfig) -> None:
    tiny_config.folder.mkdir(parents=True)
    (tiny_config.folder / "thesis.tex").write_text("do not lose me")
    with pytest.raises(ValueError, match="it is not a run"):
        open_run(tiny_config, IMAGES)


def test_unreadable_config_is_said(tiny_config: RunConfig) -> None:
    tiny_config.folder.mkdir(parents=True)
    (tiny_config.folder / "config.json").write_text('{"name": ')
    (tiny_config.folder / "checkpoint_step_00000003").mkdir()
    with pytest.raises(ValueError, match="is not a run config of this version"):
        open_run(tiny_config, IMAGES)


def test_too_little_space(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 5 * 2**20))
    with pytest.raises(ValueError, match=r"has 5 MiB free, this model's checkpoints need 64 MiB"):
        open_run(tiny_config, IMAGES)


def test_a_folder_that_is_not_shared_is_found(tiny_config: RunConfig) -> None:
    open_run(tiny_config, IMAGES)
    assert not_the_same_folder(tiny_config) is None
    (tiny_config.folder / "config.json").write_text(to_json(dataclasses.replace(tiny_config, seed=9)))  # an older run's
    assert "is not the one that this job has written" in str(not_the_same_folder(tiny_config))
    (tiny_config.folder / "config.json").unlink()
    assert "storage must be a folder that every node sees" in str(not_the_same_folder(tiny_config))


def test_what_is_there_needs_no_more_space(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_SPARE_BYTES", 0)
    monkeypatch.setattr(run_folder, "_checkpoint_bytes", lambda _: 2**20)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 3 * 2**19))
    with pytest.raises(ValueError, match=r"has 2 MiB free, this model's checkpoints need 5 MiB"):
        open_run(tiny_config, IMAGES)
    for step in (1, 2, 3, 4):  # the fifth is the one being written
        (tiny_config.folder / f"checkpoint_step_{step:08d}").mkdir()
    (tiny_config.folder / "config.json").write_text(to_json(tiny_config))
    open_run(tiny_config, IMAGES)
    write_results(tiny_config.folder, {"status": "finished"})
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 0))
    assert open_run(tiny_config, IMAGES) is not None  # a finished run needs none


def test_what_killed_writers_left_is_swept(tiny_config: RunConfig) -> None:
    open_run(tiny_config, IMAGES)
    (tiny_config.folder / "audit").mkdir()
    part = "audit/.00000000-00000003-0000.parquet.17.unfinished"
    old = [".alive.json.17.unfinished", part, f".run.lock.{'a' * 32}", ".write-test-17"]
    for name in (*old, ".fresh.json.18.unfinished", ".mine", ".mine.17"):
        (tiny_config.folder / name).write_text("half")
    for name in (*old, ".mine", ".mine.17"):
        os.utime(tiny_config.folder / name, (0, 0))
    open_run(tiny_config, IMAGES)
    left = {str(path.relative_to(tiny_config.folder)) for path in tiny_config.folder.rglob("*")}
    assert left == {"audit", "config.json", "data.json", ".fresh.json.18.unfinished", ".mine", ".mine.17"}


def test_a_run_that_lost_its_storage_says_why_it_ended(tiny_config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a disk that went away")
    results = close_run(tiny_config, "stopped", "no checkpoint could be written", 0.0)
    assert results["reason"] == "no checkpoint could be written"
    with pytest.raises(OSError, match="Not a directory"):
        close_run(tiny_config, "finished", None, 0.0)


def test_full_disk(tiny_config: RunConfig, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(3 * 2**19))
    config = dataclasses.replace(tiny_config, storage=str(small_disk))
    with pytest.raises(ValueError, match="cannot be written: No space left on device"):
        open_run(config, IMAGES)


def test_read_only_disk(tiny_config: RunConfig, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    config = dataclasses.replace(tiny_config, storage=str(small_disk))
    with pytest.raises(ValueError, match="cannot be written: Read-only file system"):
        open_run(config, IMAGES)


def test_storage_below_a_file(tiny_config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written: Not a directory"):
        open_run(dataclasses.replace(tiny_config, storage=str(tmp_path / "file")), IMAGES)


def test_results_of_a_sitting_that_was_cut_go_and_damaged_ones_are_no_matter(tiny_config: RunConfig) -> None:
    """While the next one is under way they would name a best checkpoint that is none any more."""
    open_run(tiny_config, IMAGES)
    write_results(tiny_config.folder, {"status": "interrupted"})
    earlier = open_run(tiny_config, IMAGES)
    assert earlier is not None
    assert earlier["status"] == "interrupted"
    for content in ("", "{}", "[]", '{"status": '):
        (tiny_config.folder / "results.json").write_text(content)
        assert open_run(tiny_config, IMAGES) is None
        assert not (tiny_config.folder / "results.json").exists()


@pytest.mark.parametrize(
    ("now", "problem"),
    [
        (
            Fingerprint(SplitFingerprint(72, "c"), IMAGES.validation),
            r"with 36 training images, .* has 72 now; bring them",
        ),
        (
            Fingerprint(IMAGES.training, SplitFingerprint(14, "c")),
            r"with 15 validation images, .* has 14 now; bring them",
        ),
        (
            Fingerprint(SplitFingerprint(36, "c"), IMAGES.validation),
            r"has 36 now, but with other names, labels or in anoth",
        ),
    ],
)
def test_other_images_are_refused(tiny_config: RunConfig, now: Fingerprint, problem: str) -> None:
    _open_and_train(tiny_config)
    with pytest.raises(ValueError, match=problem):
        open_run(tiny_config, now)
    (tiny_config.folder / "data.json").unlink()
    open_run(tiny_config, now)  # of an earlier version, which did not say
    with pytest.raises(ValueError, match="bring them back"):
        open_run(tiny_config, IMAGES)


def test_a_damaged_fingerprint_is_said(tiny_config: RunConfig) -> None:
    _open_and_train(tiny_config)
    (tiny_config.folder / "data.json").write_text('{"training": ')
    with pytest.raises(ValueError, match=r"tiny/data\.json is damaged: .*; delete it if"):
        open_run(tiny_config, IMAGES)


def test_images_may_move_but_not_change_on_the_way(tiny_config: RunConfig) -> None:
    _open_and_train(tiny_config)
    elsewhere = with_fields(tiny_config, data={"path": "/elsewhere"})
    with pytest.raises(ValueError, match=r"with 15 validation images, /elsewhere has 15 now, but with other names"):
        open_run(elsewhere, Fingerprint(IMAGES.training, SplitFingerprint(15, "c")))
    open_run(elsewhere, IMAGES)
    assert from_json((tiny_config.folder / "config.json").read_bytes(), "test").data.path == "/elsewhere"
    with pytest.raises(ValueError, match=r"optim\.lr: "):
        open_run(with_fields(tiny_config, optim={"lr": 0.5}), IMAGES)
    write_results(tiny_config.folder, {"status": "finished"})
    assert open_run(with_fields(tiny_config, scale={"workers": 3}), IMAGES) is not None  # back at its first place
    assert from_json((tiny_config.folder / "config.json").read_bytes(), "test") == tiny_config
    (tiny_config.folder / "data.json").unlink()
    with pytest.raises(ValueError, match=r"data\.path: .* there, '/elsewhere' now"):
        open_run(elsewhere, IMAGES)


def test_a_run_goes_on_from_its_first_checkpoint_on(tiny_config: RunConfig) -> None:
    assert begun(tiny_config) is None
    open_run(tiny_config, IMAGES)
    (tiny_config.folder / "checkpoint_step_00000003_good").mkdir()
    assert begun(tiny_config) is None
    (tiny_config.folder / "checkpoint_step_00000003").mkdir()
    assert begun(tiny_config) == tiny_config


def test_a_start_that_was_killed_does_not_block_the_name(tiny_config: RunConfig) -> None:
    tiny_config.folder.mkdir(parents=True)
    for name in (".write-test-123", ".config.json.123.unfinished"):
        (tiny_config.folder / name).write_text("half")
    assert open_run(tiny_config, IMAGES) is None


def test_a_run_that_was_begun_with_no_resume_can_be_continued_from_its_config(tiny_config: RunConfig) -> None:
    begun = dataclasses.replace(tiny_config, resume=False)
    open_run(begun, IMAGES)
    assert not_the_same_folder(begun) is None
    written = from_json((tiny_config.folder / "config.json").read_bytes(), "test")
    assert written == tiny_config
    open_run(written, IMAGES)
