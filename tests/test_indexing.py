"""Every kind of source gives the same entries: key, class, split, and a place where the bytes really lie."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import subprocess
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import GoogleStore, ObjectStore, make_folder, make_image
from PIL import Image
from torchvision import datasets

from diffvit import storage as storage_module
from diffvit.config import SourceOptions
from diffvit.data import indexing, parquet_images, sources, tars
from diffvit.data.claim import require_outside
from diffvit.data.datasets import IMAGE_EXTENSIONS
from diffvit.data.images import FORMATS
from diffvit.data.indexing import find_units, index_unit
from diffvit.data.layout import plan_layout
from diffvit.data.packing import read_entries_content
from diffvit.data.sources import (
    Staging,
    ignored_in,
    join_entries,
    label_entries,
    listing_digest,
    read_labels,
)
from diffvit.data.tables import read_table, write_table
from diffvit.storage import Storage, StorageError


def index(source: Path | str, staging: Path, **options: object) -> dict[str, dict[str, object]]:
    """`{key: entry with its content}` of a whole source."""
    config = SourceOptions(**options)
    units = find_units(str(source), config)
    parts = [index_unit(unit, config, Staging(Storage(str(staging)), str(number))) for number, unit in enumerate(units)]
    table = label_entries(join_entries(units, parts), read_labels(config.labels))
    entries = {}
    for row, content in zip(table.to_pylist(), read_entries_content(table, 10**6), strict=True):
        assert row["key"] not in entries
        entries[row["key"]] = {**row, "content": content}
    return entries


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 3), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def make_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            add(tar, name, content)
    return path


def test_folder_with_splits(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "a", images_per_class=2, val_per_class=1)
    (root / "val").rename(root / "Validation")
    entries = index(root, tmp_path / "s")
    assert len(entries) == 9
    entry = entries["Validation/red/000.png"]
    assert (entry["split"], entry["class_name"]) == ("val", "red")
    assert entry["content"] == (root / "Validation/red/000.png").read_bytes()


def test_folder_without_splits_and_images_without_class(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "a", images_per_class=1)
    (root / "lost.png").write_bytes(picture(1))
    (root / ".hidden.png").write_bytes(picture(1))
    (root / "README.txt").write_text("no image")
    entries = index(root, tmp_path / "s")
    assert {key: e["class_name"] for key, e in entries.items()} == {
        "blue/000.png": "blue",
        "green/000.png": "green",
        "red/000.png": "red",
        "lost.png": None,
    }
    assert {e["split"] for e in entries.values()} == {None}


def test_a_class_called_train_is_no_split(tmp_path: Path) -> None:
    for name in ("bus/1.png", "train/2.png", "train/3.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(picture(1))
    entries = index(tmp_path / "in", tmp_path / "s")
    assert [(e["split"], e["class_name"]) for e in entries.values()] == [
        (None, "bus"),
        (None, "train"),
        (None, "train"),
    ]
    # beside a split of class folders, test is a split whose images have no class
    make_image(tmp_path / "in2/train/cat/1.png", hue=0, seed=0)
    make_image(tmp_path / "in2/test/2.png", hue=0, seed=0)
    entries = index(tmp_path / "in2", tmp_path / "s")
    assert [(e["split"], e["class_name"]) for e in entries.values()] == [("test", None), ("train", "cat")]


def test_what_lies_beside_the_splits_is_of_none(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "a", images_per_class=1, val_per_class=1)
    make_image(root / "extra/a/9.png", hue=0, seed=0)
    make_image(root / "8.png", hue=0, seed=0)
    entries = index(root, tmp_path / "s")
    assert {key for key, e in entries.items() if e["split"] == "beside"} == {"8.png", "extra/a/9.png"}
    names = ("train/a/0.png", "train/b/1.png", "val/a/2.png", "val/b/3.png", "more/a/4.png")
    path = make_tar(tmp_path / "x.tar", {name: picture(1) for name in names})
    in_tar = index(path, tmp_path / "s")
    assert [key for key, e in in_tar.items() if e["split"] == "beside"] == ["x.tar/more/a/4.png"]
    assert {e["class_name"] for e in entries.values()} == {"blue", "green", "red", None}


def test_links_to_nothing_and_pipes_do_not_vanish(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "a", images_per_class=1, val_per_class=1)
    (tmp_path / "elsewhere").mkdir()
    (root / "train/linked").symlink_to(tmp_path / "elsewhere")
    names = ("train/red/gone.png", "val/red/pipe.jpg", "train/linked/loop.png", "beside.png")
    for name in names:
        if name.endswith(".jpg"):
            os.mkfifo(root / name)
        else:
            (root / name).symlink_to(Path(name).name if "loop" in name else "nowhere")
    for name in (".hidden.png", "no-image.txt"):
        (root / "train/red" / name).symlink_to("nowhere")
    (root / "train/red/good.png").symlink_to(root / "train/red/000.png")
    entries = index(root, tmp_path / "s")
    assert {key: (e["split"], e["reason"]) for key, e in entries.items() if e["reason"]} == {
        "beside.png": ("beside", "a link to nothing, or no file"),
        "train/linked/loop.png": ("train", "a link to nothing, or no file"),
        "train/red/gone.png": ("train", "a link to nothing, or no file"),
        "val/red/pipe.jpg": ("val", "a link to nothing, or no file"),
    }
    assert entries["train/red/good.png"]["content"] == entries["train/red/000.png"]["content"]
    (unit,) = find_units(str(root / "train/red/000.png"), SourceOptions())
    assert unit.files == ("000.png",)


@pytest.mark.parametrize("ending", ["tar", "parquet"])
def test_an_archive_that_is_a_link_to_nothing_is_refused(tmp_path: Path, ending: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    if ending == "tar":
        make_tar(source / "0.tar", {"train/a/0.png": picture(1)})
    else:
        pq.write_table(pa.table({"image": [picture(1)], "label": ["a"]}), source / "0.parquet")
    (source / f".1.{ending}").symlink_to("nowhere")
    assert len(find_units(str(source), SourceOptions())) == 1
    (source / f"1.{ending}").symlink_to("nowhere")
    with pytest.raises(ValueError, match=rf"1 {ending} files that are links to nothing.* such as '1.{ending}': bring"):
        find_units(str(source), SourceOptions())
    (source / f"1.{ending}").unlink()
    (source / "1.png").symlink_to("nowhere")
    with pytest.raises(ValueError, match=rf"must be of one kind, it holds 1 folder files, 1 {ending} files"):
        find_units(str(source), SourceOptions())


def test_files_of_other_kinds_are_counted(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "a", images_per_class=1)
    for name in ("a.txt", "red/b.TXT", "c.heic", "Makefile", ".hidden", "red/._1.jpg", ".thumbs/1.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("no image")
    (unit,) = find_units(str(root), SourceOptions())
    table = index_unit(unit, SourceOptions(), Staging(Storage(str(tmp_path)), "0"))
    write_table(Storage(str(tmp_path)), "x", table)
    assert ignored_in(read_table(Storage(str(tmp_path)), "x")) == {
        ".txt": 2,
        ".heic": 1,
        "(none)": 1,
        "(hidden)": 3,
    }
    files = {"a/1.png": picture(1), "a/1.cls": b"7", "a/1.txt": b"a cat", "a/2.heic": b""}
    make_tar(tmp_path / "t/x.tar", files)
    (tmp_path / "t/notes.md").write_text("no image")
    (unit,) = find_units(str(tmp_path / "t"), SourceOptions())
    table = index_unit(unit, SourceOptions(), Staging(Storage(str(tmp_path)), "0"))
    assert ignored_in(table) == {".md": 1, ".txt": 1, ".heic": 1}


def test_every_extension_that_is_read_is_listed() -> None:
    Image.init()
    read = {extension for extension, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")}
    assert read == IMAGE_EXTENSIONS


def test_links_to_folders_are_followed_but_not_round_in_circles(tmp_path: Path) -> None:
    for name in ("in/a/0.png", "in/b/1.png", "beside/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    (tmp_path / "in/a/up").symlink_to("..")
    (tmp_path / "in/c").symlink_to("../beside")
    (tmp_path / "in/d").symlink_to("../beside")
    (unit,) = find_units(str(tmp_path / "in"), SourceOptions())
    assert unit.files == ("a/0.png", "b/1.png", "c/2.png", "d/2.png")


def test_a_question_mark_is_part_of_a_folders_name(tmp_path: Path) -> None:
    folder = tmp_path / "what?now"
    (folder / "a").mkdir(parents=True)
    (folder / "a/0.png").write_bytes(picture(1))
    (unit,) = find_units(str(folder), SourceOptions())
    assert (unit.location, unit.files) == (str(folder), ("a/0.png",))
    Storage(str(folder)).child("below").write("x", b"1")
    assert (folder / "below/x").read_bytes() == b"1"


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", {b"a/\xff.png".decode(errors="surrogateescape"): picture(1)})
    assert index(path, tmp_path / "s")["x.tar/a/\\udcff.png"]["content"] == picture(1)
    with open(bytes(tmp_path) + b"/\xfe.png", "wb"):  # noqa: PTH123
        pass
    with pytest.raises(ValueError, match=r"names of files must be UTF-8, got .*/\\xfe\.png; rename it"):
        find_units(str(tmp_path), SourceOptions())


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tar_in_place_and_through_staging(tmp_path: Path, mode: str) -> None:
    files = {f"set/train/{c}/{i}.png": picture(10 * i + len(c)) for c in ("cat", "horse") for i in range(3)}
    name = "images.tar" if mode == "w" else "images.tar.gz"
    path = make_tar(tmp_path / name, files, mode)
    entries = index(path, tmp_path / "s")
    assert {key: e["content"] for key, e in entries.items()} == {f"{name}/{k}": v for k, v in files.items()}
    assert {(e["split"], e["class_name"]) for e in entries.values()} == {("train", "cat"), ("train", "horse")}
    assert (tmp_path / "s").exists() == (mode != "w")


def test_classes_of_a_tar_are_the_folders_below_a_split(tmp_path: Path) -> None:
    names = ("train/cat/indoor/1.png", "tiny-imagenet-200/train/n01/images/x.JPEG", "photos/2020/dog/1.png")
    path = make_tar(tmp_path / "x.tar", {name: picture(1) for name in names})
    entries = index(path, tmp_path / "s")
    assert [(e["split"], e["class_name"]) for e in entries.values()] == [
        ("train", "cat"),
        ("train", "n01"),
        ("beside", "dog"),
    ]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_imagenets_tar_of_tars(tmp_path: Path, mode: str) -> None:
    """The synset is the name of the inner tar; validation has no classes but in a file of its own."""
    inner = {}
    for synset in ("n01440764", "n01443537"):
        make_tar(tmp_path / "inner.tar", {f"{synset}_{i}.JPEG": picture(i) for i in range(2)})
        inner[f"{synset}.tar"] = (tmp_path / "inner.tar").read_bytes()
    (tmp_path / "inner.tar").unlink()
    make_tar(tmp_path / "in/ILSVRC2012_img_train.tar", inner, mode)
    make_tar(tmp_path / "in/ILSVRC2012_img_val.tar", {"ILSVRC2012_val_00000001.JPEG": picture(9)})
    labels = tmp_path / "LOC_val_solution.csv"
    labels.write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,n01443537 85 1 499 272 n02 1 2 3 4\n")
    entries = index(tmp_path / "in", tmp_path / "s", labels=str(labels))
    assert len(entries) == 5
    train = entries["ILSVRC2012_img_train.tar/n01443537.tar/n01443537_1.JPEG"]
    assert (train["split"], train["class_name"], train["content"]) == ("train", "n01443537", picture(1))
    val = entries["ILSVRC2012_img_val.tar/ILSVRC2012_val_00000001.JPEG"]
    assert (val["split"], val["class_name"], val["content"]) == ("val", "n01443537", picture(9))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tars_of_splits_in_a_tar(tmp_path: Path, mode: str) -> None:
    inner = make_tar(tmp_path / "inner.tar", {"cat/0.png": picture(0), "1.png": picture(1)}).read_bytes()
    names = ("data/train.tar", "Val.tar", "test/n01.tar")
    entries = index(make_tar(tmp_path / "x.tar", dict.fromkeys(names, inner), mode), tmp_path / "s")
    assert {key.removeprefix("x.tar/"): (e["split"], e["class_name"]) for key, e in entries.items()} == {
        "data/train.tar/cat/0.png": ("train", "cat"),
        "data/train.tar/1.png": ("train", None),
        "Val.tar/cat/0.png": ("val", "cat"),
        "Val.tar/1.png": ("val", None),
        "test/n01.tar/cat/0.png": ("test", "cat"),
        "test/n01.tar/1.png": ("test", "n01"),
    }


def test_a_class_called_train_in_a_tar_is_no_split(tmp_path: Path) -> None:
    def found(files: dict[str, bytes], **options: object) -> list[tuple[object, object]]:
        entries = index(make_tar(tmp_path / "x.tar", files), tmp_path / "s", **options)
        return [(e["split"], e["class_name"]) for e in entries.values()]

    classes = [(None, "bus"), (None, "train"), (None, "car")]
    bare = {"1.png": picture(1)}
    inner = make_tar(tmp_path / "inner.tar", bare).read_bytes()
    beside = dict.fromkeys(("bus/1.png", "train/2.png", "car/3.png"), picture(1))
    assert found(beside) == classes
    assert found(dict.fromkeys(("bus.tar", "train.tar", "car.tar"), inner)) == classes
    # but where anything says the classes of its images, it is
    assert found(beside | {"train/2.cls": b"7"}) == [("beside", "bus"), ("train", "7"), ("beside", "car")]
    assert found({"train/cat/1.png": picture(1), "test/2.png": picture(2)}) == [("train", "cat"), ("test", None)]
    (tmp_path / "labels.csv").write_text("2,dog")
    assert found(beside, labels=str(tmp_path / "labels.csv"))[1] == ("train", "dog")
    assert found({"train/1.png": picture(1)}) == [("train", None)]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_what_is_too_large_for_an_image_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """A header may say anything, and a small archive unpack to anything."""
    monkeypatch.setattr(tars, "_HELD_BYTES", 1)  # so that the inner tar goes to a file
    make_tar(tmp_path / "inner.tar", {"b/1.png": picture(1)})
    inner = (tmp_path / "inner.tar").read_bytes()
    (tmp_path / "inner.tar").unlink()
    make_tar(tmp_path / "in/x.tar", {"a/0.png": bytes(1001), "inner.tar": inner}, mode)
    entries = index(tmp_path / "in", tmp_path / "s", max_image_bytes=1000)
    assert entries["x.tar/a/0.png"]["reason"] == "1001 bytes, more than max_image_bytes = 1000"
    assert entries["x.tar/inner.tar/b/1.png"]["content"] == picture(1)


@pytest.mark.skipif(not shutil.which("tar"), reason="GNU tar makes sparse members")
@pytest.mark.parametrize("form", [["gnu"], *(["pax", f"--sparse-version={v}"] for v in ("0.0", "0.1", "1.0"))])
def test_sparse_members_have_their_bytes(tmp_path: Path, form: list[str]) -> None:
    contents = {}
    for number in range(3):
        path = tmp_path / f"in/a/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(picture(number))
            file.seek(400_000)
            file.write(b"the end")
        contents[f"x.tar/a/{number}.png"] = path.read_bytes()
    subprocess.run(
        ["tar", "-S", f"--format={form[0]}", *form[1:], "-cf", "../x.tar", "a"], cwd=tmp_path / "in", check=True
    )
    assert (tmp_path / "x.tar").stat().st_size < 100_000
    entries = index(tmp_path / "x.tar", tmp_path / "s")
    assert {key: entry["content"] for key, entry in entries.items()} == contents


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["cat/1.png", "cat/2023/2.png", "dog/2024/5/3.png"], ["cat", "cat", "dog"]),
        (["all/cat/1.png", "all/cat/2023/2.png", "all/dog/3.png", "loose.png"], ["cat", "cat", "dog", None]),
        (["a/b/cat/1.png", "a/b/dog/2.png"], ["cat", "dog"]),
        (["cat/1.png", "cat/2.png"], ["cat", "cat"]),
    ],
)
def test_the_class_is_the_first_folder_below_those_around_all(
    tmp_path: Path, names: list[str], classes: list[str | None]
) -> None:
    entries = index(make_tar(tmp_path / "x.tar", {name: picture(1) for name in names}), tmp_path / "s")
    assert [entry["class_name"] for entry in entries.values()] == classes


def test_classes_of_any_encoding(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "caf\u00e9/1.png", picture(1))
        add(tar, "bar/2.png", picture(2))
        add(tar, "3.png", picture(3))
        add(tar, "3.json", b'{"label": "\\ud800x"}')
    entries = index(tmp_path / "x.tar", tmp_path / "s").values()
    assert [entry["class_name"] for entry in entries] == [r"caf\udce9", "bar", r"\ud800x"]


def test_minus_one_is_no_class(tmp_path: Path) -> None:
    files = {"1.png": picture(1), "1.cls": b"-1", "2.png": picture(2), "2.json": b'{"label": -1}', "3.png": picture(3)}
    entries = index(make_tar(tmp_path / "x.tar", {**files, "3.cls": b"0"}), tmp_path / "s")
    assert [entry["class_name"] for entry in entries.values()] == [None, None, "0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tar_is_class": True}, "tar_is_class is for a tar source, .* is a folder one, got True; leave it out"),
        ({"label_column": "fine"}, "label_column is for a parquet source, .* is a folder one, got 'fine'"),
        ({"root": "/data"}, "root is for a torchvision source, .* is a folder one, got '/data'"),
        ({"download": True}, "download is for a torchvision source"),
    ],
)
def test_options_of_another_kind_of_source_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    (tmp_path / "red").mkdir()
    (tmp_path / "red/0.png").write_bytes(picture(1))
    with pytest.raises(ValueError, match=message):
        find_units(str(tmp_path), SourceOptions(**options))


@pytest.mark.parametrize("at_once", [1, 3])
def test_entries_are_gathered_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    (tmp_path / "images/red").mkdir(parents=True)
    for number in range(7):
        (tmp_path / f"images/red/{number}.png").write_bytes(picture(number))
    whole = index(tmp_path / "images", tmp_path / "staging")
    monkeypatch.setattr(indexing, "_ENTRIES_AT_ONCE", at_once)
    assert index(tmp_path / "images", tmp_path / "staging") == whole
    assert len(whole) == 7


def test_other_content_of_the_same_size_is_another_listing(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", {"a/1.png": picture(1)})
    for source in (path, make_folder(tmp_path / "a", images_per_class=1)):
        before = listing_digest(find_units(str(source), SourceOptions()))
        assert before == listing_digest(find_units(str(source), SourceOptions()))
        file = source if source.is_file() else source / "red/000.png"
        changed = file.stat()
        os.utime(file, ns=(changed.st_atime_ns, changed.st_mtime_ns + 1_000_000))
        assert before != listing_digest(find_units(str(source), SourceOptions()))


def test_a_name_with_an_empty_part_does_not_vanish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 lets any name be; Arrow reads none with such a part."""
    monkeypatch.setattr(Storage, "stamps", lambda *_: {"a//1.png": (5, 1), "a/2.png": (5, 1)})
    config = SourceOptions()
    (unit,) = find_units("s3://bucket/images", config)
    rows = index_unit(unit, config, Staging(Storage(str(tmp_path)), "0")).to_pylist()
    assert [row["reason"] for row in rows] == ["a part of its name is empty", None]


