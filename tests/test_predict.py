"""Predictions against the model asked directly, each image once, and what a user may get wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ObjectStore, Outage, make_folder, make_image, with_fields, write_untrained

from diffvit import predict as module
from diffvit.config import AugmentConfig, PredictConfig, PrepareConfig, RunConfig
from diffvit.data.datasets import open_dataset
from diffvit.data.images import decode_image, eval_transform, normalize
from diffvit.data.loader import BatchLoader, LocalStream
from diffvit.data.order import EvalPlan, TrainPlan
from diffvit.data.prepare import prepare
from diffvit.models.saved import load_saved
from diffvit.predict import predict
from diffvit.prediction import cut_parts
from diffvit.storage import Storage, StorageError
from diffvit.training.checkpoint import checkpoint_name
from diffvit.training.checkpoint_store import CheckpointStore
from diffvit.training.loop import Worker, fit

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def checkpoint(tiny_config: RunConfig, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model that has learnt to tell the three colours, evaluated otherwise than by default; trained once, a copy
    for each test.
    """
    trained = tmp_path_factory.getbasetemp() / "learnt"
    if not trained.exists():
        _train(tiny_config, trained)
    return Path(shutil.copytree(trained, tmp_path / "checkpoint"))


def _train(tiny_config: RunConfig, folder: Path) -> None:
    dataset = open_dataset(tiny_config.data)
    config = with_fields(tiny_config, model={"num_classes": 3}, data={"classes": dataset.classes}, optim={"epochs": 12})
    config = with_fields(config, augment={"interpolation": "bicubic", "eval_crop_ratio": 0.8})
    plan = TrainPlan(36, 0, 12, 12)
    stream = LocalStream(BatchLoader(config, dataset.train, plan), BatchLoader(config, dataset.val, EvalPlan(15, 5)))
    run = folder.with_name("learning")
    store = CheckpointStore(run, config.checkpoint)
    fit(
        config, plan, EvalPlan(15, 5), stream, Worker(torch.device("cpu"), lambda _: None, lambda *_: None, store=store)
    )
    (run / checkpoint_name(plan.total_steps)).rename(folder)


@pytest.fixture
def config(checkpoint: Path, tmp_path: Path) -> PredictConfig:
    images = make_folder(tmp_path / "unseen", images_per_class=7)
    (images / "purple").mkdir()
    make_image(images / "purple/1.png", hue=0, seed=0)  # a class that the model does not know
    (images / "red/broken.png").write_bytes(b"")
    (images / "red/notes.txt").write_text("no image")
    make_image(images / "loose.png", hue=2, seed=1)  # of no class
    return PredictConfig(checkpoint=str(checkpoint), images=str(images), out=str(tmp_path / "out"), top_k=2)


def rows_of(out: str) -> dict[str, dict[str, object]]:
    rows = pq.read_table(Path(out, "predictions")).to_pylist()
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: row for row in rows}


