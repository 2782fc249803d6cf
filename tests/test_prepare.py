"""Whole preparations: every image accounted for, cut and continued, and refusals that spoil nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ObjectStore, Outage, make_folder, make_image
from PIL import Image
from test_packing import BAD, GOOD

from diffvit.config import DataConfig, PrepareConfig
from diffvit.data import prepare as module
from diffvit.data.datasets import open_dataset
from diffvit.data.prepare import prepare, verify
from diffvit.data.shards import DatasetInfo, open_shards
from diffvit.data.tasks import map_anywhere
from diffvit.progress import Progress, print_dataset, print_predictions
from diffvit.storage import Storage, StorageError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def quiet(what: str, done: int, total: int) -> None:
    pass


def read_all(out: Path | str) -> dict[str, tuple[str, str, bytes]]:
    """`{key: (split, class, bytes)}` by way of the index."""
    info, splits = open_shards(Storage(str(out)))
    return {
        split.key(i): (name, info.classes[split.labels[i]], content)
        for name, split in splits.items()
        for i, content in enumerate(split.read_many(np.arange(len(split))))
    }


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    images = make_folder(tmp_path / "images", images_per_class=20)
    return PrepareConfig(source=str(images), out=str(tmp_path / "out"), shard_mib=0.01)


def test_a_folder_becomes_a_data_set(config: PrepareConfig) -> None:
    info = prepare(config, quiet)
    images = read_all(config.out)
    assert {key: content for key, (_, _, content) in images.items()} == {
        str(path.relative_to(config.source)): path.read_bytes() for path in Path(config.source).glob("*/*.png")
    }
    assert all(key.startswith(name) for key, (_, name, _) in images.items())
    assert info.classes == ["blue", "green", "red"]
    assert {name: split.class_counts for name, split in info.splits.items()} == {"train": [18] * 3, "val": [2] * 3}
    assert len(info.splits["train"].shards) > 2
    assert (info.width, info.height) == ((20, 20.0, 20), (17, 17.0, 17))
    assert verify(config, quiet) == info
    assert not (Path(config.out) / ".staging").exists()
    # statistics, from the files themselves
    train = [key for key, (split, _, _) in images.items() if split == "train"]
    pixels = np.stack([np.asarray(Image.open(Path(config.source, key))) / 255 for key in train])
    assert info.mean == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-4)
    assert info.std == pytest.approx(pixels.std((0, 1, 2)), abs=1e-4)
    # and what training sees of it
    dataset = open_dataset(DataConfig(path=config.out))
    assert (len(dataset.train), len(dataset.val), dataset.mean) == (54, 6, tuple(info.mean))


def test_again_is_free_and_other_options_are_refused(config: PrepareConfig) -> None:
    info = prepare(config, quiet)
    stamp = Path(config.out, "dataset.json").stat().st_mtime_ns
    assert prepare(config, quiet) == info
    assert Path(config.out, "dataset.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match=r"(?s)holds a data set made from other .*seed: 0 there, 5 now"):
        prepare(dataclasses.replace(config, seed=5), quiet)
    make_image(Path(config.source, "red", "new.png"), hue=0, seed=1)
    with pytest.raises(ValueError, match="listing_sha256"):
        prepare(config, quiet)


@pytest.mark.parametrize("lost", ["train/00001.parquet", "index/val.parquet"])
def test_a_finished_data_set_that_lost_files_is_made_again(config: PrepareConfig, lost: str) -> None:
    info, images = prepare(config, quiet), read_all(config.out)
    Path(config.out, lost).unlink()
    with pytest.raises(ValueError, match="seed: 0 there, 5 now"):
        prepare(dataclasses.replace(config, seed=5), quiet)
    assert prepare(config, quiet) == info
    assert read_all(config.out) == images
    Path(config.out, "train/00001.parquet").write_bytes(b"cut short")
    assert prepare(config, quiet) == info
    assert verify(config, quiet) == info
    assert not Path(config.out, ".staging").exists()


def test_a_mistake_does_not_take_the_folder(config: PrepareConfig) -> None:
    for path in sorted(Path(config.source, "red").glob("*"))[1:]:
        path.unlink()
    with pytest.raises(ValueError, match="'red' has one image"):
        prepare(config, quiet)
    make_image(Path(config.source, "red/new.png"), hue=0, seed=0)
    assert prepare(config, quiet).splits["train"].class_counts == [18, 18, 1]


def test_names_are_shown_as_they_are(config: PrepareConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """rich would take brackets for its own marks."""
    for name in ("red [dark]", "red [/z]"):
        make_image(Path(config.source, name, "1.png"), hue=0, seed=0)
        make_image(Path(config.source, name, "2.png"), hue=0, seed=1)
    print_dataset("x [/b]", prepare(config, quiet), 0.5, 1)
    assert "x [/b]/dataset.json" in capsys.readouterr().out
    rows = [{"class": "red [/z]", "images": 1, "top1": 0.0, "precision": None, "most_taken_for": "red [dark]"}]
    print_predictions("x [/z]", {"images": 1, "skipped": 0, "labelled": 1, "top1": 0.0, "classes": rows})
    shown = capsys.readouterr().out
    assert "1 images predicted, in x [/z]/predictions" in shown
    assert "red [/z]" in shown.splitlines()[-1]


def test_a_folder_of_other_things_is_not_touched(config: PrepareConfig) -> None:
    Path(config.out).mkdir()
    Path(config.out, "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match=r"out must be an empty folder, .* holds 1 files, among them thesis.tex"):
        prepare(config, quiet)
    assert [path.name for path in Path(config.out).iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match=r"out must be a folder, .*thesis.tex' is a file; choose another --out"):
        prepare(dataclasses.replace(config, out=f"{config.out}/thesis.tex"), quiet)
    assert Path(config.out, "thesis.tex").read_text() == "years"


def test_out_in_the_source_is_refused_before_anything_is_written(config: PrepareConfig) -> None:
    out = Path(config.source, "out")
    with pytest.raises(ValueError, match=r"out must not lie in the folder that is read, .*images/out' lies in"):
        prepare(dataclasses.replace(config, out=str(out)), quiet)
    assert not out.exists()


def test_cut_between_shards_it_goes_on(config: PrepareConfig) -> None:
    packed_before: list[int] = []

    def cut(what: str, done: int, total: int) -> None:
        if what == "packing" and 0 < done < total:
            packed_before.append(done)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, cut)
    assert not Path(config.out, "dataset.json").exists()
    with pytest.raises(ValueError, match="was begun from other images or with other options"):
        prepare(dataclasses.replace(config, val_fraction=0.3), quiet)
    started_at: list[int] = []
    cut_info = prepare(config, lambda what, done, total: started_at.append(done) if what == "packing" else None)
    assert started_at[0] >= packed_before[0] > 0
    whole = dataclasses.replace(config, out=config.out + "-whole")
    assert dataclasses.replace(prepare(whole, quiet), source=cut_info.source) == cut_info
    assert read_all(config.out) == read_all(whole.out)


def test_speed_is_of_what_this_call_packed(config: PrepareConfig, capsys: pytest.CaptureFixture[str]) -> None:
    def cut(what: str, done: int, total: int) -> None:
        if what == "packing" and 0 < done < total:
            raise KeyboardInterrupt

    def prepared() -> tuple[int, str]:
        progress = Progress()
        info = prepare(config, progress.show)
        print_dataset(config.out, info, 0.5, progress.done("packing"))
        return progress.done("packing"), capsys.readouterr().out

    with pytest.raises(KeyboardInterrupt):
        prepare(config, cut)
    packed, text = prepared()
    assert 0 < packed < 60
    assert f", {2 * packed} images/s\n" in re.sub(" +\n", "\n", text)
    packed, text = prepared()
    assert packed == 0
    assert "images/s" not in text


def test_killed_it_goes_on(config: PrepareConfig) -> None:
    """The job itself, as a process, ended by SIGKILL while it packs; then typed again."""
    job = Path(__file__).parents[1] / "ray_jobs/prepare.py"
    command = [sys.executable, str(job), "--source", config.source, "--out", config.out, "--shard-mib", "0.003"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shards = Path(config.out, "train")
    while process.poll() is None and not (shards.exists() and list(shards.glob("0*.parquet"))):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path(config.out, "dataset.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "60: 54 train, 6 val" in done.stdout
    assert len(read_all(config.out)) == 60


def test_broken_images_are_all_accounted_for(tmp_path: Path) -> None:
    files = GOOD | {name: content for name, (content, _) in BAD.items()}
    for name, content in files.items():
        for split, class_name in (("train", "a"), ("train", "b"), ("val", "a")):
            path = tmp_path / "in" / split / class_name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    (tmp_path / "in/stray.png").write_bytes(GOOD["alpha.png"])
    config = PrepareConfig(
        source=str(tmp_path / "in"), out=str(tmp_path / "out"), max_pixels=10_000, max_image_bytes=50_000
    )
    info = prepare(config, quiet)
    quarantine = pq.read_table(tmp_path / "out/quarantine.parquet").to_pylist()
    kept = read_all(config.out)
    assert len(kept) == 3 * len(GOOD)
    assert info.quarantined == len(quarantine) == 3 * len(BAD) + 1
    assert {row["key"] for row in quarantine} | set(kept) == {
        str(path.relative_to(config.source)) for path in Path(config.source).rglob("*") if path.is_file()
    }
    reasons = {row["key"]: row["reason"] for row in quarantine}
    assert reasons["stray.png"] == "outside of the folders train, val and test"
    assert "does not decode" in reasons["val/a/truncated.jpg"]


def test_a_split_without_a_good_image_is_refused_and_its_images_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "in", images_per_class=2, val_per_class=1)
    for path in root.glob("val/*/*.png"):
        path.write_bytes(b"no image")
    config = PrepareConfig(source=str(root), out=str(tmp_path / "out"))
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"no image of the val split can be used; quarantine\.parquet in .*out names them"
        ):
            prepare(config, quiet)
        keys = pq.read_table(tmp_path / "out/quarantine.parquet")["key"].to_pylist()
        assert sorted(keys) == ["val/blue/000.png", "val/green/000.png", "val/red/000.png"]


def test_a_class_that_training_would_never_see_is_refused(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "in", images_per_class=2, val_per_class=1)
    for path in root.glob("train/green/*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"no training image of class 'green' can be used; quarantine\.parquet in"):
        prepare(PrepareConfig(source=str(root), out=str(tmp_path / "out")), quiet)
    assert not (tmp_path / "out/dataset.json").exists()


def test_from_bucket_to_bucket(tmp_path: Path, object_store: ObjectStore) -> None:
    images = make_folder(tmp_path / "images", images_per_class=4, val_per_class=2)
    bucket = Storage(object_store.uri(f"in-{tmp_path.name}"))
    for path in images.rglob("*.png"):
        bucket.write(str(path.relative_to(images)), path.read_bytes())
    out = object_store.uri(f"out-{tmp_path.name}")
    info = prepare(PrepareConfig(source=bucket.uri, out=out), quiet)
    assert {name: split.images for name, split in info.splits.items()} == {"train": 12, "val": 6}
    assert len(read_all(out)) == 18
    assert [name for name in Storage(out).sizes() if name.startswith(".")] == []


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["indexing", "packing"])
def test_an_outage_in_the_middle(tmp_path: Path, object_store: ObjectStore, phase: str) -> None:
    images = make_folder(tmp_path / "images", images_per_class=20)
    bucket = Storage(object_store.uri(f"in-{tmp_path.name}"))
    for name in ("blue", "green", "red"):
        with tarfile.open(tmp_path / f"{name}.tar.gz", "w:gz") as tar:
            tar.add(images / name, name)
        bucket.write(f"{name}.tar.gz", (tmp_path / f"{name}.tar.gz").read_bytes())
    outage = Outage(object_store, phase)
    out = object_store.uri(f"out-{tmp_path.name}")
    info = prepare(PrepareConfig(source=bucket.uri, out=out, shard_mib=0.01), outage)
    outage.join()
    assert (info.quarantined, len(read_all(out))) == (0, 60)


def test_a_disk_or_store_that_fails_is_said_in_one_line(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StorageError("the store is away")

    monkeypatch.setattr(module, "pack_shard", fail)
    with pytest.raises(StorageError, match=r"^the store is away$"):
        prepare(config, quiet)


def test_a_node_that_does_not_see_a_folder_loses_no_images(tmp_path: Path) -> None:
    def work(_: object, __: int) -> str:
        raise AssertionError("must not be tried")

    with pytest.raises(StorageError, match=r"/nowhere is not on the node .* a disk that all its nodes share"):
        list(map_anywhere(work, None, [0], [Storage(str(tmp_path)), Storage("/nowhere")]))


def test_labels_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(8):
        make_image(tmp_path / f"in/{number}.png", hue=number, seed=number)
    (tmp_path / "labels.csv").write_text("".join(f"{n},{'ab'[n % 2]}\n" for n in range(8)))
    monkeypatch.chdir(tmp_path)
    config = PrepareConfig(source="in", out="out", labels="labels.csv")
    assert prepare(config, quiet).source == str(tmp_path / "in")
    assert {key: name for key, (_, name, _) in read_all(tmp_path / "out").items()} == {
        f"{n}.png": "ab"[n % 2] for n in range(8)
    }
    with Path("labels.csv").open("a") as file:
        file.write("9,b\n")
    with pytest.raises(ValueError, match="labels_sha256"):
        prepare(config, quiet)


def test_verify_finds_a_flipped_bit(config: PrepareConfig) -> None:
    with pytest.raises(ValueError, match=r"has no dataset\.json"):
        verify(config, quiet)
    prepare(config, quiet)
    shard = Path(config.out, "train/00001.parquet")
    content = bytearray(shard.read_bytes())
    content[20] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"1 of \d+ shards of .* not what prepare wrote, among them train/00001"):
        verify(config, quiet)
    content[20] ^= 1
    shard.write_bytes(content)
    verify(config, quiet)
    index = pq.read_table(Path(config.out, "index/val.parquet"))
    labels = index["label"].to_pylist()
    wrong = index.set_column(3, "label", pa.array([(labels[0] + 1) % 3, *labels[1:]]))
    pq.write_table(wrong, Path(config.out, "index/val.parquet"))
    with pytest.raises(ValueError, match=r"1 of \d+ shards of .* among them val/00000"):
        verify(config, quiet)


def test_killed_before_it_tidied_up_it_does_so_later(config: PrepareConfig) -> None:
    Path(config.source, "notes.txt").write_text("no image")
    info = prepare(config, quiet)
    assert info.ignored == {".txt": 1}
    Storage(config.out).write(".staging/x", b"")
    assert prepare(config, quiet) == info
    assert not Path(config.out, ".staging").exists()


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"the source cannot be read: x\.parquet: "):
        prepare(PrepareConfig(source=str(tmp_path / "in"), out=str(tmp_path / "out")), quiet)


def run_job(*arguments: str) -> subprocess.CompletedProcess[str]:
    job = Path(__file__).parents[1] / "ray_jobs/prepare.py"
    return subprocess.run([sys.executable, str(job), *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "x"], "out is missing"),
        (["--source", "x", "--out", "x", "--shard-mib", "0"], "shard_mib must be at least 0.001"),
        (
            ["--source", "x", "--out", "x", "--shard-mib", "inf"],
            "shard_mib must be at least 0.001",
        ),
        (["--source", "x", "--out", "x", "--seed", "-1"], "seed must not be negative, got -1"),
        (["--out", "x", "--sead", "1"], "--seed"),
    ],
)
def test_wrong_options_cost_no_cluster(arguments: list[str], message: str) -> None:
    done = run_job(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_dataset_json_is_the_documented_one(config: PrepareConfig) -> None:
    prepare(config, quiet)
    fields = json.loads(Path(config.out, "dataset.json").read_text())
    assert set(fields) == {field.name for field in dataclasses.fields(DatasetInfo)}
    assert fields["options"]["shard_mib"] == 0.01
    assert module.FORMAT_VERSION == fields["format_version"] == 1
