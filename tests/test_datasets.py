import errno
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import make_folder, make_image

from diffvit.config import DataConfig
from diffvit.data.datasets import open_dataset
from diffvit.storage import StorageError


def keys(split) -> list[str]:
    return [split.key(i) for i in range(len(split))]


def test_embedded_sample_is_balanced_and_readable() -> None:
    dataset = open_dataset(DataConfig())
    assert (len(dataset.train), len(dataset.val), len(dataset.classes)) == (10_000, 2_000, 10)
    assert np.bincount(dataset.train.labels).tolist() == [1000] * 10
    assert np.bincount(dataset.val.labels).tolist() == [200] * 10
    assert len(set(keys(dataset.train) + keys(dataset.val))) == 12_000
    (image,) = dataset.val.read_many(np.array([1999]))
    assert image.startswith(b"\x89PNG")


def test_folder_with_its_own_validation(folder: Path) -> None:
    dataset = open_dataset(DataConfig(path=str(folder)))
    assert dataset.classes == ("blue", "green", "red")
    assert (len(dataset.train), len(dataset.val)) == (36, 15)
    assert dataset.train.key(13) == "train/green/001.png"
    assert dataset.train.labels[13] == 1
    (folder / "train/green/002.png").unlink()
    there, gone = dataset.train.read_many(np.array([13, 14]))
    assert there == (folder / "train/green/001.png").read_bytes()
    assert isinstance(gone, FileNotFoundError)