def test_predictions_are_the_models(config: PredictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PART_IMAGES", 5)
    results = predict(config, quiet)
    assert (results["ignored"], results["unknown_classes"]) == ({".txt": 1}, {"purple": 1})
    rows = rows_of(config.out)
    assert set(rows) == {str(p.relative_to(config.images)) for p in Path(config.images).rglob("*.png")}
    saved = load_saved(config.checkpoint)
    transform = eval_transform(AugmentConfig(eval_crop_ratio=0.8, interpolation="bicubic"), 16)
    for key, row in rows.items():
        if key == "red/broken.png":
            assert row["predicted"] is None
            assert "not a readable image" in row["reason"]
            continue
        image = transform(decode_image(Path(config.images, key).read_bytes(), 3, 10**6))
        with torch.no_grad():
            logits = saved.model(normalize(image[None], saved.mean, saved.std))
        expected = logits.softmax(1)[0].sort(descending=True)
        assert row["top_classes"] == [saved.classes[i] for i in expected.indices[:2]]
        assert row["top_probabilities"] == pytest.approx(expected.values[:2].tolist(), abs=1e-5)
        assert row["predicted"] == row["top_classes"][0]
    # counted by hand from the rows
    known = [row for row in rows.values() if row["class"] in saved.classes and row["predicted"]]
    hits = sum(row["class"] == row["predicted"] for row in known)
    assert (results["images"], results["skipped"], results["labelled"]) == (24, 1, 21)
    assert results["top1"] == pytest.approx(100 * hits / 21)
    assert results["top1"] > 80
    assert "top5" not in results  # of two classes named, nobody can tell
    assert [row["class"] for row in results["classes"]] == ["blue", "green", "red"]
    assert json.loads(Path(config.out, "predictions.json").read_text()) == results
    assert Path(config.out, "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert not Path(config.out, ".staging").exists()


def test_a_picture_of_thousands_of_classes_is_left_out(config: PredictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PICTURED_CLASSES", 2)
    assert len(predict(config, quiet)["classes"]) == 3
    assert not Path(config.out, "confusion.png").exists()


def test_cut_between_parts_it_goes_on(config: PredictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PART_IMAGES", 5)

    def cut(what: str, done: int, total: int) -> None:
        if what == "predicting" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(config, cut)
    assert not Path(config.out, "predictions.json").exists()
    with pytest.raises(ValueError, match=r"(?s)was begun .* top_k: 2 there, 3 now"):
        predict(dataclasses.replace(config, top_k=3), quiet)
    started_at: list[int] = []
    results = predict(config, lambda what, done, _: started_at.append(done) if what == "predicting" else None)
    assert started_at[0] > 0
    assert results["images"] == len(rows_of(config.out)) == 24
    assert predict(config, quiet) == results  # again is free
    rows = rows_of(config.out)
    Path(config.out, "predictions/part-000002.parquet").unlink()
    assert predict(config, quiet) == results  # what was lost is made again
    assert rows_of(config.out) == rows
    with pytest.raises(ValueError, match=r"(?s)holds predictions made .* top_k: 2 there, 3 now"):
        predict(dataclasses.replace(config, top_k=3), quiet)


def test_parts_by_hand() -> None:
    assert cut_parts([1, 1, 1, 1, 1], 2, 100) == [0, 2, 4, 5]
    assert cut_parts([4, 6, 1, 30, 0, 2, 9], 3, 10) == [0, 2, 3, 4, 6, 7]
    assert cut_parts([5], 3, 10) == [0, 1]


def test_a_part_is_bounded_by_bytes(config: PredictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the files that are read, which one that is too large is not, and of the pixels that the model takes."""
    images = Path(config.images)
    (images / "green/heavy.png").write_bytes(bytes(9_000))
    sizes = {str(path.relative_to(images)): path.stat().st_size for path in images.rglob("*.png")}
    read = {key: size for key, size in sizes.items() if size < 9_000}
    monkeypatch.setattr(module, "_PART_BYTES", 4 * max(read.values()))
    results = predict(dataclasses.replace(config, max_image_bytes=8_000), quiet)
    assert (results["images"], results["skipped"]) == (25, 2)
    assert set(rows_of(config.out)) == set(sizes)
    parts = [pq.read_table(path)["key"].to_pylist() for path in Path(config.out, "predictions").iterdir()]
    assert max(sum(read.get(key, 0) for key in keys) for keys in parts) <= 4 * max(read.values())
    assert max(map(len, parts)) > 4  # the one that is not read costs nothing
    monkeypatch.setattr(module, "_PART_BYTES", 5 * 3 * 16 * 16 + 1)
    small = pa.table({"length": [1] * 13})
    assert module._ends(config, load_saved(config.checkpoint), small) == [0, 5, 10, 13]


def test_what_killed_writers_left_is_no_part(config: PredictConfig) -> None:

    def leave(what: str, done: int, total: int) -> None:
        Storage(config.out).write("predictions/.part-000000.parquet.4711", b"half")

    assert predict(config, leave)["images"] == 24


def test_too_many_copies_of_the_model_are_refused(config: PredictConfig) -> None:
    with pytest.raises(ValueError, match=r"workers = 6 copies .* need a CPU each, and decoding a CPU; .* has 6 CPUs"):
        predict(dataclasses.replace(config, workers=6), quiet)
    with pytest.raises(ValueError, match=r"workers = 1 copies of the model need a GPU each"):
        predict(dataclasses.replace(config, gpu=True), quiet)
    assert not Path(config.out).exists()


def test_out_among_the_images_is_refused(config: PredictConfig) -> None:
    out = Path(config.images, "out")
    file = Path(config.out)
    file.write_text("years")
    with pytest.raises(ValueError, match=r"out must be a folder, .* is a file"):
        predict(config, quiet)
    assert file.read_text() == "years"
    with pytest.raises(ValueError, match="out must not lie in the folder that is read"):
        predict(dataclasses.replace(config, out=str(out)), quiet)
    assert not out.exists()


def test_another_place_is_no_other_source(config: PredictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(config.images).parent)
    relative = dataclasses.replace(config, images="unseen", out="out")
    assert predict(relative, quiet)["images"] == 24
    monkeypatch.chdir("/")
    assert predict(config, quiet)["images"] == 24  # the same, so free


@pytest.mark.slow
def test_an_outage_in_the_middle(
    config: PredictConfig, object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link in a tar, which has no place, is among them."""
    monkeypatch.setattr(module, "_PART_IMAGES", 5)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(config.images, "unseen")
        link = tarfile.TarInfo("unseen/red/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    bucket = Storage(object_store.uri(f"images-{tmp_path.name}"))
    bucket.write("x.tar", (tmp_path / "x.tar").read_bytes())
    outage = Outage(object_store, "predicting")
    remote = dataclasses.replace(config, images=bucket.uri, out=object_store.uri(f"out-{tmp_path.name}"))
    results = predict(remote, outage)
    outage.join()
    assert (results["images"], results["skipped"]) == (25, 2)


def test_a_store_that_stays_away_is_said_in_one_line(config: PredictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the actors that write; then from the tasks that read."""

    def obstruct(what: str, done: int, total: int) -> None:
        if what == "predicting":
            Storage(config.out).write("predictions", b"a file where a folder must be")

    with pytest.raises(StorageError, match="predictions") as caught:
        predict(config, obstruct)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(module, "load_part", lambda *_: (_ for _ in ()).throw(StorageError("the store is away")))
    Path(config.out, "predictions").unlink()
    with pytest.raises(StorageError, match=r"^the store is away$"):
        predict(config, quiet)


def test_shards_and_one_split(config: PredictConfig, tmp_path: Path) -> None:
    images = make_folder(tmp_path / "more", images_per_class=4, val_per_class=2)
    prepare(PrepareConfig(source=str(images), out=str(tmp_path / "shards")), quiet)
    results = predict(dataclasses.replace(config, images=str(tmp_path / "shards"), split="val", top_k=5), quiet)
    assert results["top5"] == 100  # there are three
    assert (results["images"], results["labelled"]) == (6, 6)
    assert {key.split("/")[0] for key in rows_of(config.out)} == {"val"}
    # other images of the same number, prepared at the same place, are not those that were predicted
    shutil.rmtree(tmp_path / "shards")
    (images / "val/red/000.png").write_bytes((images / "val/red/001.png").read_bytes())
    prepare(PrepareConfig(source=str(images), out=str(tmp_path / "shards"), seed=1), quiet)
    with pytest.raises(ValueError, match=r"(?s)holds predictions made .*listing_sha256: "):
        predict(dataclasses.replace(config, images=str(tmp_path / "shards"), split="val", top_k=5), quiet)
    elsewhere = dataclasses.replace(config, images=str(tmp_path / "shards"), out=config.out + "2")
    with pytest.raises(ValueError, match="holds no images of split 'test'; there are train, val"):
        predict(dataclasses.replace(elsewhere, split="test"), quiet)
    assert predict(dataclasses.replace(elsewhere, split="train"), quiet)["images"] == 12  # mended, it has the folder


def test_a_checkpoint_that_is_none(config: PredictConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a run with a checkpoint nor a checkpoint"):
        predict(dataclasses.replace(config, checkpoint=str(tmp_path / "images")), quiet)
    manifest = Path(config.checkpoint, "checkpoint.json")
    fields = json.loads(manifest.read_text())
    del fields["data"]["classes"]
    manifest.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"is of another version of diffvit: 'classes'"):
        load_saved(config.checkpoint)
    assert not Path(config.out).exists()


def test_confusion_by_hand() -> None:
    rows = module.per_class(np.array([[3, 1, 0], [0, 0, 0], [2, 0, 2]]), ["a", "b", "c"])
    assert rows == [
        {"class": "a", "images": 4, "top1": 75.0, "precision": 60.0, "most_taken_for": "b"},
        {"class": "c", "images": 4, "top1": 50.0, "precision": 100.0, "most_taken_for": "a"},
    ]


def test_a_checkpoint_loads_without_its_run(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = with_fields(tiny_config, model={"num_classes": 3}, data={"classes": ("x", "y", "z")})
    model = write_untrained(config, tmp_path / "c")
    saved = load_saved(tmp_path / "c")
    assert (saved.config, saved.classes, saved.mean, saved.std) == (config.model, ("x", "y", "z"), (0.5,), (0.25,))
    assert not saved.model.training
    assert torch.equal(saved.model.head.weight, model.head.weight)