def test_a_file_that_is_no_table_is_no_file_of_labels(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("1.jpg," + "x" * 200_000)
    with pytest.raises(ValueError, match=r"labels must be a file of 'image name,class' lines, .* is not: field larger"):
        read_labels(str(tmp_path / "labels.csv"))


def test_labels_of_several_words(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text('1.jpg,great dane\nx/2.png," great white, shark"\n')
    assert read_labels(str(file)) == {"1": "great dane", "2": "great white, shark"}


def test_labels_of_a_folder_whose_splits_have_no_class_folders(tmp_path: Path) -> None:
    """As Kaggle gives many sets."""
    for name in ("train/0.png", "train/1.png", "test/6.png"):
        make_image(tmp_path / "in" / name, hue=0, seed=0)
    labels = tmp_path / "labels.csv"
    labels.write_text("0,cat\n1.png,dog\n6,cat\n")
    entries = index(tmp_path / "in", tmp_path / "s", labels=str(labels))
    assert {key: (e["split"], e["class_name"]) for key, e in entries.items()} == {
        "train/0.png": ("train", "cat"),
        "train/1.png": ("train", "dog"),
        "test/6.png": ("test", "cat"),
    }


def test_labels_of_no_image_are_refused(tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("0,cat\n1,dog\n")
    make_image(tmp_path / "in/cat/0.png", hue=0, seed=0)
    with pytest.raises(ValueError, match=r"--labels FILE.* none of its 2 names does, such as '0'; no image is without"):
        index(tmp_path / "in", tmp_path / "s", labels=str(labels))
    make_image(tmp_path / "in/img_7.png", hue=0, seed=0)
    with pytest.raises(ValueError, match="such as '0'; such an image is 'img_7'"):
        index(tmp_path / "in", tmp_path / "s", labels=str(labels))


def test_labels_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_bytes("\ufeffx/0.png,cat\ny/0.png,cat\n".encode())  # as spreadsheets begin UTF-8
    assert read_labels(str(labels)) == {"0": "cat"}
    labels.write_text("x/0.png,cat\ny/0.png,dog\n")
    with pytest.raises(ValueError, match=r"labels.csv, line 2: an image '0' is 'dog' here and 'cat' above"):
        read_labels(str(labels))
    labels.write_bytes("0.png,caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"labels must be a file in UTF-8, '.*labels.csv' is not"):
        read_labels(str(labels))


def test_webdataset(tmp_path: Path) -> None:
    files = {
        "0001.jpg": picture(1), "0001.cls": b"7\n",
        "0002.cls": b"3", "0002.seg.jpg": picture(2),
        "0003.png": picture(3), "0003.json": json.dumps({"label": 5}).encode(),
        "0004.png": picture(4), "0004.json": b"{broken",
    }  # fmt: skip
    path = make_tar(tmp_path / "train-000.tar", files)
    entries = index(path, tmp_path / "s")
    found = {key.split("/")[-1]: e["class_name"] for key, e in entries.items()}
    assert found == {"0001.jpg": "7", "0002.seg.jpg": "3", "0003.png": "5", "0004.png": None}
    assert {e["split"] for e in entries.values()} == {"train"}


def test_tar_name_as_class(tmp_path: Path) -> None:
    make_tar(tmp_path / "in/n01.tar", {"a.jpg": picture(1)})
    make_tar(tmp_path / "in/n02.tar", {"a.jpg": picture(1)})
    entries = index(tmp_path / "in", tmp_path / "s", tar_is_class=True)
    assert [e["class_name"] for e in entries.values()] == ["n01", "n02"]


def test_hostile_and_damaged_tars_are_accounted_for(tmp_path: Path) -> None:
    good = {"train/a/0.png": picture(0)}
    path = make_tar(tmp_path / "x.tar", good)
    with tarfile.open(path, "a") as tar:
        add(tar, "/etc/evil.png", picture(1))
        add(tar, "train/../../evil.png", picture(2))
        link = tarfile.TarInfo("train/a/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        add(tar, "train/a/9.png", picture(9) * 4000)
    whole = path.read_bytes()
    path.write_bytes(whole[:-60_000])  # cut in the middle of the last image
    entries = index(path, tmp_path / "s")
    reasons = {key.removeprefix("x.tar/"): e["reason"] for key, e in entries.items()}
    assert reasons["train/a/0.png"] is None
    assert "leaves the archive" in reasons["/etc/evil.png"]
    assert "leaves the archive" in reasons["train/../../evil.png"]
    assert "a link or device" in reasons["train/a/link.png"]
    assert "cut short" in str(entries["x.tar/train/a/9.png"]["content"])
    assert any("damaged from here" in str(reason) for reason in reasons.values())


def reasons_of(path: Path, staging: Path) -> tuple[int, dict[str, object]]:
    """How many images are good, and why the others are not."""
    entries = index(path, staging)
    reasons = {key: e["reason"] for key, e in entries.items() if e["reason"]}
    return len(entries) - len(reasons), reasons


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_that_loses_images_says_so(tmp_path: Path, mode: str) -> None:
    """Python's tarfile ends without a word at each of these."""
    files = {f"train/a/{i}.png": picture(i) for i in range(10)}  # a header and a block of data each
    plain = make_tar(tmp_path / "plain.tar", files).read_bytes()
    assert all(len(content) <= 512 for content in files.values())
    pack = {"w": bytes, "w:gz": gzip.compress, "w:bz2": bz2.compress, "w:xz": lzma.compress}[mode]
    corrupt = bytearray(plain)
    corrupt[3 * 1024 + 148] ^= 1  # in the check sum of the fourth header
    for number, (content, images, reason) in enumerate(
        [
            (plain, 10, None),
            (plain[: 10 * 1024 + 512], 10, None),  # a lone block of zeros marks the end too
            (plain[: 4 * 1024], 4, "without an end mark"),
            (plain[: 4 * 1024 + 100], 4, "within a header"),
            (bytes(corrupt), 3, "bad checksum"),
            (plain + plain, 10, "more data follows its end mark"),
            (b"", 0, "damaged"),
        ]
    ):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(pack(content))
        good, reasons = reasons_of(path, tmp_path / "s")
        assert good == images
        assert list(reasons) == ([] if reason is None else [f"{number}.tar/…"])
        assert reason is None or reason in str(reasons[f"{number}.tar/…"])


def test_compressed_tars_of_several_members_and_damaged_ones(tmp_path: Path) -> None:
    plain = make_tar(tmp_path / "plain.tar", {f"train/a/{i}.png": picture(i) for i in range(10)}).read_bytes()
    for name, compress in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)):
        whole = compress(plain[:5000]) + compress(plain[5000:])  # as pbzip2 and bgzip write them
        for content, good in ((whole, 10), (whole[:-30], None)):
            path = tmp_path / f"x.tar.{name}"
            path.write_bytes(content)
            images, reasons = reasons_of(path, tmp_path / "s")
            assert (good is None) == ("damaged from here" in str(reasons))
            assert good in (None, images)


def test_a_damaged_tar_in_a_tar_spoils_no_other(tmp_path: Path) -> None:
    inner = make_tar(tmp_path / "inner.tar", {f"{i}.png": picture(i) for i in range(4)}).read_bytes()
    path = make_tar(tmp_path / "x.tar", {"n01.tar": inner[:2048], "n02.tar": inner})
    good, reasons = reasons_of(path, tmp_path / "s")
    assert good == 6
    assert list(reasons) == ["x.tar/n01.tar/…"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "tar.gz", "parquet"])
def test_an_outage_is_waited_for_or_ends_the_indexing(
    tmp_path: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It is no damage of the file, also where it comes between two reads; nor does it lose what is staged."""
    name, rng = f"x.{kind}", np.random.default_rng(0)
    files = {f"train/a/{i}.png": rng.bytes(500) for i in range(200)}
    if kind == "parquet":
        table = pa.table({"image": list(files.values()), "label": [0, 1] * 100})
        pq.write_table(table, tmp_path / name, row_group_size=50)
    else:
        make_tar(tmp_path / name, files, "w:gz" if kind == "tar.gz" else "w")
    bucket = Storage(object_store.uri(f"outage-{tmp_path.name}"))
    bucket.write(name, (tmp_path / name).read_bytes())
    (unit,) = find_units(bucket.uri, SourceOptions())
    monkeypatch.setattr(sources, "_READ_AHEAD_BYTES", 4096)  # so that there are many reads
    monkeypatch.setattr(sources, "_STAGED_BYTES", 4096)
    read, reads = Storage.read_range, []

    def interrupted(self: Storage, *args: object) -> bytes:
        reads.append(args)
        if len(reads) == 3:
            object_store.stop()
            timers[0].start()
        return read(self, *args)

    monkeypatch.setattr(Storage, "read_range", interrupted)
    timers = [threading.Timer(1.0, object_store.start)]
    table = index_unit(unit, SourceOptions(), Staging(bucket.child("staging"), "0"))
    timers[0].join()
    assert table.num_rows == 200
    assert table["reason"].null_count == 200
    monkeypatch.setattr(storage_module, "RETRY_SECONDS", 0.1)
    reads.clear()
    timers[0] = threading.Timer(0, lambda: None)
    try:
        with pytest.raises(StorageError, match="is away"):
            index_unit(unit, SourceOptions(), Staging(bucket.child("staging"), "0"))
    finally:
        object_store.start()


def test_staging_is_written_in_files_that_can_be_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_STAGED_BYTES", 10)
    storage = Storage(str(tmp_path))
    staging = Staging(storage, "images/7")
    contents = [b"four", b"sixsix", b"x" * 25, b"", b"one"]
    places = [staging.add(content) for content in contents]
    staging.close()
    staging.close()
    assert storage.sizes() == {"images/7-00000.bin": 10, "images/7-00001.bin": 25, "images/7-00002.bin": 3}
    assert [storage.read_range(p["file"], p["offset"], p["length"]) for p in places] == contents


def test_hugging_face_parquet(tmp_path: Path) -> None:
    features = {"info": {"features": {"img": {}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    images = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(3)] + [{"bytes": None, "path": "x.png"}]
    table = pa.table({"img": images, "label": [0, 1, -1, 1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in/test-00000-of-00001.parquet", compression="zstd")
    entries = list(index(tmp_path / "in", tmp_path / "s").values())
    assert [e["class_name"] for e in entries] == ["cat", "dog", None, None]
    assert [e["label"] for e in entries] == [0, 1, None, None]
    assert [e["content"] for e in entries[:3]] == [picture(i) for i in range(3)]
    assert entries[0]["key"] == "test-00000-of-00001.parquet/0000000/0.png"
    assert entries[3]["reason"] == "no image bytes"
    assert {e["split"] for e in entries[:3]} == {"test"}


def write_labelled(path: Path, labels: list[object], names: object) -> Path:
    features = {"info": {"features": {"image": {}, "label": {"names": names, "_type": "ClassLabel"}}}}
    table = pa.table({"image": [{"bytes": picture(n), "path": None} for n in range(len(labels))], "label": labels})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
    return path


def test_labels_beside_the_declared_classes_are_quarantined(tmp_path: Path) -> None:
    path = write_labelled(tmp_path / "x.parquet", [1, -2, 7, -1, 0], ["cat", "dog"])
    entries = list(index(path, tmp_path / "s").values())
    assert [e["class_name"] for e in entries] == ["dog", None, None, None, "cat"]
    none = "is none of the 2 classes that the file declares"
    assert [e["reason"] for e in entries] == [None, f"label -2 {none}", f"label 7 {none}", None, None]
    infinite = write_labelled(tmp_path / "y.parquet", [1.0, float("inf"), float("nan")], ["cat", "dog"])
    assert [e["class_name"] for e in index(infinite, tmp_path / "s2").values()] == ["dog", None, None]
    assert {e["reason"] for e in index(infinite, tmp_path / "s2").values()} == {None}  # unlabelled, as NaN is
    odd = write_labelled(tmp_path / "z.parquet", [1, 2], [1, 2])  # names that are no text
    assert [e["class_name"] for e in index(odd, tmp_path / "s3").values()] == ["1", "2"]


def test_few_rows_of_large_images_are_unpacked_at_once(tmp_path: Path) -> None:
    for size, rows in ((20 * 2**20, 1), (10 * 2**20, 3), (1000, 64)):
        pq.write_table(pa.table({"image": [bytes(size)] * 4}), tmp_path / "x.parquet", use_dictionary=False)
        assert parquet_images._rows_at_once(pq.read_metadata(tmp_path / "x.parquet")) == rows
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "x.parquet")
    assert parquet_images._rows_at_once(pq.read_metadata(tmp_path / "x.parquet")) == 64


def test_plain_parquet_with_named_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [b"A"], "b": [b"B"], "kind": ["q"], "key": ["k1"]}), path)
    entries = index(path, tmp_path / "s", image_column="b", label_column="kind")
    assert entries["k1"]["content"] == b"B"
    assert entries["k1"]["class_name"] == "q"
    with pytest.raises(ValueError, match=r"must have a column of encoded images .* it has a, b, kind, key"):
        index(path, tmp_path / "s")
    with pytest.raises(ValueError, match=r"label_column must be a column of x\.parquet, got 'nope'"):
        index(path, tmp_path / "s", image_column="b", label_column="nope")


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        ([1.0, 0.0, float("nan"), -1.0], ["1", "0", None, None], [1, 0, None, None]),
        ([0.5, 2.0, None, 1.0], ["0.5", "2", None, "1"], [None, 2, None, 1]),
        (["cat", "", "  ", " dog"], ["cat", None, None, " dog"], [None] * 4),
        ([True, False, None, True], ["True", "False", None, "True"], [None] * 4),
        (pa.array([2**63, 1, None, 0], pa.uint64()), ["9223372036854775808", "1", None, "0"], [None, 1, None, 0]),
        ([b"cat", b"", None, b"dog"], ["cat", None, None, "dog"], [None] * 4),
    ],
)
def test_parquet_labels_as_pandas_writes_them(
    tmp_path: Path, labels: list[object], classes: list[str | None], numbers: list[int | None]
) -> None:
    pq.write_table(pa.table({"image": [picture(i) for i in range(4)], "label": labels}), tmp_path / "x.parquet")
    entries = list(index(tmp_path / "x.parquet", tmp_path / "s").values())
    assert [e["class_name"] for e in entries] == classes
    assert [e["label"] for e in entries] == numbers


def test_parquet_labels_that_are_none_of_one_class(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [picture(0)], "label": [[1, 2]]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"labels must be numbers or text, got \[1, 2\]; name another"):
        index(tmp_path / "x.parquet", tmp_path / "s", label_column="label")
    (entry,) = index(tmp_path / "x.parquet", tmp_path / "s").values()  # one that is not asked for is passed over
    assert (entry["class_name"], entry["label"]) == (None, None)


def test_keys_that_start_anew_in_each_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    table = pa.table({"image": [picture(1)] * 4, "label": [0, 0, 1, 1], "key": ["0", "1", "2", "2"]})
    for name in ("a", "b"):
        pq.write_table(table, tmp_path / f"in/{name}.parquet")
    units = find_units(str(tmp_path / "in"), SourceOptions())
    parts = [index_unit(u, SourceOptions(), Staging(Storage(str(tmp_path)), u.files[0])) for u in units]
    entries = join_entries(units, parts)
    assert entries["key"].to_pylist() == [f"{name}.parquet/{key}" for name in "ab" for key in "0122"]
    quarantined = plan_layout(entries, val_fraction=0.5, seed=0, shard_bytes=1000).quarantined
    assert quarantined == tuple((f"{name}.parquet/2", "another image has the same key") for name in "ab")
    # one file, and files whose keys do not overlap, keep them
    assert join_entries(units[:1], parts[:1])["key"].to_pylist() == list("0122")
    pq.write_table(table.set_column(2, "key", [list("3456")]), tmp_path / "in/b.parquet")
    parts[1] = index_unit(units[1], SourceOptions(), Staging(Storage(str(tmp_path)), "b"))
    assert join_entries(units, parts)["key"].to_pylist() == list("01223456")


def make_fashion_mnist(root: Path, images: int = 3) -> None:
    """The IDX files as torchvision expects them, with `images` in each split."""
    folder = root / "FashionMNIST/raw"
    folder.mkdir(parents=True)
    for prefix, first in (("train", 0), ("t10k", 100)):
        pixels = bytes((first + i) % 256 for i in range(images) for _ in range(28 * 28))
        header = b"\x00\x00\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (images, 28, 28))
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels)
        labels = b"\x00\x00\x08\x01" + images.to_bytes(4, "big") + bytes(i % 10 for i in range(images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)


def test_torchvision_arrays_become_png(tmp_path: Path) -> None:
    make_fashion_mnist(tmp_path / "root")
    entries = index("torchvision:FashionMNIST", tmp_path / "s", root=str(tmp_path / "root"))
    assert len(entries) == 6
    entry = entries["test/0000002"]
    assert (entry["split"], entry["class_name"]) == ("test", datasets.FashionMNIST.classes[2])
    image = Image.open(io.BytesIO(entry["content"]))
    assert (image.size, image.getpixel((0, 0)), image.format) == ((28, 28), 102, "PNG")


def test_torchvision_files_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "root/train", images_per_class=1)

    class InFiles(datasets.ImageFolder):
        def __init__(self, root: Path, split: str) -> None:
            if split != "train":
                raise ValueError(f"no split {split}")
            super().__init__(str(root / split))

    monkeypatch.setattr(datasets, "Flowers102", InFiles)
    entries = index("torchvision:Flowers102", tmp_path / "s", root=str(tmp_path / "root"))
    assert [e["class_name"] for e in entries.values()] == ["blue", "green", "red"]
    assert entries["train/0000002"]["content"] == (tmp_path / "root/train/red/000.png").read_bytes()
    assert not (tmp_path / "s").exists()


class Pets:
    """Laid out as torchvision's OxfordIIITPet: no train split, paths in `_images`."""

    classes = ("beagle", "abyssinian")

    def __init__(self, root: Path, split: str = "trainval") -> None:
        if split not in ("trainval", "test"):
            raise ValueError(f"Unknown value {split!r} for argument split")
        self._images, self._labels = [root / "0.jpg", root / "1.jpg"], [0, 1]

    def __len__(self) -> int:
        return 2


class Cranes(Pets):
    """Names as ImageNet's, which are tuples and not unique."""

    classes = (("crane", "bird"), ("crane",))
    wnids = ("n02012849", "n03126707")


def test_torchvision_sets_of_other_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (0, 1):
        (tmp_path / f"{number}.jpg").write_bytes(b"the bytes of it")
    for name, kind, classes in (("OxfordIIITPet", Pets, Pets.classes), ("ImageNet", Cranes, Cranes.wnids)):
        monkeypatch.setattr(datasets, name, kind)
        entries = index(f"torchvision:{name}", tmp_path / "s", root=str(tmp_path))
        assert {key: (e["class_name"], e["label"], e["content"]) for key, e in entries.items()} == {
            f"{split}/000000{i}": (classes[i], i, b"the bytes of it") for split in ("train", "test") for i in (0, 1)
        }


def test_a_torchvision_set_that_is_not_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0.jpg").write_bytes(b"x")

    class Attributes(Pets):
        def __init__(self, root: Path, split: str) -> None:
            super().__init__(root)
            self._labels = [[0.5, 1.0]] * 2

    monkeypatch.setattr(datasets, "CelebA", Attributes)
    with pytest.raises(ValueError, match="must give each image the number of one class"):
        index("torchvision:CelebA", tmp_path / "s", root=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "nowhere"}, "does not exist or is empty"),
        ({"source": "nowhere.tar"}, "does not exist or is empty"),
        ({"source": "torchvision:CIFAR11", "root": "x"}, "no data set 'CIFAR11'; did you mean 'CIFAR10'"),
        ({"source": "torchvision:CIFAR10"}, "root is missing"),
        ({"source": "torchvision:Kinetics", "root": "x"}, "Kinetics needs more than a split: .*'frames_per_clip'"),
        ({"source": "torchvision:CIFAR10", "root": "x"}, "CIFAR10 is not in .* or add --download to fetch it"),
        ({"source": "ftp://host/x"}, "must be a path or a URI"),
    ],
)
def test_sources_that_are_refused(
    options: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        find_units(options.pop("source"), SourceOptions(**options))


def test_out_in_the_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to("in")
    root = str(tmp_path)
    for out, source in (
        (f"{root}/in", f"{root}/in"),
        (f"{root}/link/out", f"{root}/in/"),
        (f"{root}/x/../in/out", f"{root}/in"),
        ("s3://b/in/out?region=x", "s3://b/in"),
        ("s3://b/in", "s3://b/in/?region=x"),
        ("gs://b/in", "gs://b"),
        ("gs://anonymous@b/in/out", "gcs://b/in"),
        ("s3://b/in/out?region=x&endpoint_override=h:1", "s3://b/in?endpoint_override=h:1"),
    ):
        with pytest.raises(ValueError, match=r"out must not lie in the folder that is read, .* choose another --out"):
            require_outside(out, source)
    for out, source in (
        (f"{root}/in2", f"{root}/in"),
        (root, f"{root}/in"),
        ("s3://b/in2", "s3://b/in"),
        ("s3://b/in", "gs://b/in"),
        ("s3://b/in/out?endpoint_override=h:1", "s3://b/in?endpoint_override=h:2"),
        (str(Path("sample").absolute()), "sample"),
    ):
        require_outside(out, source)


def test_mixed_and_empty_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="holds no images, tars or Parquet files among its 1 files"):
        find_units(str(tmp_path), SourceOptions())
    make_tar(tmp_path / "a.tar", {})
    (tmp_path / "a.png").write_bytes(picture(0))
    with pytest.raises(ValueError, match="must be of one kind, it holds 1 folder files, 1 tar files"):
        find_units(str(tmp_path), SourceOptions())


@pytest.mark.parametrize("kind", ["object_store", "google_store"])
def test_a_bucket_is_a_source_like_a_disk(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    store: ObjectStore | GoogleStore = request.getfixturevalue(kind)
    bucket = Storage(store.uri("source"))
    bucket.write("train/cat/1.png", picture(1))
    bucket.write("train/dog/2.png", picture(2))
    entries = index(bucket.uri, tmp_path / "s")
    assert [e["content"] for e in entries.values()] == [picture(1), picture(2)]
    path = make_tar(tmp_path / "x.tar", {f"cat/{i}.png": picture(i) for i in range(5)})
    bucket.write("tars/x.tar", path.read_bytes())
    for source in (bucket.child("tars").uri, store.uri("source/tars/x.tar")):
        entries = index(source, tmp_path / "s")
        assert [e["content"] for e in entries.values()] == [picture(i) for i in range(5)]