def test_classes_that_are_numbers_are_ordered_as_in_shards(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("0", "1", "2", "10"):
            make_image(tmp_path / split / name / "a.png", hue=0, seed=0)
    dataset = open_dataset(DataConfig(path=str(tmp_path)))
    assert dataset.classes == ("0", "1", "2", "10")
    assert [dataset.val.key(row) for row in range(4)] == ["val/0/a.png", "val/1/a.png", "val/2/a.png", "val/10/a.png"]
    assert dataset.val.labels.tolist() == [0, 1, 2, 3]


def test_split_is_balanced_seeded_and_disjoint(tmp_path: Path) -> None:
    root = make_folder(tmp_path, images_per_class=10)
    dataset = open_dataset(DataConfig(path=str(root), val_fraction=0.3))
    assert np.bincount(dataset.val.labels).tolist() == [3, 3, 3]
    assert len(set(keys(dataset.train)) | set(keys(dataset.val))) == 30
    again = open_dataset(DataConfig(path=str(root), val_fraction=0.3))
    other = open_dataset(DataConfig(path=str(root), val_fraction=0.3, split_seed=1))
    assert keys(again.val) == keys(dataset.val)
    assert keys(other.val) != keys(dataset.val)


def test_one_image_of_a_class_is_always_held_out_and_one_kept(tmp_path: Path) -> None:
    root = make_folder(tmp_path, images_per_class=2)
    dataset = open_dataset(DataConfig(path=str(root), val_fraction=0.01))
    assert (len(dataset.train), len(dataset.val)) == (3, 3)


def test_train_folder_alone_is_split(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", images_per_class=10)
    assert len(open_dataset(DataConfig(path=str(tmp_path))).val) == 3


def test_a_class_called_train_is_no_split(tmp_path: Path) -> None:
    root = make_folder(tmp_path, images_per_class=3)
    (root / "red").rename(root / "train")
    assert open_dataset(DataConfig(path=str(root))).classes == ("blue", "green", "train")


def test_nested_folders_belong_to_their_class_and_other_files_do_not_count(tmp_path: Path) -> None:
    root = make_folder(tmp_path, images_per_class=3)
    make_image(root / "red" / "deeper" / "x.PNG", hue=0, seed=1)
    (root / "red" / "notes.txt").write_text("no image")
    (root / "red" / "._hidden.png").write_text("no image")
    dataset = open_dataset(DataConfig(path=str(root)))
    assert len(dataset.train) + len(dataset.val) == 10


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "in", images_per_class=3)
    (root / "red").rename(tmp_path / "elsewhere")
    (root / "red/more").mkdir(parents=True)
    (root / "red/more/link").symlink_to(tmp_path / "elsewhere")
    dataset = open_dataset(DataConfig(path=str(root)))
    assert sum(key.startswith("red/more/link/") for key in keys(dataset.train) + keys(dataset.val)) == 3


def refusal(path: Path | str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        open_dataset(DataConfig(path=str(path)))
    return str(caught.value)


def test_refusals_name_the_folder_and_the_rule(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "--data.path" in refusal("")
    (tmp_path / "file").write_text("")
    assert "it is a file" in refusal(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "at least 2 class folders, <class>/<image>, it has none" in refusal(tmp_path / "empty")
    make_folder(tmp_path / "wrapped/images")
    assert "only 'images'; where that is a folder around the classes, name it" in refusal(tmp_path / "wrapped")
    root = make_folder(tmp_path / "a", images_per_class=3)
    (root / "yellow").mkdir()
    assert "1 class folders" in refusal(root)
    assert "yellow" in refusal(root)
    root = make_folder(tmp_path / "b", images_per_class=1)
    assert "has one image" in refusal(root)
    root = make_folder(tmp_path / "c", images_per_class=3, val_per_class=2)
    make_image(root / "val" / "yellow" / "0.png", hue=0, seed=0)
    assert "only one has: yellow" in refusal(root)
    root = make_folder(tmp_path / "d", images_per_class=3)
    with open(bytes(root) + b"/red/\xfe.png", "wb"):  # noqa: PTH123
        pass
    assert refusal(root) == r"names of files must be UTF-8, got red/\xfe.png; rename it"


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "a", images_per_class=4, val_per_class=2)
    (tmp_path / "more").mkdir()
    make_image(tmp_path / "more/9.png", hue=0, seed=9)
    for name, target in (("self", "."), ("up", ".."), ("more", tmp_path / "more"), ("again", tmp_path / "more")):
        (root / "train/red" / name).symlink_to(target)
    train = open_dataset(DataConfig(path=str(root))).train
    keys = [train.key(index) for index in range(len(train))]
    assert len(keys) == 3 * 4 + 1
    assert [key for key in keys if key.endswith("9.png")] == ["train/red/again/9.png"]


def test_a_pipe_is_no_image_and_a_link_to_nothing_is_one_that_cannot_be_read(tmp_path: Path) -> None:
    """To read a pipe would never end."""
    root = make_folder(tmp_path / "a", images_per_class=4, val_per_class=2)
    os.mkfifo(root / "train/red/pipe.png")
    (root / "train/red/endless.png").symlink_to("/dev/zero")
    (root / "train/red/gone.png").symlink_to("nowhere")
    (root / "train/red/loop.png").symlink_to("loop.png")
    found = keys(open_dataset(DataConfig(path=str(root))).train)
    assert len(found) == 3 * 4 + 2
    assert {"train/red/gone.png", "train/red/loop.png"} < set(found)


def test_splits_are_found_by_their_name_in_any_case_and_hidden_folders_are_left_out(tmp_path: Path) -> None:
    root = make_folder(tmp_path, images_per_class=4, val_per_class=2)
    (root / "train").rename(root / "Train")
    make_folder(tmp_path / "both/train", 2)
    make_folder(tmp_path / "both/Train", 5)
    make_folder(tmp_path / "both/val", 2)
    assert len(open_dataset(DataConfig(path=str(tmp_path / "both"))).train) == 6
    (root / "val").rename(root / "TEST")
    make_image(root / "Train/red/.ipynb_checkpoints/000-checkpoint.png", hue=0, seed=0)
    dataset = open_dataset(DataConfig(path=str(root)))
    assert (dataset.classes, len(dataset.train), len(dataset.val)) == (("blue", "green", "red"), 12, 6)
    assert dataset.train.key(0) == "Train/blue/000.png"


def test_what_the_machine_cannot_read_is_no_fault_of_an_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_dataset(DataConfig(path=str(folder))).train
    (folder / "train/blue/001.png").unlink()
    first, gone, third = split.read_many(np.arange(3))
    assert isinstance(first, bytes)
    assert isinstance(third, bytes)
    assert isinstance(gone, FileNotFoundError)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(StorageError, match=f"{folder} cannot be read on the node .*: Input/output error"):
            next(split.read_many(np.arange(1)))
    folder.rename(folder.with_name("elsewhere"))  # as on a node that has not mounted it
    with pytest.raises(StorageError, match="No such file or directory"):
        next(split.read_many(np.arange(1)))
